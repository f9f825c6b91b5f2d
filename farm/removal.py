"""Delete a job: a tombstone first, then every object of it, the tombstone last.

From the tombstone on nobody sees the job. Killed anywhere, the same call goes on where it stopped. What a farm that did
not hear of it in time still writes lies under the old run's random name, where no later job of that name ever looks;
`farm.garbage` finds it. What a person says to the job too late is taken back by `Ledger.append_control`, or else by the
submission of the next job of that name.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

from farm.errors import UnknownJobError
from farm.ledger import Ledger
from farm.prefetch import in_order
from farm.records import Tombstone
from farm.storage.base import ObjectInfo, ObjectStore

THREADS = 8
BATCH = 1000
STOP_S = 5.0
"""For so long a farm that holds the job's claim may take to let go of it before its objects are removed all the same."""
LOOK_S = 0.2
ROUNDS = 5
"""How often what was written meanwhile is removed too, before it is left to `farm gc`."""


@dataclass(frozen=True, slots=True)
class Removed:
    """How many objects, and their bytes."""

    objects: int = 0
    size_bytes: int = 0

    def __add__(self, other: "Removed") -> "Removed":
        return Removed(self.objects + other.objects, self.size_bytes + other.size_bytes)

    @classmethod
    def of(cls, infos: Iterable[ObjectInfo]) -> "Removed":
        """Count objects."""
        total = cls()
        for info in infos:
            total += cls(1, info.size_bytes)
        return total


class _EndedByAnotherError(Exception):
    """Raised where the tombstone is no longer the one that was seen: the job is gone, its name perhaps in use again."""


def find_job(ledger: Ledger, job: str) -> None:
    """Raise UnknownJobError where nothing in the store has this job's name."""
    store = ledger.store
    if "/" in job or job in ("", ".", "..") or "\0" in job:
        ledger.plan(job)
        raise UnknownJobError(f"{job!r} is no job's name; see `farm status`")
    if store.head(tombstone_key(job)) or store.head(f"open/{job}") or next(store.list(f"jobs/{job}/"), None):
        return
    ledger.plan(job)


def measure_job(ledger: Ledger, job: str) -> Removed:
    """Count what deleting the job would remove. Raises UnknownJobError."""
    find_job(ledger, job)
    return Removed.of(ledger.store.list(f"jobs/{job}/"))


def delete_job(
    ledger: Ledger,
    job: str,
    *,
    at: str,
    by: str,
    stop_s: float = STOP_S,
    sleep: Callable[[float], None] = time.sleep,
    on_removed: Callable[[Removed], None] = lambda removed: None,
) -> Removed:
    """Remove a job and all its objects, or go on with that; `at` is ISO 8601, UTC. Returns what this call removed.

    `on_removed` is told the sum so far. Raises UnknownJobError where nothing of the job is left, StoreError.
    """
    store = ledger.store
    find_job(ledger, job)
    key = tombstone_key(job)
    stone = Tombstone(job=job, at=at, by=by, runs=tuple(sorted(runs_of(store, job))))
    store.create(key, stone.model_dump_json().encode(), content_type="application/json")
    seen = store.head(key)
    if seen is None:
        return Removed()  # another call ended it just now
    _let_go(store, job, stop_s=stop_s, sleep=sleep)
    removed = Removed()
    try:
        for _ in range(ROUNDS):
            before = removed
            for prefix in _prefixes(job):
                for some in _remove(store, store.list(prefix), lambda: _still(store, seen)):
                    removed += some
                    on_removed(removed)
            if removed == before:
                break
        _still(store, seen)
        for rest in (f"open/{job}", f"claims/{job}", key):
            store.delete(rest)
    except _EndedByAnotherError:
        pass
    return removed


def remove_objects(store: ObjectStore, infos: Iterable[ObjectInfo]) -> Removed:
    """Remove a stream of objects, many at a time, and count them. Memory is flat."""
    return sum(_remove(store, infos, lambda: None), Removed())


def tombstone_key(job: str) -> str:
    """Return the key whose presence says that the job is being deleted."""
    return f"deleted/{job}"


def runs_of(store: ObjectStore, job: str) -> list[str]:
    """Names of the runs that have objects, whether a plan names them or not."""
    return [name for name in store.folders(f"jobs/{job}/") if is_run(name)]


def is_run(name: str) -> bool:
    """Whether a folder of a job has the name of a run: 8 hex digits."""
    return len(name) == 8 and all(letter in "0123456789abcdef" for letter in name)


def _prefixes(job: str) -> tuple[str, ...]:
    """In this order: without plans and controls a farm too old to know tombstones sees no job either."""
    return f"jobs/{job}/plans/", f"jobs/{job}/control/", f"jobs/{job}/"


def _let_go(store: ObjectStore, job: str, *, stop_s: float, sleep: Callable[[float], None]) -> None:
    """Wait until the farm at work on the job, if there is one, has let go of its claim."""
    waited = 0.0
    while waited < stop_s and store.head(f"claims/{job}") is not None:
        sleep(LOOK_S)
        waited += LOOK_S


def _still(store: ObjectStore, seen: ObjectInfo) -> None:
    now = store.head(seen.key)
    if now is None or now.etag != seen.etag:
        raise _EndedByAnotherError


def _remove(store: ObjectStore, infos: Iterable[ObjectInfo], check: Callable[[], None]) -> Iterator[Removed]:
    def remove(some: list[ObjectInfo]) -> Removed:
        check()
        store.delete_many(info.key for info in some)
        return Removed.of(some)

    return in_order(remove, _batches(infos), threads=THREADS)


def _batches(infos: Iterable[ObjectInfo]) -> Iterator[list[ObjectInfo]]:
    stream = iter(infos)
    while some := list(islice(stream, BATCH)):
        yield some
