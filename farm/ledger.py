"""Jobs, runs, plans, controls, passes and receipts as objects of one store.

Owns every key below `jobs/`, `open/` and `profiles/` except the pictures themselves. Knows nothing of leases.
Invariants: a shard is done if and only if its receipt exists; plans, controls, passes and receipts are created once and
never changed, but a control goes again where its job was deleted meanwhile; pass n + 1 opens only after the totals of
pass n are written; a job with a tombstone under `deleted/` has no plan for anybody.
"""

import difflib
import heapq
import io
import logging
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ValidationError

from farm.cardparts import PLAIN, Acceleration
from farm.errors import ControlError, NewerVersionError, ObjectMissingError, RecordError, StoreError, UnknownJobError
from farm.jobkeys import (
    failure_key,
    is_job_name,
    number_in,
    plan_key,
    profile_key,
    profile_prefix,
    receipt_key,
    run_key,
)
from farm.passes import Everything, Indexes, Listed, Others, Selection, images_of_shards, pilot_indexes
from farm.plan import Plan
from farm.prefetch import in_order
from farm.receipt import ImageRow, Receipt
from farm.records import Action, Control, Profile, Totals
from farm.storage.base import ObjectStore

__all__ = ["Control", "Indexes", "Ledger", "Profile", "Totals"]

_log = logging.getLogger(__name__)

_CREATE_TRIES = 1000
_JSON = "application/json"
_PARQUET = "application/vnd.apache.parquet"
_NO_INDEXES: Indexes = np.empty(0, dtype=np.int64)

_Model = TypeVar("_Model", bound=BaseModel)


