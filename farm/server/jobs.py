"""Jobs over HTTP: submit, list, look at one.

The same rules as on the command line, from the same place, `farm.submission`. A job that was answered for is stored; a farm
that is away finds it when it is back.
"""

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter, Path, Query, Request
from pydantic import BaseModel, Field
from starlette.responses import JSONResponse, Response

from farm.errors import BusyError, ControlError, ObjectMissingError, RequestError, UnknownImageError
from farm.export import sheet_key
from farm.jobrecord import JobRecord, job_record
from farm.keys import Key
from farm.server import jobcontrols
from farm.server.caller import Painter, Reader
from farm.server.errors import answers, scrubbed
from farm.server.jobroom import JobName, JobRoom, LiveRecord, Roomed
from farm.server.links import base_url
from farm.server.manifests import read_body
from farm.server.pictures import RESPONSES, content_type_of, picture, unchanged
from farm.server.rowrecord import ImageRecord, Links, image_record
from farm.server.services import Served, Services
from farm.server.submitting import Submitted, submit, tell
from farm.status import JobStatus, job_status

router = APIRouter(tags=["jobs"])
router.include_router(jobcontrols.router)

MAX_INDEX = 2**53
MANIFESTS = 32
"""Manifests that a gateway has in hand at a time, of 8 MiB at most."""

Cursor = Annotated[str | None, Query(max_length=500, description="`next_cursor` of the page before")]
Append = Annotated[bool, Query(description="rows that were added to a keyed prompt file become a new run of the job")]

_MANIFEST = {
    "requestBody": {
        "required": True,
        "description": "a manifest; `farm plan` checks one",
        "content": {
            kind: {"schema": {"type": "object", "description": "a manifest, as in a file"}}
            for kind in ("application/json", "application/yaml")
        },
    }
}


class JobAnswer(JobRecord):
    """How a job stands, and what the farm has in hand of it."""

    live: LiveRecord


class ListedJob(JobRecord):
    """How a job of a list stands."""

    live: LiveRecord | None = Field(description="what the farm has in hand of it while it is open; null where nothing")


class DamagedRecord(BaseModel):
    """A job one of whose records cannot be read."""

    job: str
    code: str
    message: str


class JobsPage(BaseModel):
    """Some jobs, newest first."""

    object: Literal["list"] = "list"
    data: list[ListedJob]
    damaged: list[DamagedRecord] = Field(description="jobs that cannot be read")
    next_cursor: str | None = Field(description="of the next page; null where this is the last")


class ImagesPage(BaseModel):
    """Some images of a job that have a row, in order of their indexes, a run after the other."""

    object: Literal["list"] = "list"
    data: list[ImageRecord]
    next_cursor: str | None = Field(description="of the next page, which may be empty; null where this is the last")


@router.post(
    "/v1/jobs",
    summary="Submit a job",
    status_code=201,
    response_model=Submitted,
    responses={**answers(404, 409), 200: {"model": Submitted, "description": "the job was there, and is the same"}},
    openapi_extra=_MANIFEST,
)
async def create(request: Request, caller: Painter, services: Served, room: Roomed, append: Append = False) -> Response:
    """Submit a manifest under the name that stands in it; the same one again finds the job that it made."""
    return await _submit(request, caller, services, room, name=None, append=append)


@router.put(
    "/v1/jobs/{id}",
    summary="Submit a job by its name",
    status_code=200,
    response_model=Submitted,
    responses={**answers(404, 409), 201: {"model": Submitted, "description": "the job was made"}},
    openapi_extra=_MANIFEST,
)
async def put(
    id: JobName, request: Request, caller: Painter, services: Served, room: Roomed, append: Append = False
) -> Response:
    """Submit a manifest as the job of that name. Repeating it changes nothing; another manifest is refused."""
    return await _submit(request, caller, services, room, name=id, append=append)


@router.get("/v1/jobs", summary="List jobs", responses=answers())
async def list_jobs(
    _caller: Reader,
    services: Served,
    room: Roomed,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    cursor: Cursor = None,
    owner: Annotated[str | None, Query(max_length=100)] = None,
    model: Annotated[str | None, Query(max_length=200)] = None,
    state: Annotated[Literal["open", "paused", "cancelled", "pilot", "done"] | None, Query()] = None,
) -> JobsPage:
    """List jobs, newest first."""

    def wanted(one: JobStatus) -> bool:
        return owner in (None, one.owner) and model in (None, one.model) and state in (None, one.state)

    page = await room.reading.run(room.list.page, limit=limit, after=cursor, wanted=wanted)
    working = [one.job for one in page.jobs if one.state == "open"]
    live = dict(zip(working, await asyncio.gather(*map(room.standings.told, working)), strict=True))
    store = services.ledger.store.url
    return JobsPage(
        data=[ListedJob(**dict(job_record(one)), live=live.get(one.job)) for one in page.jobs],
        damaged=[
            DamagedRecord(job=one.job, code=one.code, message=scrubbed(one.message, store=store))
            for one in page.damaged
        ],
        next_cursor=page.after,
    )


