"""Jobs of a simulated farm, and what its bucket holds of them.

The same keys and rules as `farm/ledger.py` and `farm/rebuild.py`, without the bytes: a receipt is the renderer that wrote
it and a row per image.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from farm.bitmap import Bitmap
from farm.passes import Others, pilot_indexes
from farm.records import Control, Standing, standing
from farm.run import JobView, RunEntry
from farm.simulation.store import Store

GPU_STAGES = ("load", "encode", "denoise", "decode")


@dataclass(frozen=True, slots=True)
class SimRun:
    """A run: `poison` images end their renderer, `bad` ones fail as they are drawn. `step_s`: seconds of one image."""

    job: str
    run: str
    model: str
    images: int
    shard_images: int
    batch: int
    image_s: float
    created_at: str
    pilot: int = 0
    measured: bool = False
    poison: frozenset[int] = frozenset()
    bad: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class SimJob:
    """A manifest. `finish_by` is in Unix seconds."""

    name: str
    owner: str
    priority: int
    runs: tuple[SimRun, ...]
    max_images: int | None = None
    max_gpu_s: float | None = None
    finish_by: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class SimReceipt:
    """A receipt: `rows[i]` tells whether the shard's image `i` is ok."""

    renderer: str
    indexes: Sequence[int]
    rows: tuple[bool, ...]
    seconds: dict[str, float] = field(default_factory=dict)


class Books:
    """The bucket as a ledger. Everything here looks at one instant; who reads over time calls several of these."""

    def __init__(self, store: Store):
        self.store = store

    def job(self, name: str) -> SimJob | None:
        """The plan, None where there is none or a tombstone lies on it."""
        if ("deleted", name) in self.store.objects:
            return None
        found: SimJob | None = self.store.get(("plan", name))
        return found

    def open_jobs(self) -> list[str]:
        return [key[1] for key in self.store.objects if key[0] == "open"]

    def controls(self, job: str) -> list[Control]:
        found: list[Control] = []
        for seq in range(1, 10_000):
            control: Any = self.store.get(("control", job, seq))
            if control is None:
                return found
            found.append(control)
        return found

    def standing(self, job: str) -> Standing:
        return standing(self.controls(job))

    def passes(self, run: SimRun) -> int:
        number = 1
        while ("pass", run.run, number + 1) in self.store.objects:
            number += 1
        return number

    def indexes(self, run: SimRun, number: int) -> Sequence[int]:
        """The images of a pass, ascending."""
        if number == 1:
            return _pilot(run.images, run.pilot) if run.pilot else range(run.images)
        listed: tuple[int, ...] = self.store.get(("pass", run.run, number))
        if listed:
            return listed
        return _others(run.images, run.pilot)

    def shard_indexes(self, run: SimRun, number: int, shard: int) -> Sequence[int]:
        return self.indexes(run, number)[shard * run.shard_images : (shard + 1) * run.shard_images]

    def shards(self, run: SimRun, number: int) -> int:
        return -(-len(self.indexes(run, number)) // run.shard_images)

    def receipt(self, run: str, number: int, shard: int) -> SimReceipt | None:
        found: SimReceipt | None = self.store.get(("receipt", run, number, shard))
        return found

    def receipts(self, run: SimRun) -> Iterator[SimReceipt]:
        """Receipts of all passes, later passes last."""
        for number in range(1, self.passes(run) + 1):
            for shard in range(self.shards(run, number)):
                found = self.receipt(run.run, number, shard)
                if found is not None:
                    yield found

    def rows(self, run: SimRun) -> dict[int, bool]:
        """Whether each image that has a row is ok: the latest pass's row counts."""
        found: dict[int, bool] = {}
        for receipt in self.receipts(run):
            found.update(zip(receipt.indexes, receipt.rows, strict=True))
        return found

    def closed(self, run: SimRun, number: int) -> bool:
        """Whether a pass has its totals."""
        return ("totals", run.run, number) in self.store.objects

    def finished(self, job: SimJob) -> bool:
        """Whether every run's latest pass is closed and no pilot's rest is left."""
        for run in job.runs:
            number = self.passes(run)
            if not self.closed(run, number) or (run.pilot and number == 1):
                return False
        return True

    def view(self, name: str, said: Standing) -> JobView:
        """What a dispatcher needs to know, as `farm.rebuild.read_job`: opens an approved pilot's rest, closes what is done."""
        job = self.job(name)
        if job is None:
            return JobView(name, state="deleted")
        entries, awaits = [], False
        for run in job.runs:
            number = self.passes(run)
            if self.closed(run, number) and run.pilot and number == 1:
                if not said.approved:
                    awaits = True
                    continue
                self.store.create(("pass", run.run, 2), ())
                number = 2
            if not self.closed(run, number):
                entries.append(self._entry(job, run, number))
        if not entries and not awaits:
            self.store.objects.pop(("open", name), None)
        limits = (said.max_images or job.max_images, said.gpu_hours, job.max_gpu_s)
        before = [receipt for run in job.runs for receipt in self.receipts(run)] if any(limits) else []
        return JobView(
            job=name,
            owner=job.owner,
            priority=job.priority if said.priority is None else said.priority,
            state=said.state,
            awaits_approval=awaits and not entries,
            max_images=said.max_images or job.max_images,
            max_gpu_s=said.gpu_hours * 3600 if said.gpu_hours else job.max_gpu_s,
            finish_by=job.finish_by,
            images_before=sum(len(receipt.rows) for receipt in before),
            gpu_s_before=sum(receipt.seconds.get(stage, 0.0) for receipt in before for stage in GPU_STAGES),
            runs=tuple(entries),
        )

    def _entry(self, job: SimJob, run: SimRun, number: int) -> RunEntry:
        indexes = self.indexes(run, number)
        shards = self.shards(run, number)
        there = [("receipt", run.run, number, shard) in self.store.objects for shard in range(shards)]
        return RunEntry(
            job=job.name,
            run=run.run,
            model=run.model,
            pass_number=number,
            images=len(indexes),
            shard_images=run.shard_images,
            created_at=run.created_at,
            done=Bitmap.of(np.array(there, dtype=np.bool_)),
            seconds_per_image=run.image_s if run.measured else None,
        )


@lru_cache(maxsize=256)
def _pilot(images: int, pilot: int) -> Sequence[int]:
    found: list[int] = pilot_indexes(images, pilot).tolist()
    return found


@lru_cache(maxsize=256)
def _others(images: int, pilot: int) -> Sequence[int]:
    return Others(images, pilot_indexes(images, pilot)).part(0, images - pilot)
