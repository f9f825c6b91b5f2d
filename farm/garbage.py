"""Remove what nothing can point at any more, or is past its time: orphans of closed passes, runs without a plan, what
died half-way, images of the endpoint that were kept long enough.

Pictures go by what the receipts say, and time has no part in that: no receipt of a closed pass is ever written again. What
has no plan may still get one, so it goes by age, told by the store's own clock alone. A run with an open pass is not
touched, nor is anything whose name is none of ours. Memory is flat.
"""

import heapq
import io
import re
import uuid
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from farm.errors import ObjectMissingError, RecordError, StoreError, UnknownJobError
from farm.export import dataset_prefix, run_prefix
from farm.ledger import Ledger
from farm.moment import moment
from farm.plan import Plan
from farm.prefetch import in_order
from farm.removal import THREADS, Removed, delete_job, measure_job, remove_objects, runs_of
from farm.singles import Singles
from farm.storage.base import ObjectInfo, ObjectStore

GRACE_S = 24 * 3600.0
BLOCK_IMAGES = 1000  # a folder of pictures holds as many
PICTURES = ("images", "thumbnails")

Kind = Literal["pictures", "singles", "runs", "markers", "claims", "deleted jobs", "unfinished writes", "probes"]

_NAME = re.compile(r"\d{9}(?:_[A-Za-z0-9_-]+)?\.p(\d+)a\d+-[0-9a-f]{8}\.[a-z]+")


@dataclass(frozen=True, slots=True)
class Kept:
    """Something that could not be judged and is left as it is, with the reason."""

    what: str
    reason: str


@dataclass(slots=True)
class Garbage:
    """What was removed by kind, or would be, and what could not be judged."""

    removed: dict[Kind, Removed] = field(default_factory=dict)
    kept: list[Kept] = field(default_factory=list)

    @property
    def total(self) -> Removed:
        """The sum over all kinds."""
        return sum(self.removed.values(), Removed())

    def add(self, kind: Kind, removed: Removed) -> None:
        """Count something of a kind."""
        if removed.objects:
            self.removed[kind] = self.removed.get(kind, Removed()) + removed


def collect(
    ledger: Ledger,
    *,
    at: str,
    by: str,
    grace_s: float = GRACE_S,
    dry_run: bool = False,
    on_removed: Callable[[Removed], None] = lambda removed: None,
) -> Garbage:
    """Remove what nothing can point at, or with `dry_run` only count it; `at` is ISO 8601, UTC.

    Without a plan, or a renewal, things are kept for `grace_s` by the store's clock. A record that does not parse keeps
    what hangs on it. `on_removed` is told the sum so far. Raises StoreError.
    """
    garbage = Garbage()
    store = ledger.store
    if next(store.list(""), None) is None:
        return garbage
    found = _Collector(ledger, garbage, before=store_time(store) - grace_s, dry_run=dry_run, on_removed=on_removed)
    found.finish_deletes(at=at, by=by)
    conditional = store.probe().conditional_create
    for job in ledger.jobs():
        found.sweep_job(job, conditional=conditional)
    found.sweep_marks()
    found.sweep_singles(at=at)
    try:
        left = store.sweep(found.before, remove=not dry_run)
    except StoreError as exc:  # not allowed, or the server has no such thing
        garbage.kept.append(Kept("unfinished writes", exc.message))
    else:
        garbage.add("unfinished writes", Removed(left.count, left.size_bytes))
    return garbage


def store_time(store: ObjectStore) -> float:
    """Return Unix seconds by the store's own clock: the time of an object written just now."""
    key = f"probe/{uuid.uuid4().hex}"
    store.put(key, b"")
    try:
        info = store.head(key)
        if info is None:
            raise ObjectMissingError(f"{store.url}/{key} was written, and is not there; see who deletes in probe/")
        return info.modified_at
    finally:
        store.delete(key)


