"""Jobs of a ledger, newest first, a page at a time.

The store lists names only, so when each was planned is read once and kept: a moment that never changes. Blocks, safe with
threads.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

from farm.errors import ObjectMissingError, RecordError, RequestError, UnknownJobError
from farm.jobkeys import plan_key
from farm.ledger import Ledger
from farm.plan import Plan
from farm.prefetch import in_order
from farm.status import JobStatus, job_status

THREADS = 8
SCANNED = 500
"""Jobs looked at for one page at most, whatever it looks for; the next page goes on from there."""


@dataclass(frozen=True, slots=True)
class DamagedJob:
    """A job one of whose records cannot be read; the others are listed all the same."""

    job: str
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class JobPage:
    """Some jobs. `after`: what to ask for next, None where this was all. May hold fewer than were asked for, even none."""

    jobs: tuple[JobStatus, ...]
    damaged: tuple[DamagedJob, ...]
    after: str | None


class JobList:
    """The jobs of one ledger."""

    def __init__(self, ledger: Ledger):
        self._ledger = ledger
        self._created: dict[str, str] = {}

    def page(
        self, *, limit: int, after: str | None = None, wanted: Callable[[JobStatus], bool] = lambda job: True
    ) -> JobPage:
        """Return up to `limit` jobs that are wanted, those that follow `after`. Raises RequestError where it is no cursor."""
        begin = _cursor(after) if after is not None else None
        places = [place for place in self._places() if begin is None or place < begin]
        jobs: list[JobStatus] = []
        damaged: list[DamagedJob] = []
        last: tuple[str, str] | None = None
        scanned: Iterator[tuple[str, str]] = islice(places, SCANNED)
        with closing(in_order(self._look, scanned, threads=THREADS, in_hand=1)) as looked:
            for place, found in looked:
                last = place
                if isinstance(found, DamagedJob):
                    damaged.append(found)
                elif found is not None and wanted(found):
                    jobs.append(found)
                if len(jobs) + len(damaged) >= limit:
                    break
        more = last is not None and last != places[-1]
        return JobPage(tuple(jobs), tuple(damaged), f"{last[0]}~{last[1]}" if last and more else None)

    def _places(self) -> list[tuple[str, str]]:
        """When each job was planned, and its name; newest first."""
        names = self._ledger.jobs()
        for name in self._created.keys() - set(names):
            self._created.pop(name, None)
        new = [name for name in names if name not in self._created]
        for name, created in in_order(self._read_created, new, threads=THREADS):
            if created is not None:
                self._created[name] = created
        return sorted(((self._created[name], name) for name in names if name in self._created), reverse=True)

    def _read_created(self, name: str) -> tuple[str, str | None]:
        try:
            return name, Plan.model_validate_json(self._ledger.store.get(plan_key(name, 1))).created_at
        except ObjectMissingError:  # a submission that has not come to its plan yet, or never did
            return name, None
        except (RecordError, ValueError):
            return name, ""  # shown last, as damaged

    def _look(self, place: tuple[str, str]) -> tuple[tuple[str, str], JobStatus | DamagedJob | None]:
        try:
            return place, job_status(self._ledger, place[1])
        except (UnknownJobError, ObjectMissingError):  # deleted meanwhile
            return place, None
        except RecordError as exc:
            return place, DamagedJob(place[1], exc.code, exc.message)


def _cursor(text: str) -> tuple[str, str]:
    created, mark, name = text.partition("~")
    if not mark:
        raise RequestError(f"cursor {text[:40]!r} is none that this farm gave; begin without one", "cursor")
    return created, name
