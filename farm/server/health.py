"""Whether the endpoint lives, whether it can draw, and what the farm has counted."""

import asyncio
from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from farm.errors import BusyError
from farm.metrics import exposition
from farm.server.caller import Reader
from farm.server.errors import answers
from farm.server.gateway import AWAY_RETRY_S
from farm.server.services import Served

router = APIRouter(tags=["health"])


class Alive(BaseModel):
    """The gateway answers."""

    status: Literal["ok"] = "ok"


class Ready(BaseModel):
    """The farm draws."""

    status: Literal["ready"] = "ready"
    version: str
    renderers: int = Field(description="how many have started")


@router.get("/healthz", summary="Whether the endpoint lives", responses=answers())
async def healthz() -> Alive:
    """Answers for as long as this gateway lives; asks nobody."""
    return Alive()


@router.get("/readyz", summary="Whether the farm draws", responses=answers())
async def readyz(services: Served) -> Ready:
    """Whether the dispatcher answers and a renderer has started; 503 where not."""
    pool = await services.pool()
    started = sum(one.state != "starting" for one in pool.renderers)
    if not started:
        raise BusyError("no renderer of the farm has started yet; ask again in some seconds", AWAY_RETRY_S)
    return Ready(version=pool.version, renderers=started)


@router.get(
    "/metrics",
    summary="What the farm has counted",
    response_class=Response,
    responses={
        **answers(),
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}, "description": "for Prometheus"},
    },
)
async def metrics(request: Request, _caller: Reader, services: Served) -> Response:
    """What every process of the farm has counted, as Prometheus reads it. HTTP counts are some seconds old."""
    snapshots = await services.link.metrics()
    shown = await asyncio.to_thread(exposition, snapshots, accept=request.headers.get("accept", ""))
    return Response(shown.body, media_type=shown.content_type)