class _Collector:
    """One call's way through the store. `before`: what was written later than that, by the store's clock, is young."""

    def __init__(
        self,
        ledger: Ledger,
        garbage: Garbage,
        *,
        before: float,
        dry_run: bool,
        on_removed: Callable[[Removed], None],
    ):
        self.before = before
        self._ledger = ledger
        self._store = ledger.store
        self._garbage = garbage
        self._dry_run = dry_run
        self._on_removed = on_removed

    def finish_deletes(self, *, at: str, by: str) -> None:
        """Go on with the deletes that somebody began."""
        for job in self._ledger.deleted_jobs():
            with suppress(UnknownJobError):  # another call has just ended it
                removed = (
                    measure_job(self._ledger, job)
                    if self._dry_run
                    else delete_job(self._ledger, job, at=at, by=by, stop_s=0.0)
                )
                self._count("deleted jobs", removed)

    def sweep_job(self, job: str, *, conditional: bool) -> None:
        """Remove a job's runs without a plan, and the orphans of its closed passes."""
        try:
            plans = self._ledger.plans(job)
            self._sweep_runs(job, {plan.run for plan in plans})
        except (RecordError, ObjectMissingError) as exc:
            self._garbage.kept.append(Kept(f"job {job}", exc.message))
            return
        for plan in plans:
            try:
                self._sweep_pictures(plan, conditional=conditional)
            except (RecordError, ObjectMissingError) as exc:
                self._garbage.kept.append(Kept(f"pictures of job {job}, run {plan.run}", exc.message))

    def sweep_marks(self) -> None:
        """Remove old marks of what is not there: `open/` without a plan, claims that nobody renews, probes."""
        for info in self._store.list("open/"):
            if self._is_old(info) and not self._has_plan(info.key.removeprefix("open/")):
                self._remove("markers", [info])
        self._remove("claims", (info for info in self._store.list("claims/") if self._is_old(info)))
        self._remove("probes", (info for info in self._store.list("probe/") if self._is_old(info)))

    def sweep_singles(self, *, at: str) -> None:
        """Remove images of the endpoint that are past their time."""
        swept = Singles(self._store).sweep(now=moment(at).timestamp(), before=self.before, remove=not self._dry_run)
        self._count("singles", swept.removed)
        self._garbage.kept += [Kept(f"image {key}", reason) for key, reason in swept.kept]

    def _sweep_runs(self, job: str, planned: set[str]) -> None:
        folders = [f"jobs/{job}/{run}/" for run in runs_of(self._store, job) if run not in planned]
        if not planned:
            folders.append(f"jobs/{job}/control/")
        mark = self._store.head(f"open/{job}")
        for folder in folders:
            # A submission writes the plan last and the mark just before it: while either is young, one may be under way.
            if mark is not None and not self._is_old(mark):
                continue
            if all(self._is_old(info) for info in self._store.list(folder)) and not self._planned_since(job, planned):
                self._remove("runs", self._store.list(folder))

    def _planned_since(self, job: str, planned: set[str]) -> bool:
        return {plan.run for plan in self._ledger.plans(job)} != planned

    def _sweep_pictures(self, plan: Plan, *, conditional: bool) -> None:
        """Remove pictures of a run's closed passes that no row points at. Raises RecordError."""
        ledger = self._ledger
        last = ledger.passes(plan)
        if not ledger.closed(plan, last):
            return
        for number in range(1, last + 1):
            if not ledger.done_shards(plan, number).all():
                raise RecordError(f"pass {number} is closed and lacks receipts; farm verify {plan.job} says what to do")
        kinds = [kind for kind in PICTURES if next(self._store.list(f"{run_prefix(plan)}{kind}/"), None)]

        def orphans(block: tuple[int, set[str]]) -> Removed:
            number, pointed = block
            folders = [f"{run_prefix(plan)}{kind}/{number:06d}/" for kind in kinds]
            found = [
                info
                for folder in folders
                for info in self._store.list(folder)
                if info.key not in pointed
                and _pass_of(info.key) in range(1, last + 1)
                # Without conditional puts a twin may still put a receipt that points here in place of another.
                and (conditional or self._is_old(info))
            ]
            if not self._dry_run:
                self._store.delete_many(info.key for info in found)
            return Removed.of(found)

        with closing(_pointers(ledger, plan, last, dataset=not conditional)) as pointers:
            for removed in in_order(orphans, _blocks(plan, pointers), threads=THREADS):
                self._count("pictures", removed)

    def _is_old(self, info: ObjectInfo) -> bool:
        return 0 < info.modified_at < self.before

    def _has_plan(self, job: str) -> bool:
        return next(self._store.list(f"jobs/{job}/plans/"), None) is not None

    def _remove(self, kind: Kind, infos: Iterable[ObjectInfo]) -> None:
        self._count(kind, Removed.of(infos) if self._dry_run else remove_objects(self._store, infos))

    def _count(self, kind: Kind, removed: Removed) -> None:
        self._garbage.add(kind, removed)
        if removed.objects:
            self._on_removed(self._garbage.total)


def _pass_of(key: str) -> int:
    """The pass that a picture's name carries; 0 where it is no such name."""
    found = _NAME.fullmatch(key.rpartition("/")[2])
    return int(found[1]) if found else 0


_Pointer = tuple[int, Sequence[str | None]]
"""An image's index, and the keys that one of its rows names."""


def _pointers(ledger: Ledger, plan: Plan, passes: int, *, dataset: bool) -> Generator[_Pointer, None, None]:
    """Yield what every row of every pass points at, and with `dataset` its rows too, in index order."""

    def of_pass(number: int) -> Generator[_Pointer, None, None]:
        with closing(ledger.receipts(plan, number, threads=4)) as receipts:
            for receipt in receipts:
                yield from ((row.index, (row.object, row.thumbnail)) for row in receipt.rows)

    def of_dataset() -> Generator[_Pointer, None, None]:
        for info in ledger.store.list(dataset_prefix(plan)):
            try:
                part = pq.ParquetFile(io.BytesIO(ledger.store.get(info.key)))
                for batch in part.iter_batches(columns=["index", "object", "thumbnail"]):
                    columns = [batch.column(name).to_pylist() for name in ("index", "object", "thumbnail")]
                    yield from ((index, keys) for index, *keys in zip(*columns, strict=True))
            except (pa.ArrowException, KeyError, ValueError) as exc:
                raise RecordError(f"{info.key} does not read as the dataset ({exc}); farm verify --rewrite") from exc

    makers = [partial(of_pass, number) for number in range(1, passes + 1)] + ([of_dataset] if dataset else [])
    with ExitStack() as stack:
        streams = [stack.enter_context(closing(make())) for make in makers]
        yield from heapq.merge(*streams, key=lambda pointer: pointer[0])


def _blocks(plan: Plan, pointers: Iterator[_Pointer]) -> Iterator[tuple[int, set[str]]]:
    """Group the keys by the folder that they lie in. Raises RecordError where one lies elsewhere."""
    for number, some in groupby(pointers, key=lambda pointer: pointer[0] // BLOCK_IMAGES):
        keys = {key for _, named in some for key in named if key is not None}
        folders = tuple(f"{run_prefix(plan)}{kind}/{number:06d}/" for kind in PICTURES)
        astray = next((key for key in keys if not key.startswith(folders)), None)
        if astray is not None:
            raise RecordError(f"a row of images {number * BLOCK_IMAGES} and on names {astray}, which lies elsewhere")
        yield number, keys