@router.get("/v1/jobs/{id}", summary="Look at a job", responses=answers(404))
async def get_job(id: JobName, _caller: Reader, services: Served, room: Roomed) -> JobAnswer:
    """Show how a job stands, and what the farm has in hand of it."""
    record = job_record(await room.reading.run(job_status, services.ledger, id))
    return JobAnswer(**dict(record), live=await room.standings.of(id))


@router.get("/v1/jobs/{id}/images", summary="List a job's images", responses=answers(404))
async def list_images(
    id: JobName,
    request: Request,
    _caller: Reader,
    services: Served,
    room: Roomed,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    cursor: Cursor = None,
    run: Annotated[str | None, Query(max_length=32, description="of this run alone")] = None,
    status: Annotated[Literal["ok", "failed"] | None, Query()] = None,
) -> ImagesPage:
    """List the images that have been rendered or failed, by index; what a later pass drew takes the place of before."""
    links = Links(services.ledger.store, base_url(request, services.settings))
    after = _image_cursor(cursor)

    def look() -> ImagesPage:
        plans = room.rows.plans(id) if run is None else [room.rows.plan(id, run)]
        page = room.rows.page(plans, limit=limit, after=after, status=status)
        return ImagesPage(
            data=[image_record(one.plan, one.row, links) for one in page.rows],
            next_cursor=None if page.after is None else f"{page.after[0]}:{page.after[1]}",
        )

    return await room.reading.run(look)


@router.get(
    "/v1/jobs/{id}/images/{index}/content",
    summary="Fetch a picture of a job",
    response_class=Response,
    responses={**answers(404), **RESPONSES},
)
async def content(
    id: JobName,
    index: Annotated[int, Path(ge=0, le=MAX_INDEX)],
    request: Request,
    _caller: Reader,
    services: Served,
    room: Roomed,
    run: Annotated[str | None, Query(max_length=32, description="needed where the job has several")] = None,
    thumbnail: Annotated[bool, Query(description="the small copy, where there is one")] = False,
) -> Response:
    """Fetch a picture file as it was rendered, with its provenance in it."""

    def look() -> Response:
        plan = room.rows.plan(id, run)
        row = room.rows.row(plan, index)
        key = None if row is None else row.thumbnail if thumbnail else row.object
        if row is None or key is None:
            why = "is not rendered yet" if row is None else "failed" if row.status == "failed" else "has no thumbnail"
            raise UnknownImageError(f"image {index} of {id} {why}; GET /v1/jobs/{id}/images lists those there are")
        etag = f"{row.sha256}{'-small' if thumbnail else ''}"
        answer = unchanged(request, etag)
        if answer is not None:
            return answer
        try:
            data = services.ledger.store.get(key)
        except ObjectMissingError as exc:
            raise UnknownImageError(
                f"the picture of image {index} of {id} is gone; farm verify {id} says more"
            ) from exc
        return picture(data, content_type=content_type_of(key), etag=etag, name=key.rpartition("/")[2])

    return await room.reading.run(look)


@router.get(
    "/v1/jobs/{id}/sheet",
    summary="Fetch a job's contact sheet",
    response_class=Response,
    responses={**answers(404, 409), **RESPONSES},
)
async def sheet(
    id: JobName,
    request: Request,
    _caller: Reader,
    services: Served,
    room: Roomed,
    run: Annotated[str | None, Query(max_length=32, description="the newest where none is named")] = None,
) -> Response:
    """Fetch the contact sheet, a PNG; there is one when a pass has ended, a pilot's too."""

    def look() -> Response:
        plans = room.rows.plans(id)
        plan = plans[-1] if run is None else room.rows.plan(id, run)
        key, store = sheet_key(plan), services.ledger.store
        info = store.head(key)
        if info is None:
            raise ControlError(f"{id} has no contact sheet yet; it is drawn when a pass of the job has ended")
        etag = info.etag.strip('"')
        return unchanged(request, etag) or picture(
            store.get(key), content_type="image/png", etag=etag, name=f"{plan.job}-{plan.run}.png"
        )

    return await room.reading.run(look)


async def _submit(
    request: Request, caller: Key, services: Services, room: JobRoom, *, name: str | None, append: bool
) -> Response:
    if room.manifests >= MANIFESTS:
        raise BusyError(f"{MANIFESTS} manifests are being read here; try again in some seconds", 5.0)
    room.manifests += 1
    try:
        data, is_yaml = await read_body(request)
        made = await submit(
            data, is_yaml=is_yaml, name=name, append=append, caller=caller, services=services, room=room
        )
    finally:
        room.manifests -= 1
    await tell(services, made.job)
    headers = {"location": f"/v1/jobs/{made.job}"}
    return JSONResponse(made.model_dump(mode="json"), 201 if made.outcome == "created" else 200, headers)


def _image_cursor(text: str | None) -> tuple[str, int] | None:
    if text is None:
        return None
    run, mark, index = text.partition(":")
    if not mark or not index.isascii() or not index.isdigit() or len(index) > 15:
        raise RequestError(f"cursor {text[:40]!r} is none that this farm gave; begin without one", "cursor")
    return run, int(index)
