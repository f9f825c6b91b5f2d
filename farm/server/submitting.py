"""A manifest's way from a body to a job: parsed, allowed, counted for its key's quota, planned, stored.

Planned for the machine that the farm's renderers render on, whatever the gateway runs on.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Literal

from pydantic import Field

from farm.devices import DeviceInfo
from farm.errors import FarmUnavailableError, UnknownJobError
from farm.jobrecord import JobRecord, job_record
from farm.keys import Key
from farm.ledger import Ledger
from farm.plan import Plan
from farm.request import Request, prepare
from farm.server.caller import must_own
from farm.server.gateway import answered, refused
from farm.server.jobroom import JobRoom
from farm.server.manifests import MAX_YAML_BYTES, manifest_from
from farm.server.services import Services
from farm.server.warned import Warned, warned
from farm.sources import read_object
from farm.status import job_status
from farm.storage.opening import open_store
from farm.submission import Submission, draft
from farm.submission import submit as store

log = logging.getLogger(__name__)

WARNINGS = 100
"""Warnings that one answer carries at most."""


class Submitted(JobRecord):
    """A job that was submitted, as it stands now."""

    outcome: Literal["created", "resumed"] = Field(
        description="created: images are to be rendered that were not before"
    )
    changed: tuple[str, ...] = Field(description="priority or limits that the manifest states anew")
    kept: tuple[str, ...] = Field(description="limits that hold though the manifest leaves them out")
    waiting_rows: int = Field(description="appended rows that wait until the run in hand has ended")
    numerics_differ: tuple[str, ...] = Field(description="what of the farm differs from what the job was planned for")
    warnings: tuple[Warned, ...] = Field(
        description="of the model's card, and of the first 200 different prompts; 100 at most"
    )


async def submit(
    data: bytes, *, is_yaml: bool, name: str | None, append: bool, caller: Key, services: Services, room: JobRoom
) -> Submitted:
    """Make the job of a manifest, or find it. Raises what `farm.submission.submit` does, ForbiddenError, LimitedError,
    FarmUnavailableError where no renderer has come yet."""
    pool = await answered(services.pool)
    if pool.machine is None:
        raise FarmUnavailableError("no renderer of the farm has come up yet, so nothing can be planned; try again soon")
    ask = _Asked(services, caller, append, pool.machine, max(len(pool.renderers), 1))
    request = await room.planning.run(ask.read, data, is_yaml, name)
    if caller.allowance.images_per_day is not None:
        images = await room.planning.run(ask.new_images, request)
        if images:
            refusal = await answered(lambda: services.link.charge(caller.id, caller.allowance, images))
            if refusal is not None:
                raise refused(refusal)
    return await room.planning.run(ask.store, request)


def now_iso(services: Services) -> str:
    """This moment, ISO 8601, UTC."""
    return datetime.fromtimestamp(services.wall(), UTC).isoformat(timespec="seconds")


async def tell(services: Services, job: str) -> None:
    """Have the farm look at a job. Where it is away it finds by itself what was written."""
    try:
        await services.link.submit(job)
    except (FarmUnavailableError, UnknownJobError) as exc:
        log.info("the dispatcher was not told of a job", extra={"job": job, "reason": exc.message})


@dataclass(frozen=True, slots=True)
class _Asked:
    """What one submission was asked with. Its methods block."""

    services: Services
    caller: Key
    append: bool
    machine: DeviceInfo
    renderers: int

    @property
    def ledger(self) -> Ledger:
        return self.services.ledger

    def read(self, data: bytes, is_yaml: bool, name: str | None) -> Request:
        settings = self.services.settings.model_copy(update={"owner": self.caller.owner})
        read_url = partial(read_object, open_store=partial(open_store, settings=settings), most_bytes=MAX_YAML_BYTES)
        loaded = manifest_from(data, is_yaml=is_yaml, sources=settings.http_sources, name=name, read_url=read_url)
        self._must_own(self.ledger.plans(loaded.manifest.name))
        return prepare(loaded, settings, device=self.machine, renderers=self.renderers)

    def new_images(self, request: Request) -> int:
        """How many images it would add to the farm's work."""
        found = draft(request, self.ledger, now=now_iso(self.services))
        if found.state == "new":
            return found.plan.images
        if found.state == "appended" and self.append:
            return found.plan.images - sum(plan.images for plan in self.ledger.plans(request.manifest.name))
        return 0

    def store(self, request: Request) -> Submitted:
        now = now_iso(self.services)
        made = store(request, self.ledger, now=now, by=self.caller.owner, append=self.append)
        # Somebody else's manifest of that name may have been first, and the same.
        self._must_own([made.plan])
        return _submitted(made, job_record(job_status(self.ledger, made.plan.job)))

    def _must_own(self, plans: Sequence[Plan]) -> None:
        if plans:
            must_own(self.caller, plans[0].owner, f"job {plans[0].job}")


def _submitted(made: Submission, record: JobRecord) -> Submitted:
    return Submitted(
        **dict(record),
        outcome=made.outcome,
        changed=made.changed,
        kept=made.kept,
        waiting_rows=made.waiting_rows,
        numerics_differ=made.numerics_differ,
        warnings=warned(made.warnings[:WARNINGS]),
    )
