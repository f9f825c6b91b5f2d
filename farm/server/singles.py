"""Single images over HTTP: those that the endpoint drew and keeps for a time."""

from typing import Annotated, Any, Literal, cast

from fastapi import APIRouter, Path, Query, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response

from farm.errors import RequestError
from farm.server.body import JsonRoute
from farm.server.caller import Painter, Reader, must_own
from farm.server.errors import answers
from farm.server.links import LINK_S, base_url, single_url
from farm.server.pictures import RESPONSES, picture, unchanged
from farm.server.services import Served, Services
from farm.server.threads import Threads
from farm.singles import Single, is_id

router = APIRouter(tags=["images"], route_class=JsonRoute)

MAX_DAYS = 36_500

ImageId = Annotated[str, Path(description="the image's id", max_length=100)]


class SingleRecord(BaseModel):
    """An image that the endpoint drew."""

    object: Literal["image"] = "image"
    id: str
    created_at: str = Field(description="ISO 8601, UTC")
    keep_until: str | None = Field(description="ISO 8601, UTC; null for good")
    owner: str
    user: str | None = Field(description="whom the asking program said that it asked for")
    model: str
    prompt: str
    negative_prompt: str
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    seed: int
    format: str
    size_bytes: int
    sha256: str
    seconds: float = Field(description="its share of its batch's time on the device")
    renderer: str
    device: str
    flag: str | None = Field(description="`black` or `flat` where the picture looks wrong")
    warnings: str | None = Field(description="codes of the advice on the prompt, with commas between")
    url: str = Field(description="of the picture; signed ones hold for an hour")


class SinglesPage(BaseModel):
    """Some images, newest first."""

    object: Literal["list"] = "list"
    data: list[SingleRecord]
    damaged: list[str] = Field(description="ids of images whose records cannot be read")
    next_cursor: str | None = Field(description="of the next page, which may be empty; null where this is the last")


class KeepBody(BaseModel):
    """For how long; for good where nothing is said."""

    model_config = ConfigDict(extra="forbid", strict=True)

    days: float | None = Field(default=None, gt=0, le=MAX_DAYS, allow_inf_nan=False, description="from now")


class DeletedRecord(BaseModel):
    """An image that was deleted."""

    id: str
    deleted: Literal[True] = True


@router.get("/v1/images", summary="List images", responses=answers())
async def list_singles(
    request: Request,
    _caller: Reader,
    services: Served,
    limit: Annotated[int, Query(ge=1, le=1000)] = 50,
    cursor: Annotated[str | None, Query(max_length=100, description="`next_cursor` of the page before")] = None,
    q: Annotated[str, Query(max_length=1000, description="words that stand in the prompt")] = "",
    owner: Annotated[str | None, Query(max_length=100)] = None,
    model: Annotated[str | None, Query(max_length=200)] = None,
) -> SinglesPage:
    """List the images that are kept, newest first."""

    def look() -> SinglesPage:
        now = services.wall()
        page = services.singles.list(now=now, limit=limit, after=cursor, owner=owner, model=model, words=q)
        return SinglesPage(
            data=[_record(one, request, services) for one in page.singles],
            damaged=list(page.damaged),
            next_cursor=page.after,
        )

    if cursor is not None and not is_id(cursor):
        raise RequestError(f"cursor {cursor[:40]!r} is none that this farm gave; begin without one", "cursor")
    return await _threads(request).run(look)


@router.get("/v1/images/{id}", summary="Look at an image", responses=answers(404))
async def get_single(id: ImageId, request: Request, _caller: Reader, services: Served) -> SingleRecord:
    """Show what an image was made from, and until when it is kept."""
    found = await _threads(request).run(services.singles.get, id, now=services.wall())
    return _record(found, request, services)


@router.get(
    "/v1/images/{id}/content",
    summary="Fetch an image's picture",
    response_class=Response,
    responses={**answers(404), **RESPONSES},
)
async def content(id: ImageId, request: Request, _caller: Reader, services: Served) -> Response:
    """Fetch the picture file as it was drawn, with its provenance in it."""

    def look() -> Response:
        found = services.singles.get(id, now=services.wall())
        return unchanged(request, found.sha256) or picture(
            services.singles.picture(found),
            content_type=found.content_type,
            etag=found.sha256,
            name=f"{found.id}.{found.format}",
        )

    return await _threads(request).run(look)


@router.post("/v1/images/{id}/keep", summary="Keep an image", responses=answers(404))
async def keep(
    id: ImageId, request: Request, caller: Painter, services: Served, body: KeepBody | None = None
) -> SingleRecord:
    """Keep an image for so many days from now, or for good."""
    days = body.days if body else None

    def change() -> Single:
        now = services.wall()
        must_own(caller, services.singles.get(id, now=now).owner, f"image {id}")
        return services.singles.keep(id, now=now, days=days)

    return _record(await _threads(request).run(change), request, services)


@router.delete("/v1/images/{id}", summary="Delete an image", responses=answers(404))
async def delete(id: ImageId, request: Request, caller: Painter, services: Served) -> DeletedRecord:
    """Delete an image for good."""

    def change() -> None:
        now = services.wall()
        must_own(caller, services.singles.get(id, now=now).owner, f"image {id}")
        services.singles.delete(id, now=now)

    await _threads(request).run(change)
    return DeletedRecord(id=id)


def _record(one: Single, request: Request, services: Services) -> SingleRecord:
    fields: dict[str, Any] = {name: getattr(one, name) for name in SingleRecord.model_fields if hasattr(one, name)}
    own = single_url(base_url(request, services.settings), one.id)
    return SingleRecord(**fields, **one.params.model_dump(), url=services.singles.link(one, LINK_S) or own)


def _threads(request: Request) -> Threads:
    state = request.app.state
    if not hasattr(state, "single_threads"):
        state.single_threads = Threads("singles", count=8, most=2000)
    return cast(Threads, state.single_threads)
