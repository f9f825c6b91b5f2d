"""What the routes of jobs share in one gateway: what was just read, threads of their own, how many streams are open.

Made by the first request that needs it, and ends with its app. Nothing in it lasts.
"""

import asyncio
from collections import OrderedDict
from dataclasses import asdict, dataclass, replace
from typing import Annotated, cast

from fastapi import Depends, Path, Request
from pydantic import BaseModel, Field

from farm.errors import FarmUnavailableError, ObjectMissingError, UnknownJobError
from farm.ledger import Ledger
from farm.run import JobProgress
from farm.server.errors import scrubbed
from farm.server.joblist import JobList
from farm.server.link import FarmLink
from farm.server.rows import Rows
from farm.server.services import Services
from farm.server.threads import Threads
from farm.status import JobStatus, job_status

ENDED = frozenset({"done", "cancelled", "deleted"})
"""States after which nothing follows by itself."""
PROGRESS_S = 0.5
STATUS_S = 3.0
"""How old what is told of a job may be: as the dispatcher has it, and as it is read from the store where that must do."""
KEPT = 256

JobName = Annotated[str, Path(description="the job's name", max_length=200)]
"""The type of a route's parameter that names one."""


class LiveRecord(BaseModel):
    """A job's open pass, as the farm that renders it has it; of the store where no farm does."""

    state: str = Field(
        description="waiting, running, finalising, stopped, stalled, elsewhere, pilot, paused, done, ..."
    )
    run: str | None = None
    pass_number: int | None = None
    images: int
    done: int
    failed: int
    fraction: float = Field(description="0 to 1; counts the steps of shards in hand")
    images_per_s: float | None = None
    eta_s: float | None = None
    renderers: int = Field(default=0, description="of the farm, for whichever job")
    renderers_busy: int = 0
    message: str | None = Field(default=None, description="why it goes no further, or what it waits for")
    code: str | None = Field(default=None, description="the code of the error that stalled it")
    live: bool = Field(description="whether a farm told it")


class Standings:
    """How jobs stand, for many who look at once. For one event loop."""

    def __init__(self, link: FarmLink, ledger: Ledger, reading: Threads):
        self._link = link
        self._ledger = ledger
        self._reading = reading
        self._kept: OrderedDict[str, _Asked] = OrderedDict()

    async def of(self, job: str) -> LiveRecord:
        """A moment old. Raises RecordError, StoreError."""
        loop = asyncio.get_running_loop()
        kept = self._kept.get(job)
        if kept is None or (kept.asking.done() and (loop.time() > kept.until or kept.asking.exception())):
            asking = loop.create_task(self._look(job))
            asking.add_done_callback(_seen)
            kept = self._kept[job] = _Asked(asking, loop.time() + PROGRESS_S)
            self._kept.move_to_end(job)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        found = await asyncio.shield(kept.asking)
        if not found.live and self._kept.get(job) is kept and kept.until < loop.time() + STATUS_S:
            self._kept[job] = replace(kept, until=max(kept.until, loop.time() + STATUS_S - PROGRESS_S))
        return found

    async def told(self, job: str) -> LiveRecord | None:
        """What the farm has in hand of a job; None where it has nothing, or is away."""
        try:
            progress, code = await self._link.progress(job)
        except FarmUnavailableError:
            return None
        if progress is None or progress.state in ENDED:
            return None
        return _of_farm(progress, code, self._ledger.store.url)

    async def _look(self, job: str) -> LiveRecord:
        told = await self.told(job)
        if told is not None:
            return told
        # What has ended may have been opened again since, and the store knows.
        try:
            return _of_store(await self._reading.run(job_status, self._ledger, job))
        except (UnknownJobError, ObjectMissingError):
            return LiveRecord(state="deleted", images=0, done=0, failed=0, fraction=1.0, live=False)


@dataclass(frozen=True, slots=True)
class _Asked:
    asking: "asyncio.Task[LiveRecord]"
    until: float


class JobRoom:
    """`reading`: threads that read the store. `planning`: those that read manifests and plan, or look through a whole job.

    `streams` and `manifests`: how many are in hand.
    """

    def __init__(self, link: FarmLink, ledger: Ledger):
        self.reading = Threads("jobs", count=8, most=2000)
        self.planning = Threads("planning", count=2, most=32)
        self.rows = Rows(ledger)
        self.list = JobList(ledger)
        self.standings = Standings(link, ledger, self.reading)
        self.streams = 0
        self.manifests = 0


async def _room(request: Request) -> JobRoom:
    state = request.app.state
    if not hasattr(state, "job_room"):
        services = cast(Services, state.services)
        state.job_room = JobRoom(services.link, services.ledger)
    return cast(JobRoom, state.job_room)


Roomed = Annotated[JobRoom, Depends(_room)]
"""The type of a route's parameter that wants it."""


def _seen(asking: "asyncio.Task[LiveRecord]") -> None:
    """Take notice of how it ended: whoever asked may have gone."""
    if not asking.cancelled():
        asking.exception()


def _of_farm(progress: JobProgress, code: str | None, store: str) -> LiveRecord:
    fields = asdict(progress)
    if progress.message is not None:
        fields["message"] = scrubbed(progress.message, store=store)
    known = {name: fields[name] for name in LiveRecord.model_fields if name in fields}
    return LiveRecord(live=True, code=code if progress.state == "stalled" else None, **known)


def _of_store(status: JobStatus) -> LiveRecord:
    return LiveRecord(
        state=status.state,
        run=status.runs[-1].run if status.runs else None,
        pass_number=status.runs[-1].pass_number if status.runs else None,
        images=status.images,
        done=status.done,
        failed=status.failed,
        fraction=status.done / status.images if status.images else 1.0,
        live=False,
    )
