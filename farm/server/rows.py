"""Rows of jobs' images for many who ask at once: a page by index, and shards as they land.

Keeps what was just read: plans by their etag, receipts since they never change, and for a moment which shards are done. How
much is bounded, whatever the jobs' size. Blocks, safe with threads.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from farm.errors import ObjectMissingError, RequestError
from farm.jobkeys import number_in, plan_key
from farm.ledger import Ledger
from farm.plan import Plan
from farm.prefetch import in_order
from farm.receipt import ImageRow, Receipt
from farm.server.landing import Landed, Position

PLANS_KEPT = 32
ROWS_KEPT = 30_000
DONE_KEPT = 64
DONE_S = 1.0
"""How old what is told of done shards may be; ten times what the listing took, where that is more."""
WINDOW = 1000
"""Images looked at together."""
WINDOWS = 1000
"""Windows that a page passes over at most where little of a job is rendered; the next page goes on from there."""
RECEIPTS = 200
"""Receipts read for one page at most, but for those of its last window."""

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class Shown:
    """A row, and the run that it is of."""

    plan: Plan
    row: ImageRow


@dataclass(frozen=True, slots=True)
class RowPage:
    """Rows in index order, a run after the other. `after`: the run and index to go on after, None where this was all."""

    rows: tuple[Shown, ...]
    after: tuple[str, int] | None


class Rows:
    """The rows of one ledger. `clock`: seconds that never go back."""

    def __init__(self, ledger: Ledger, clock: Callable[[], float] = time.monotonic):
        self._ledger = ledger
        self._clock = clock
        self._plans: _Recent[str, Plan] = _Recent(PLANS_KEPT)
        self._receipts: _Recent[tuple[str, int, int], Receipt] = _Recent(
            ROWS_KEPT, weight=lambda one: len(one.rows) + 1
        )
        self._done: _Recent[tuple[str, int], tuple[float, npt.NDArray[np.bool_]]] = _Recent(DONE_KEPT)

    def plans(self, job: str) -> list[Plan]:
        """The runs of a job, oldest first. Raises UnknownJobError, RecordError."""
        found: list[Plan] = []
        if not self._ledger.deleted(job):
            prefix = plan_key(job, 0).removesuffix("0000.json")
            for info in self._ledger.store.list(prefix):
                if number_in(info.key.removeprefix(prefix), ".json") is None:
                    continue
                kept = self._plans.get(f"{info.key} {info.etag}")
                if kept is None:
                    return self._read_plans(job)
                found.append(kept)
        return found or [self._ledger.plan(job)]  # which raises, and names the nearest

    def plan(self, job: str, run: str | None) -> Plan:
        """One run of a job, the only one where none is named. Raises UnknownJobError, RequestError."""
        plans = self.plans(job)
        if run is None and len(plans) == 1:
            return plans[0]
        named = next((plan for plan in plans if plan.run == run), None)
        if named is None:
            asked = f"has no run {run[:20]!r}" if run else f"has {len(plans)} runs"
            raise RequestError(f"{job} {asked}; say run={' or '.join(plan.run for plan in plans[-10:])}")
        return named

    def page(
        self,
        plans: Sequence[Plan],
        *,
        limit: int,
        after: tuple[str, int] | None = None,
        status: str | None = None,
    ) -> RowPage:
        """Return up to `limit` rows of a job's runs, the latest pass's of each image, that follow the run and index `after`.

        `status`: only such rows. May hold fewer than were asked for, even none, where it passed over many.
        """
        found: list[Shown] = []
        windows, read = WINDOWS, RECEIPTS
        runs = [plan.run for plan in plans]
        first = 0
        if after is not None:
            if after[0] not in runs:
                raise RequestError("the cursor names a run that the job has not; begin without one")
            first = runs.index(after[0])
        for plan in plans[first:]:
            start = after[1] + 1 if after is not None and after[0] == plan.run else 0
            window = WINDOW if status else min(limit, WINDOW)
            while start < plan.images:
                stop = min(start + window, plan.images)
                rows, receipts = self._between(plan, start, stop)
                fitting = [row for row in rows if status in (None, row.status)][: limit - len(found)]
                found += [Shown(plan, row) for row in fitting]
                windows, read, start = windows - 1, read - receipts, stop
                if len(found) >= limit:
                    return RowPage(tuple(found), (plan.run, found[-1].row.index))
                if windows <= 0 or read <= 0:
                    return RowPage(tuple(found), (plan.run, stop - 1))
                window = WINDOW if not receipts else window
        return RowPage(tuple(found), None)

    def row(self, plan: Plan, index: int) -> ImageRow | None:
        """The row of one image, None where it has none yet."""
        if not 0 <= index < plan.images:
            raise RequestError(f"{plan.job} has images 0 to {plan.images - 1}, not {index}")
        rows, _ = self._between(plan, index, index + 1)
        return rows[0] if rows else None

    def landed(self, plans: Sequence[Plan], position: Position, *, most: int, fresh: bool = False) -> list[Landed]:
        """Return shards that are done and that `position` has not seen, oldest passes first; at most `most`.

        `fresh`: as they are now, not a moment ago.
        """
        found: list[Landed] = []
        for plan in position.ahead(plans):
            latest = self._ledger.passes(plan)
            for number in range(min(position.pass_of(plan.run), latest), latest + 1):
                # A later pass opens when all of this one is done, so what was listed before that is not all.
                done = self.done(plan, number, all_done=fresh or number < latest)
                unseen = position.unseen(plan.run, number, done, most=most - len(found))
                found += [Landed(plan.run, number, shard) for shard in unseen]
                if len(found) >= most:
                    return found
        return found

    def receipt(self, plan: Plan, number: int, shard: int) -> Receipt:
        """One receipt. Raises ObjectMissingError, RecordError."""
        key = f"{plan.job}/{plan.run}", number, shard
        kept = self._receipts.get(key)
        if kept is None:
            kept = self._ledger.receipt(plan, number, shard)
            self._receipts.put(key, kept)
        return kept

    def done(self, plan: Plan, number: int, *, all_done: bool = False) -> npt.NDArray[np.bool_]:
        """Which shards of a pass are done, a moment old. `all_done`: all must be by now, so it is looked again if not."""
        key = f"{plan.job}/{plan.run}", number
        kept, begun = self._done.get(key), self._clock()
        if kept is not None and (kept[1].all() or (begun < kept[0] and not all_done)):
            return kept[1]
        done = self._ledger.done_shards(plan, number)
        ended = self._clock()
        self._done.put(key, (ended + max(DONE_S, 10 * (ended - begun)), done))
        return done

    def _between(self, plan: Plan, start: int, stop: int) -> tuple[list[ImageRow], int]:
        """The rows of images `start` to `stop`, in order, and how many receipts were looked into."""
        wanted = np.arange(start, stop, dtype=np.int64)
        found: dict[int, ImageRow] = {}
        receipts = 0
        for number in range(self._ledger.passes(plan), 0, -1):
            if not len(wanted):
                break
            places = self._ledger.selection(plan, number).places(wanted)
            done = self.done(plan, number)
            shards = [int(shard) for shard in np.unique(places[places >= 0] // plan.pass_shard_images(number))]
            shards = [shard for shard in shards if done[shard]]
            receipts += len(shards)
            if not shards:
                continue
            for receipt in in_order(lambda shard: self.receipt(plan, number, shard), shards, threads=8):  # noqa: B023
                found |= {
                    row.index: row for row in receipt.rows if start <= row.index < stop and row.index not in found
                }
            wanted = np.array([index for index in wanted.tolist() if index not in found], dtype=np.int64)
        return [found[index] for index in sorted(found)], receipts

    def _read_plans(self, job: str) -> list[Plan]:
        """Read a job's plans, and keep those that did not change meanwhile."""
        prefix = plan_key(job, 0).removesuffix("0000.json")
        before = {info.key: info.etag for info in self._ledger.store.list(prefix)}
        try:
            plans = self._ledger.plans(job)
        except ObjectMissingError:  # deleted between the listing and the reading
            plans = []
        for number, plan in enumerate(plans, start=1):
            key = plan_key(job, number)
            if key in before:
                self._plans.put(f"{key} {before[key]}", plan)
        return plans or [self._ledger.plan(job)]


class _Recent(Generic[_Key, _Value]):
    """What was asked for last, up to a sum of weights; each weighs 1 where no weight is given."""

    def __init__(self, most: int, weight: Callable[[_Value], int] = lambda value: 1):
        self._most = most
        self._weight = weight
        self._total = 0
        self._kept: OrderedDict[_Key, _Value] = OrderedDict()
        self._lock = Lock()

    def get(self, key: _Key) -> _Value | None:
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
            return self._kept.get(key)

    def put(self, key: _Key, value: _Value) -> None:
        with self._lock:
            before = self._kept.pop(key, None)
            self._total += self._weight(value) - (0 if before is None else self._weight(before))
            self._kept[key] = value
            while self._total > self._most and len(self._kept) > 1:
                _, oldest = self._kept.popitem(last=False)
                self._total -= self._weight(oldest)
