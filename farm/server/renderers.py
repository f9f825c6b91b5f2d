"""Renderers over HTTP: list them, give one no more work, give it work again."""

from typing import Annotated, Literal

from fastapi import APIRouter, Path
from pydantic import BaseModel, ConfigDict, Field

from farm.errors import UnknownRendererError
from farm.portion import RendererView
from farm.server.body import JsonRoute
from farm.server.caller import Admin, Reader
from farm.server.errors import answers
from farm.server.gateway import answered
from farm.server.services import Served, Services

router = APIRouter(tags=["renderers"], route_class=JsonRoute)

RendererName = Annotated[str, Path(description="the renderer's name", max_length=100)]


class RendererRecord(BaseModel):
    """A renderer, and what it has in hand."""

    name: str
    state: Literal["starting", "idle", "rendering", "loading", "draining", "drained"]
    device: str
    loaded: str | None = Field(description="the model that it has loaded")
    job: str | None = Field(description="whose shard it has in hand")
    urgent: int = Field(description="images of the endpoint that it has")
    reserved: bool = Field(description="it is kept free for the endpoint's images now")


class RenderersPage(BaseModel):
    """All renderers of the farm."""

    object: Literal["list"] = "list"
    data: list[RendererRecord]
    next_cursor: None = None
    waiting: int = Field(description="images of the endpoint that are placed and not drawn")
    capacity: int = Field(description="how many there may be")


class EmptyBody(BaseModel):
    """Nothing is to be said besides."""

    model_config = ConfigDict(extra="forbid")


@router.get("/v1/renderers", summary="List renderers", responses=answers())
async def list_renderers(_caller: Reader, services: Served) -> RenderersPage:
    """List the farm's renderers and what they do."""
    pool = await answered(services.pool)
    return RenderersPage(data=[_record(one) for one in pool.renderers], waiting=pool.waiting, capacity=pool.capacity)


@router.post("/v1/renderers/{name}/drain", summary="Drain a renderer", responses=answers(404))
async def drain(name: RendererName, _caller: Admin, services: Served, _body: EmptyBody | None = None) -> RendererRecord:
    """Give a renderer no more work; what it has in hand it ends."""
    return await _drain(name, services, drained=True)


@router.post("/v1/renderers/{name}/resume", summary="Resume a renderer", responses=answers(404))
async def resume(
    name: RendererName, _caller: Admin, services: Served, _body: EmptyBody | None = None
) -> RendererRecord:
    """Give a drained renderer work again."""
    return await _drain(name, services, drained=False)


async def _drain(name: str, services: Services, *, drained: bool) -> RendererRecord:
    await answered(lambda: services.link.drain(name, drained))
    pool = await answered(services.link.pool)
    found = next((one for one in pool.renderers if one.name == name), None)
    if found is None:
        raise UnknownRendererError(f"renderer {name!r} has just gone; GET /v1/renderers lists those there are")
    return _record(found)


def _record(one: RendererView) -> RendererRecord:
    return RendererRecord(**{field: getattr(one, field) for field in RendererRecord.model_fields})
