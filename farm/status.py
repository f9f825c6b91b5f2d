"""How a job stands, from the ledger alone, and which of its images failed and why.

Whether a farm is at work on an unfinished job is not written down anywhere, and not known here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from farm.ledger import Ledger
from farm.limits import Limits, limits_of
from farm.plan import Plan
from farm.receipt import ImageRow
from farm.records import Control, Standing, Totals, standing

State = Literal["open", "paused", "cancelled", "pilot", "done", "deleted"]
"""`pilot`: the pilot is done and waits for approval. `deleted`: what is left of the job is being swept."""


@dataclass(frozen=True, slots=True)
class RunStatus:
    """One run of a job. `done` counts images whose latest pass has a row for them, failed ones too.

    `shards` and `shards_done` are the latest pass's, `totals` what the run came to by its end, None while it is open.
    `finished`: nothing of the run is left to render. `pilot`: how many images its pilot has.
    """

    run: str
    pass_number: int
    images: int
    done: int
    failed: int
    shards: int
    shards_done: int
    created_at: str
    totals: Totals | None
    finished: bool
    pilot: int | None = None


@dataclass(frozen=True, slots=True)
class JobStatus:
    """A job and its runs, oldest first; a deleted one has none. `last`: what was said to it last, if anything was."""

    job: str
    state: State
    model: str
    owner: str
    limits: Limits
    approved: bool
    last: Control | None
    runs: tuple[RunStatus, ...]

    @property
    def priority(self) -> int:
        """0 to 100, as last changed."""
        return self.limits.priority

    @property
    def images(self) -> int:
        """Images of all runs, those that a pilot leaves out too."""
        return sum(run.images for run in self.runs)

    @property
    def done(self) -> int:
        """Images that have a row, over all runs."""
        return sum(run.done for run in self.runs)

    @property
    def failed(self) -> int:
        """Images whose latest row is a failed one, over all runs."""
        return sum(run.failed for run in self.runs)

    @property
    def created_at(self) -> str:
        """When its first run was planned, ISO 8601; empty for a deleted job."""
        return self.runs[0].created_at if self.runs else ""

    @property
    def finished_at(self) -> str | None:
        """When its last pass ended, ISO 8601; None while it is not done."""
        if self.state != "done":
            return None
        return max(run.totals.finished_at for run in self.runs if run.totals)


@dataclass(frozen=True, slots=True)
class FailureGroup:
    """Failed images that share an error code, and one of them as an example."""

    code: str
    images: int
    example: ImageRow


def job_status(ledger: Ledger, job: str) -> JobStatus:
    """Look a job up. Raises UnknownJobError."""
    if ledger.deleted(job):
        return JobStatus(job, "deleted", "", "", Limits(priority=0), False, None, ())
    plans = ledger.plans(job) or [ledger.plan(job)]  # which raises, and names the nearest
    controls = ledger.controls(job)
    said = standing(controls)
    return JobStatus(
        job=job,
        state=state_of(ledger, plans, said),
        model=plans[-1].card.name,
        owner=plans[0].owner,
        limits=limits_of(plans[0].manifest, said),
        approved=said.approved,
        last=controls[-1] if controls else None,
        runs=tuple(_run_status(ledger, plan) for plan in plans),
    )


def state_of(ledger: Ledger, plans: Sequence[Plan], said: Standing) -> State:
    """One word for how a job with these runs stands, from a few look-ups whatever its size."""
    if all(ledger.finished(plan) for plan in plans):
        return "done"
    if said.state != "open":
        return said.state
    if not said.approved and any(awaits_approval(ledger, plan) for plan in plans):
        return "pilot"
    return "open"


def awaits_approval(ledger: Ledger, plan: Plan) -> bool:
    """Whether the run's pilot is done and the images that it left out are not begun."""
    return plan.pilot is not None and ledger.passes(plan) == 1 and ledger.closed(plan, 1)


def images_done(ledger: Ledger, plan: Plan) -> int:
    """How many images of a run have a row of the latest pass that they are in."""
    number = ledger.passes(plan)
    return _images_done(ledger, plan, number, None if ledger.closed(plan, number) else ledger.done_shards(plan, number))


def is_cancelled(ledger: Ledger, job: str) -> bool:
    """Whether `cancel` is what holds, of all that was said to the job."""
    return standing(ledger.controls(job)).state == "cancelled"


def failure_groups(ledger: Ledger, plan: Plan) -> list[FailureGroup]:
    """Group a run's failed images by error code, the largest group first."""
    examples: dict[str, ImageRow] = {}
    counts: dict[str, int] = {}
    for row in failed_rows(ledger, plan):
        code = row.error_code or "unknown"
        counts[code] = counts.get(code, 0) + 1
        examples.setdefault(code, row)
    groups = [FailureGroup(code, count, examples[code]) for code, count in counts.items()]
    return sorted(groups, key=lambda group: -group.images)


def failed_rows(ledger: Ledger, plan: Plan) -> Iterator[ImageRow]:
    """Yield the latest row of each failed image; reads only the receipts that hold one."""
    left = ledger.failed_indexes(plan)
    for number in range(ledger.passes(plan), 0, -1):
        if not len(left):
            return
        places = ledger.selection(plan, number).places(left)
        done = ledger.done_shards(plan, number)
        shards = np.unique(places[places >= 0] // plan.pass_shard_images(number))
        seen: list[int] = []
        for shard in shards:
            if done[shard]:
                for row in ledger.receipt(plan, number, int(shard)).rows:
                    if row.status == "failed" and _has(left, row.index):
                        seen.append(row.index)
                        yield row
        left = np.setdiff1d(left, np.array(seen, dtype=np.int64))


def _run_status(ledger: Ledger, plan: Plan) -> RunStatus:
    number = ledger.passes(plan)
    totals = ledger.totals(plan, number)
    shards = ledger.pass_shards(plan, number)
    receipted = ledger.done_shards(plan, number) if totals is None else None
    return RunStatus(
        run=plan.run,
        pass_number=number,
        images=plan.images,
        done=_images_done(ledger, plan, number, receipted),
        failed=len(ledger.failed_indexes(plan)) if totals is None else totals.failed,
        shards=shards,
        shards_done=shards if receipted is None else int(receipted.sum()),
        created_at=plan.created_at,
        totals=totals,
        finished=totals is not None and ledger.covered(plan, number) == plan.images,
        pilot=plan.pilot,
    )


def _images_done(ledger: Ledger, plan: Plan, number: int, receipted: NDArray[np.bool_] | None) -> int:
    """Images that have been in a pass by now, without those that the open one has still to render."""
    covered = ledger.covered(plan, number)
    if receipted is None:
        return covered
    return covered - ledger.pass_images(plan, number) + ledger.rendered(plan, number, receipted)


def _has(ordered: NDArray[np.int64], index: int) -> bool:
    at = int(np.searchsorted(ordered, index))
    return at < len(ordered) and bool(ordered[at] == index)
