"""How a job stands, from the ledger alone, and which of its images failed and why.

Whether a farm is at work on an unfinished job is not written down anywhere, and not known here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from farm.ledger import Ledger
from farm.plan import Plan
from farm.receipt import ImageRow
from farm.records import Totals

State = Literal["open", "done", "cancelled"]


@dataclass(frozen=True, slots=True)
class RunStatus:
    """One run of a job. `done` counts images whose latest pass has a row for them, failed ones too."""

    run: str
    pass_number: int
    images: int
    done: int
    failed: int
    shards: int
    shards_done: int
    created_at: str
    totals: Totals | None


@dataclass(frozen=True, slots=True)
class JobStatus:
    """A job and its runs, oldest first."""

    job: str
    state: State
    model: str
    priority: int
    runs: tuple[RunStatus, ...]

    @property
    def images(self) -> int:
        """Images of all runs."""
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
        """When its first run was planned, ISO 8601."""
        return self.runs[0].created_at

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
    newest = ledger.plan(job)
    runs = tuple(_run_status(ledger, plan) for plan in ledger.plans(job))
    state: State = "open"
    if all(run.totals is not None for run in runs):
        state = "done"
    elif is_cancelled(ledger, job):
        state = "cancelled"
    return JobStatus(job, state, newest.card.name, newest.priority, runs)


def is_cancelled(ledger: Ledger, job: str) -> bool:
    """Whether the last thing said to the job is `cancel`."""
    controls = ledger.controls(job)
    return bool(controls) and controls[-1].action == "cancel"


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
        places = _places(left, ledger.pass_indexes(plan, number))
        done = ledger.done_shards(plan, number)
        shards = np.unique(places[places >= 0] // plan.shard_images)
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
    if totals is not None:
        return RunStatus(
            plan.run, number, plan.images, plan.images, totals.failed, shards, shards, plan.created_at, totals
        )
    done = ledger.done_shards(plan, number)
    again = ledger.pass_indexes(plan, number)
    of_pass = plan.images if again is None else len(again)
    done_in_pass = int(done.sum()) * plan.shard_images
    if len(done) and done[-1]:
        done_in_pass -= len(done) * plan.shard_images - of_pass
    return RunStatus(
        run=plan.run,
        pass_number=number,
        images=plan.images,
        done=plan.images - of_pass + done_in_pass,
        failed=len(ledger.failed_indexes(plan)),
        shards=shards,
        shards_done=int(done.sum()),
        created_at=plan.created_at,
        totals=None,
    )


def _places(indexes: NDArray[np.int64], of_pass: NDArray[np.int64] | None) -> NDArray[np.int64]:
    """Where each image stands in a pass; -1 where it is not in it."""
    if of_pass is None:
        return indexes
    at = np.searchsorted(of_pass, indexes)
    inside = np.minimum(at, len(of_pass) - 1)
    return np.where(of_pass[inside] == indexes, inside, -1)


def _has(ordered: NDArray[np.int64], index: int) -> bool:
    at = int(np.searchsorted(ordered, index))
    return at < len(ordered) and bool(ordered[at] == index)
