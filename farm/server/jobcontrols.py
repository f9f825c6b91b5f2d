"""What people say to a job over HTTP: pause, resume, cancel, approve, change, retry.

By the same rules as on the command line, which `farm.controls` has. What was answered for is stored; a farm that is away
finds it when it is back.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field, StrictBool, model_validator

from farm import controls
from farm.controls import Said, Which
from farm.errors import RequestError
from farm.keys import Key
from farm.ledger import Ledger
from farm.limits import Changes
from farm.server.body import JsonRoute
from farm.server.caller import Painter, must_own
from farm.server.errors import answers
from farm.server.jobroom import JobName, JobRoom, Roomed
from farm.server.services import Served, Services
from farm.server.submitting import now_iso, tell

router = APIRouter(tags=["jobs"], route_class=JsonRoute)

MAX_INDEX = 2**53
MAX_LISTED = 100_000


class SaidRecord(BaseModel):
    """What was said to a job."""

    job: str
    state: str
    control: dict[str, Any] | None = Field(description="null where the job stood so before")
    message: str


class RetriedRecord(BaseModel):
    """What a retry came to."""

    job: str
    reopened: int = Field(description="images that will be rendered again")
    unfinished: bool = Field(description="a run of the job is not done yet, and goes on first")
    resumed: bool
    message: str


class ChangeBody(BaseModel):
    """New values; what is left out stays."""

    model_config = ConfigDict(extra="forbid", strict=True)

    priority: int | None = Field(default=None, ge=0, le=100, description="higher goes first")
    finish_by: str | None = Field(default=None, max_length=100, description="ISO 8601 with an offset")
    gpu_hours: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    max_images: int | None = Field(default=None, gt=0, le=MAX_INDEX)


class RetryBody(BaseModel):
    """Which images to render again: those that failed, where nothing is said."""

    model_config = ConfigDict(extra="forbid", strict=True)

    which: Literal["failed", "all"] | None = None
    images: list[Annotated[int, Field(ge=0, le=MAX_INDEX)]] | str | None = Field(
        default=None, description="indexes, or a text of them as `7,9,20-29`", max_length=MAX_LISTED
    )
    damaged: StrictBool = Field(default=False, description="also those that are missing or not as their rows say")
    run: str | None = Field(default=None, max_length=32, description="of this run, where the job has several")

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if self.which is not None and self.images is not None:
            raise ValueError("which and images exclude each other; leave one of them out")
        return self


class EmptyBody(BaseModel):
    """Nothing is to be said besides."""

    model_config = ConfigDict(extra="forbid")


@router.post("/v1/jobs/{id}/pause", summary="Pause a job", responses=answers(404, 409))
async def pause(
    id: JobName, caller: Painter, services: Served, room: Roomed, _body: EmptyBody | None = None
) -> SaidRecord:
    """Hold a job until it is resumed; what is stored stays."""
    return await _say(id, controls.pause, caller, services, room)


@router.post("/v1/jobs/{id}/resume", summary="Resume a job", responses=answers(404, 409))
async def resume(
    id: JobName, caller: Painter, services: Served, room: Roomed, _body: EmptyBody | None = None
) -> SaidRecord:
    """Let a job go on that was paused or cancelled, or that the farm had stopped: `live.state` is `stalled`."""

    def say(ledger: Ledger, job: str, *, at: str, by: str) -> Said:
        said = controls.resume(ledger, job, at=at, by=by)
        if said.control is not None:
            return said
        return replace(said, message=f"{said.message}; a farm that had stopped it tries again")

    return await _say(id, say, caller, services, room)


@router.post("/v1/jobs/{id}/cancel", summary="Cancel a job", responses=answers(404, 409))
async def cancel(
    id: JobName, caller: Painter, services: Served, room: Roomed, _body: EmptyBody | None = None
) -> SaidRecord:
    """Stop a job; what is stored stays."""
    return await _say(id, controls.cancel, caller, services, room)


@router.post("/v1/jobs/{id}/approve", summary="Approve a job's pilot", responses=answers(404, 409))
async def approve(
    id: JobName, caller: Painter, services: Served, room: Roomed, _body: EmptyBody | None = None
) -> SaidRecord:
    """Let the images follow that a job's pilot left out."""
    return await _say(id, controls.approve, caller, services, room)


@router.post("/v1/jobs/{id}/change", summary="Change a job's priority or limits", responses=answers(404, 409))
async def change(id: JobName, body: ChangeBody, caller: Painter, services: Served, room: Roomed) -> SaidRecord:
    """Change a job's priority or limits; the manifest stays as it is."""
    changes = Changes(
        priority=body.priority, finish_by=body.finish_by, gpu_hours=body.gpu_hours, max_images=body.max_images
    )
    if not changes.given:
        raise RequestError("nothing to change is given; give priority, finish_by, gpu_hours or max_images")

    def say(ledger: Ledger, job: str, *, at: str, by: str) -> Said:
        return controls.change(ledger, job, changes, at=at, by=by)

    return await _say(id, say, caller, services, room)


@router.post("/v1/jobs/{id}/retry", summary="Render images again", responses=answers(404, 409))
async def retry(
    id: JobName, caller: Painter, services: Served, room: Roomed, body: RetryBody | None = None
) -> RetriedRecord:
    """Render images of a job again, as a new pass: those that failed, all, or those listed."""
    wanted = body or RetryBody()

    def look() -> RetriedRecord:
        _must_own(services, caller, id)
        which: Which = wanted.which or "failed"
        if wanted.images is not None:
            which = controls.parse_indexes(wanted.images) if isinstance(wanted.images, str) else wanted.images
        found = controls.retry(
            services.ledger,
            id,
            which=which,
            damaged=wanted.damaged,
            run=wanted.run,
            at=now_iso(services),
            by=caller.owner,
        )
        return RetriedRecord(
            job=id,
            reopened=found.opened,
            unfinished=found.unfinished,
            resumed=found.resumed,
            message=found.message,
        )

    record = await room.planning.run(look)
    await tell(services, id)
    return record


async def _say(id: str, say: Callable[..., Said], caller: Key, services: Services, room: JobRoom) -> SaidRecord:
    def look() -> Said:
        _must_own(services, caller, id)
        return say(services.ledger, id, at=now_iso(services), by=caller.owner)

    said = await room.reading.run(look)
    await tell(services, id)
    control = said.control.model_dump(exclude={"version"}, exclude_none=True) if said.control else None
    return SaidRecord(job=said.job, state=said.state, control=control, message=said.message)


def _must_own(services: Services, caller: Key, job: str) -> None:
    """Raises ForbiddenError, UnknownJobError."""
    plans = services.ledger.plans(job) or [services.ledger.plan(job)]
    must_own(caller, plans[0].owner, f"job {job}")