class Ledger:
    """The farm's memory. Blocks, safe with threads, and goes to another process as its store does."""

    def __init__(self, store: ObjectStore):
        self.store = store
        self._last_pass: tuple[str, Indexes] | None = None

    def jobs(self) -> list[str]:
        """Names of all jobs, in order."""
        going = set(self.deleted_jobs())
        return [job for job in self.store.folders("jobs/") if job not in going]

    def deleted(self, job: str) -> bool:
        """Whether the job is being deleted: it has a tombstone, and what is left of it is swept."""
        return is_job_name(job) and self.store.head(f"deleted/{job}") is not None

    def deleted_jobs(self) -> list[str]:
        """Names of the jobs with a tombstone, in order."""
        return [info.key.removeprefix("deleted/") for info in self.store.list("deleted/")]

    def open_jobs(self) -> list[str]:
        """Names of the jobs marked unfinished, in order."""
        return [info.key.removeprefix("open/") for info in self.store.list("open/")]

    def open(self, job: str) -> None:
        """Mark the job unfinished; comes before its plan."""
        self.store.put(f"open/{job}", b"")

    def close(self, job: str) -> None:
        """Take the mark away; comes after its totals."""
        self.store.delete(f"open/{job}")

    def plans(self, job: str) -> list[Plan]:
        """All runs of the job, oldest first; empty where there is no such job, or it was deleted. Raises RecordError."""
        if not is_job_name(job) or self.deleted(job):
            return []
        keys = [plan_key(job, number) for number in self._numbers(f"jobs/{job}/plans/", ".json")]
        return [_parsed(Plan, self.store.get(key), self._where(key)) for key in keys]

    def plan(self, job: str) -> Plan:
        """The job's newest run. Raises UnknownJobError, RecordError."""
        plans = self.plans(job)
        if plans:
            return plans[-1]
        if self.deleted(job):
            raise UnknownJobError(
                f"job {job!r} in {self.store.url} is being deleted; run farm delete {job} again, which ends it"
            )
        near = difflib.get_close_matches(job, names := self.jobs(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {len(names)} jobs; see `farm status`"
        raise UnknownJobError(f"no job {job!r} in {self.store.url}; {hint}")

    def create_plan(self, plan: Plan, number: int) -> bool:
        """Write the job's plan `number` (1, 2, …); False when there is one of that number."""
        return self.store.create(plan_key(plan.job, number), plan.model_dump_json().encode(), content_type=_JSON)

    def put_prompt_part(self, job: str, run: str, n: int, data: bytes) -> None:
        self.store.put(f"jobs/{job}/{run}/prompts/part-{n:05d}.parquet", data, content_type=_PARQUET)

    def prompt_part(self, plan: Plan, n: int) -> bytes:
        return self.store.get(run_key(plan, f"prompts/part-{n:05d}.parquet"))

    def append_control(
        self,
        job: str,
        action: Action,
        *,
        at: str,
        by: str,
        run: str | None = None,
        priority: int | None = None,
        max_images: int | None = None,
        gpu_hours: float | None = None,
        finish_by: str | None = None,
    ) -> Control:
        """Write what somebody says to the job under the next number; it holds once this returns.

        The values are those of a `change`; None leaves one as it is. Whether it can be said is `farm.controls`' affair.
        `run`: the job's first one, as who speaks saw it. Where the job was deleted since, and perhaps made anew, the word is
        taken back and ControlError raised; without it a word may wait for a later job of that name. On a store without
        conditional puts a word is lost where another's, begun before it was there, is written after it was read back.
        """
        first = self.last_control(job) + 1
        for seq in range(first, first + _CREATE_TRIES):
            control = Control(
                seq=seq,
                action=action,
                at=at,
                by=by,
                priority=priority,
                max_images=max_images,
                gpu_hours=gpu_hours,
                finish_by=finish_by,
            )
            key, data = f"jobs/{job}/control/{seq:06d}.json", control.model_dump_json().encode()
            if self._create(key, data, content_type=_JSON):
                if run is None or self._begins_with(job, run):
                    return control
                if self._stored(key) == data:
                    self.store.delete(key)
                raise ControlError(
                    f"{job} was deleted meanwhile, so {action} was taken back; see farm status, and say it again if it is "
                    "meant for a new job of that name"
                )
        raise StoreError(f"{self.store.url}: {_CREATE_TRIES} controls of {job} were taken in a row; try again")

    def controls(self, job: str) -> list[Control]:
        """All that was said to the job, in order. Raises RecordError."""
        keys = [f"jobs/{job}/control/{seq:06d}.json" for seq in self._numbers(f"jobs/{job}/control/", ".json")]
        return [_parsed(Control, self.store.get(key), self._where(key)) for key in keys]

    def last_control(self, job: str) -> int:
        """Number of what was said last, from one listing; 0 where nothing was."""
        return max(self._numbers(f"jobs/{job}/control/", ".json"), default=0)

    def passes(self, plan: Plan) -> int:
        """Number of the latest pass that is open or was; 1 from the start."""
        return max(self._numbers(run_key(plan, "passes/"), ".npy"), default=1)

    def open_pass(self, plan: Plan, number: int, indexes: Indexes | None) -> bool:
        """Open pass `number` over `indexes`, ascending; False when that pass is there already, as another opened it.

        None: over all that the pilot left out where that is still to do, else over every image again. Raises ControlError
        when the pass before it is not closed yet, the pilot's others come first, or there is nothing to do. On a store
        without conditional puts another's list, begun before this one was there, may still replace it after this returned.
        """
        latest = self.passes(plan)
        if number <= latest:
            return False
        if number != latest + 1 or not self.closed(plan, latest):
            raise ControlError(
                f"pass {number} of job {plan.job} cannot open while pass {latest} is unfinished; let the job end first"
            )
        if indexes is None:
            indexes = _NO_INDEXES
        elif self.covered(plan, latest) < plan.images:
            raise ControlError(
                f"pass {number} of job {plan.job} is for the {plan.images - self.covered(plan, latest)} images that its "
                "pilot left out; approve the pilot first"
            )
        else:
            indexes = np.asarray(indexes, dtype=np.int64)
            if indexes.ndim != 1 or not len(indexes):
                raise ControlError(f"pass {number} of job {plan.job} would be empty; there is nothing to render again")
            if indexes[0] < 0 or indexes[-1] >= plan.images or not (np.diff(indexes) > 0).all():
                raise ControlError(
                    f"pass {number} of job {plan.job} needs ascending image indexes below {plan.images}, each once; "
                    "take them from failed_indexes"
                )
        sink = io.BytesIO()
        np.save(sink, indexes, allow_pickle=False)
        return self._create(run_key(plan, f"passes/{number:04d}.npy"), sink.getvalue())

    def selection(self, plan: Plan, number: int) -> Selection:
        """Which images pass `number` is over. Raises RecordError."""
        if number == 1:
            return Everything(plan.images) if plan.pilot is None else Listed(pilot_indexes(plan.images, plan.pilot))
        indexes = self._stored_pass(plan, number)
        if len(indexes):
            return Listed(indexes)
        if number == 2 and plan.pilot is not None:
            return Others(plan.images, pilot_indexes(plan.images, plan.pilot))
        return Everything(plan.images)

    def pass_images(self, plan: Plan, number: int) -> int:
        """How many images pass `number` has."""
        return self.selection(plan, number).images

    def covered(self, plan: Plan, number: int) -> int:
        """How many images have been in some pass up to `number`: in the pilot's pass only its own."""
        return plan.pilot if plan.pilot is not None and number == 1 else plan.images

    def covered_indexes(self, plan: Plan, number: int) -> Sequence[int]:
        """The images that `covered` counts, ascending."""
        found = self.selection(plan, 1) if number == 1 else Everything(plan.images)
        return found.part(0, found.images)

    def left_out(self, plan: Plan) -> int:
        """How many images wait until the pilot is approved; 0 without one, and from then on."""
        return plan.images - self.covered(plan, self.passes(plan))

    def pass_shards(self, plan: Plan, number: int) -> int:
        """How many shards pass `number` has."""
        return -(-self.pass_images(plan, number) // plan.pass_shard_images(number))

    def shard_indexes(self, plan: Plan, pass_number: int, shard: int) -> Sequence[int]:
        """The images of one shard, ascending."""
        if not 0 <= shard < self.pass_shards(plan, pass_number):
            raise RecordError(f"job {plan.job} has no shard {shard} in pass {pass_number}; see what asked for it")
        size = plan.pass_shard_images(pass_number)
        return self.selection(plan, pass_number).part(shard * size, (shard + 1) * size)

    def commit(self, plan: Plan, receipt: Receipt) -> bool:
        """Write the receipt, rows in index order; False when another's was first, which is as good.

        Every object that it points at must be stored before. Raises RecordError when its rows are not the shard's.
        """
        receipt = replace(receipt, rows=tuple(sorted(receipt.rows, key=lambda row: row.index)))
        expected = self.shard_indexes(plan, receipt.pass_number, receipt.shard)
        where = f"receipt of job {plan.job}, pass {receipt.pass_number}, shard {receipt.shard}"
        if (receipt.job, receipt.run) != (plan.job, plan.run):
            raise RecordError(f"{where}: names run {receipt.run} of job {receipt.job}, the plan is run {plan.run}")
        if [row.index for row in receipt.rows] != list(expected):
            raise RecordError(
                f"{where}: has {len(receipt.rows)} rows, which are not the shard's {len(expected)} images"
            )
        if receipt.failed:
            self.store.put(failure_key(plan, receipt.pass_number, receipt.shard), b"")
        key = receipt_key(plan, receipt.pass_number, receipt.shard)
        return self.store.create(key, receipt.to_parquet(), content_type=_PARQUET)

    def receipt(self, plan: Plan, pass_number: int, shard: int) -> Receipt:
        """Read one receipt. Raises ObjectMissingError, RecordError."""
        key = receipt_key(plan, pass_number, shard)
        receipt = Receipt.from_parquet(self.store.get(key), self._where(key))
        if (receipt.run, receipt.pass_number, receipt.shard) != (plan.run, pass_number, shard):
            raise RecordError(
                f"{self._where(key)}: is the receipt of run {receipt.run}, pass {receipt.pass_number}, "
                f"shard {receipt.shard}; restore the right object, or delete it and start the job again"
            )
        return receipt

    def done_shards(self, plan: Plan, pass_number: int) -> npt.NDArray[np.bool_]:
        """Which shards of a pass have receipts, from one listing."""
        done = np.zeros(self.pass_shards(plan, pass_number), dtype=np.bool_)
        for shard in self._receipted(plan, pass_number):
            if shard >= len(done):
                raise RecordError(
                    f"{self._where(receipt_key(plan, pass_number, shard))}: pass {pass_number} has only "
                    f"{len(done)} shards; see what wrote it, and delete it"
                )
            done[shard] = True
        return done

    def rendered(self, plan: Plan, pass_number: int, done: npt.NDArray[np.bool_]) -> int:
        """How many images of a pass have a row, `done` being its `done_shards`."""
        size = plan.pass_shard_images(pass_number)
        return images_of_shards(done, images=self.pass_images(plan, pass_number), shard_images=size)

    def receipts(self, plan: Plan, pass_number: int, *, threads: int = 8) -> Generator[Receipt, None, None]:
        """Yield the receipts of a pass in shard order; at most `2 * threads` are read ahead."""
        shards = self._receipted(plan, pass_number)
        return in_order(partial(self.receipt, plan, pass_number), shards, threads=threads, in_hand=2)

    def rows(self, plan: Plan) -> Iterator[ImageRow]:
        """Yield a row per image that has one, in index order; of several passes' rows, the latest. Memory is flat."""
        with ExitStack() as stack:
            ordered = [
                stack.enter_context(closing(self._pass_rows(plan, number)))
                for number in range(1, self.passes(plan) + 1)
            ]
            last = -1
            for row in heapq.merge(*ordered, key=lambda row: (row.index, -row.pass_number)):
                if row.index != last:
                    last = row.index
                    yield row

    def failed_indexes(self, plan: Plan) -> Indexes:
        """Images whose latest row is a failed one, ascending; reads only the receipts that failure markers name."""
        failed = _NO_INDEXES
        for number in range(1, self.passes(plan) + 1):
            done = self.done_shards(plan, number)
            if len(failed):
                places = self.selection(plan, number).places(failed)
                failed = failed[(places < 0) | ~done[places // plan.pass_shard_images(number)]]
            marked = self.failed_shards(plan, number, done)
            read = in_order(partial(self.receipt, plan, number), marked, threads=8)
            found = [row.index for receipt in read for row in receipt.rows if row.status == "failed"]
            failed = np.union1d(failed, np.array(found, dtype=np.int64))
        return failed

    def failed_shards(self, plan: Plan, pass_number: int, done: npt.NDArray[np.bool_]) -> list[int]:
        """Shards of a pass that are done with a failed image, by their markers; `done` is its `done_shards`."""
        marked = self._numbers(run_key(plan, f"failures/{pass_number:04d}/"), "")
        return [shard for shard in marked if shard < len(done) and done[shard]]

    def put_totals(self, plan: Plan, pass_number: int, totals: Totals) -> None:
        """Close the pass."""
        key = run_key(plan, f"totals/{pass_number:04d}.json")
        self.store.put(key, totals.model_dump_json().encode(), content_type=_JSON)

    def closed(self, plan: Plan, pass_number: int) -> bool:
        """Whether the pass has totals."""
        return self.store.head(run_key(plan, f"totals/{pass_number:04d}.json")) is not None

    def finished(self, plan: Plan) -> bool:
        """Whether nothing of the run is left to render: its latest pass is closed, and it was not the pilot's."""
        number = self.passes(plan)
        return self.covered(plan, number) == plan.images and self.closed(plan, number)

    def totals(self, plan: Plan, pass_number: int | None = None) -> Totals | None:
        """What the job came to by the end of the pass (the latest where none is given); None while it is unfinished."""
        key = run_key(plan, f"totals/{pass_number or self.passes(plan):04d}.json")
        try:
            return _parsed(Totals, self.store.get(key), self._where(key))
        except ObjectMissingError:
            return None

    def put_profile(self, profile: Profile) -> None:
        """Write what was measured. A job's leaves the stages that a benchmark measured of the same model as they are."""
        key = profile_key(profile.model, profile.device, profile.acceleration)
        if profile.stages is None and (known := self._profile(key)) is not None and known.is_of(profile.identity):
            profile = profile.model_copy(update={"stages": known.stages})
        self.store.put(key, profile.model_dump_json().encode(), content_type=_JSON)

    def profile(self, model: str, device: str, acceleration: Acceleration = PLAIN) -> Profile | None:
        """What was measured last; None where nothing was. One that cannot be read is as good as none."""
        return self._profile(profile_key(model, device, acceleration))

    def profiles(self, model: str, acceleration: Acceleration = PLAIN) -> list[Profile]:
        """What was measured of a model on each kind of device; those that cannot be read are left out."""
        found = [self._profile(info.key) for info in self.store.list(profile_prefix(model))]
        return [profile for profile in found if profile is not None and profile.acceleration == acceleration]

    def _profile(self, key: str) -> Profile | None:
        try:
            return _parsed(Profile, self.store.get(key), self._where(key))
        except ObjectMissingError:
            return None
        except RecordError as exc:
            _log.warning("profile ignored; farm bench, or a job, measures anew", extra={"reason": exc.message})
            return None

    def _stored_pass(self, plan: Plan, number: int) -> Indexes:
        """The list of pass 2 or a later one; empty where it is no list."""
        key = run_key(plan, f"passes/{number:04d}.npy")
        kept = self._last_pass
        if kept is not None and kept[0] == key:
            return kept[1]
        try:
            indexes = np.load(io.BytesIO(self.store.get(key)), allow_pickle=False)
        except (ValueError, EOFError) as exc:
            raise RecordError(f"{self._where(key)}: not a list of image indexes ({exc}); restore the object") from exc
        if not isinstance(indexes, np.ndarray) or indexes.dtype != np.int64 or indexes.ndim != 1:
            raise RecordError(f"{self._where(key)}: not a list of image indexes; restore the object")
        indexes.setflags(write=False)
        self._last_pass = key, indexes
        return indexes

    def _pass_rows(self, plan: Plan, number: int) -> Generator[ImageRow, None, None]:
        with closing(self.receipts(plan, number, threads=4)) as receipts:
            for receipt in receipts:
                yield from receipt.rows

    def _receipted(self, plan: Plan, pass_number: int) -> Iterator[int]:
        return self._numbers(run_key(plan, f"receipts/{pass_number:04d}/"), ".parquet")

    def _numbers(self, prefix: str, suffix: str) -> Iterator[int]:
        """The numbers that name objects under `prefix`, ascending; what else lies there is none of ours."""
        for info in self.store.list(prefix):
            number = number_in(info.key.removeprefix(prefix), suffix)
            if number is not None:
                yield number

    def _create(self, key: str, data: bytes, *, content_type: str = "application/octet-stream") -> bool:
        """Create an object and read it back: without conditional puts two may both be told that they were first.

        One that is gone again was deleted with its job, and is nobody else's.
        """
        return self.store.create(key, data, content_type=content_type) and self._stored(key) in (data, None)

    def _stored(self, key: str) -> bytes | None:
        try:
            return self.store.get(key)
        except ObjectMissingError:
            return None

    def _begins_with(self, job: str, run: str) -> bool:
        """Whether the job is there, and the one whose first run this is."""
        try:
            return [plan.run for plan in self.plans(job)][:1] == [run]
        except ObjectMissingError:  # deleted between the listing and the reading of a plan
            return False

    def _where(self, key: str) -> str:
        return f"{self.store.url}/{key}"


def _parsed(model: type[_Model], data: bytes, where: str) -> _Model:
    try:
        return model.model_validate_json(data)
    except NewerVersionError as exc:
        raise NewerVersionError(f"{where}: {exc.message}") from exc
    except ValidationError as exc:
        first = exc.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "whole"
        raise RecordError(
            f"{where}: not a {model.__name__.lower()} ({field}: {first['msg']}); restore the object from a backup"
        ) from exc
