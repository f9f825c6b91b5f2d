"""Keep what the dispatch rules know of jobs as the store has it: markers, controls, tombstones, claims, passes.

Reads in threads, retries while the store is away, and never lets one job's trouble stop another's. One event loop owns it.
"""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, Protocol, TypeVar

from farm.claims import CLAIM_LOOK_S, CLAIM_RENEW_S, Claims, Hold
from farm.dispatch import Dispatch
from farm.errors import FarmError, StoreUnavailableError
from farm.intake import JOBS_KEPT
from farm.lease import Check
from farm.ledger import Ledger
from farm.rebuild import completion_of, read_job
from farm.records import standing
from farm.run import JobView

log = logging.getLogger(__name__)

T = TypeVar("T")

AGAIN_S = 1.0
"""Pause before the store is asked again after it did not answer."""
CONTROLS_S = 1.0
"""How often a job is looked at for controls; seldomer where there are many."""
LISTINGS_PER_S = 20.0
"""Listings of controls that the store sees at most."""
CLAIMS_S = 1.0
"""How often it is seen which claims are due."""
ELSEWHERE_S = 10.0
"""How often a job that another farm renders is read again, to show how far it is."""
ELSEWHERE_SHARE = 0.1
"""Share of the time that reading such a job may take at most."""
OPEN_S = 10.0
"""How often a farm that serves a whole store looks for jobs that nobody told it of."""


class Threads(Protocol):
    """Where blocking work is done: so many at once, the others wait their turn."""

    def __call__(self, work: Callable[[], T]) -> Awaitable[T]:
        """Do some work in a thread."""


class JobWatch:
    """Keeps `dispatch` informed. `reads` are the threads that read whole jobs, `looks` those of single quick looks, so that
    neither keeps a claim from being renewed. `changed` is called after everything that `dispatch` was told.

    `troubles`: why a job could not be read when it should have been.
    """

    def __init__(
        self,
        dispatch: Dispatch,
        ledger: Ledger,
        claims: Claims,
        *,
        reads: Threads,
        looks: Threads,
        claiming: Threads,
        changed: Callable[[], None],
    ):
        self._dispatch = dispatch
        self._ledger = ledger
        self._claims = claims
        self._reads = reads
        self._looks = looks
        self._claims_in = claiming
        self._changed = changed
        self._reading: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._claiming: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._to_read: set[str] = set()
        self._looking: set[str] = set()
        self._controls: dict[str, int] = {}
        self._read_again_at: dict[str, float] = {}
        self._holds: dict[str, Hold] = {}
        self._due: dict[str, float] = {}
        self._said: dict[str, str] = {}
        self.troubles: dict[str, str] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._claim_tasks: set[asyncio.Task[None]] = set()
        self._asked: dict[str, asyncio.Task[None]] = {}
        self._closed = False

    async def take_up(self, job: str, *, again: bool = False) -> None:
        """Read a job and see to its claim; waits while the store is away. `again`: a person asks for it.

        Raises what the store says of a job that cannot be read.
        """
        async with self._reading[job]:
            self._to_read.discard(job)
            self._asked.pop(job, None)
            started = self._now()
            try:
                controls, view = await self._answered(self._reads, lambda: _read(self._ledger, job))
            except Exception as exc:
                self.troubles[job] = exc.message if isinstance(exc, FarmError) else f"{type(exc).__name__}: {exc}"
                self._read_again_at[job] = self._now() + ELSEWHERE_S
                raise
            self.troubles.pop(job, None)
            now = self._now()
            self._controls[job] = controls
            self._read_again_at[job] = now + max(ELSEWHERE_S, (now - started) / ELSEWHERE_SHARE)
            self._dispatch.take_up(view, again=again, again_soon=job in self._to_read, now=now)
            self._changed()
        if job not in self._due and job in self._dispatch.unfinished():
            await self._claim(job)

    async def ask_for(self, job: str) -> None:
        """Take up a job because a person asks for it; many who ask while it waits to be read wait for one read.

        Raises what the store says of a job that cannot be read.
        """
        asked = self._asked.get(job)
        if asked is None:
            asked = self._asked[job] = asyncio.create_task(self.take_up(job, again=True))
        await asyncio.shield(asked)

    def read(self, job: str) -> None:
        """Take up a job in the background; one that waits to be read is not read twice."""
        if job not in self._to_read:
            self._to_read.add(job)
            self._spawn(self.take_up(job), job)

    def check(self, check: Check) -> None:
        """Find out in the background whether a shard has a receipt."""
        self._spawn(self._check(check), check.job)

    # Endless rounds

    async def find_open(self, *, every_s: float = OPEN_S) -> None:
        """Take up the jobs that are marked open, and those that will be."""
        while True:
            await self._alone(self._find_open(), "")
            await asyncio.sleep(every_s)

    async def watch_controls(self) -> None:
        """Read each job again that somebody said something to."""
        while True:
            jobs = self._dispatch.jobs()
            for job in jobs:
                if job not in self._looking:
                    self._looking.add(job)
                    self._spawn(self._look_at_controls(job), job)
                await asyncio.sleep(max(CONTROLS_S / len(jobs), 1 / LISTINGS_PER_S))
            if not jobs:
                await asyncio.sleep(CONTROLS_S)

    async def watch_tombstones(self) -> None:
        """Read each job again that was deleted."""
        while True:
            await asyncio.sleep(CONTROLS_S)
            await self._alone(self._find_deleted(), "")

    async def keep_claims(self) -> None:
        """Renew the claims of this farm's jobs, look at those of others, let go of what needs none any more."""
        while True:
            await asyncio.sleep(CLAIMS_S)
            self._prune()
            now = self._now()
            wanted = set(self._dispatch.unfinished())
            for job in [job for job in self._due if job not in wanted]:
                del self._due[job]
                self._spawn(self._let_go(job), job)
            for job in wanted:
                if now >= self._due.get(job, 0.0) and not self._claiming[job].locked():
                    self._spawn_claim(job)
                hold = self._holds.get(job)
                if (job in self.troubles or (hold is not None and not hold.held)) and now >= self._read_again_at.get(
                    job, now
                ):
                    self.read(job)

    async def release(self) -> None:
        """Let go of every claim; to be called when nothing is rendered any more."""
        jobs = {*self._due, *self._holds}
        self._due.clear()
        await asyncio.gather(*(self._let_go(job) for job in jobs))

    def close(self) -> None:
        """End what goes on in the background, but for claims that are being asked for: `release` waits for those."""
        self._closed = True
        for task in self._tasks:
            task.cancel()

    # Inside

    async def _find_open(self) -> None:
        marked = await self._answered(self._looks, self._ledger.open_jobs)
        known = set(self._dispatch.jobs())
        for job in marked:
            if job not in known and not self._reading[job].locked():
                self.read(job)

    async def _find_deleted(self) -> None:
        known = set(self._dispatch.jobs())
        for job in await self._looks(self._ledger.deleted_jobs) if known else ():
            if job in known:
                self.read(job)

    async def _check(self, check: Check) -> None:
        try:
            found = await self._answered(self._reads, lambda: completion_of(self._ledger, check))
        except FarmError as exc:
            # Whoever is leased the shard next meets the same, and says so.
            log.error("receipt not looked up", extra={"job": check.job, "shard": check.shard, "reason": exc.message})
            found = None
        except Exception:
            log.exception("receipt not looked up", extra={"job": check.job, "shard": check.shard})
            found = None
        self._dispatch.checked(check, found, now=self._now())
        self._changed()

    async def _look_at_controls(self, job: str) -> None:
        try:
            last = await self._looks(lambda: self._ledger.last_control(job))
            rests = job in self.troubles and self._now() < self._read_again_at.get(job, 0.0)
            if last == self._controls.setdefault(job, last) or rests:
                return
            # Reading a job takes long where a budget needs its receipts; what stops it does not wait for that.
            with suppress(FarmError):  # whatever it is, the read meets it too
                said = await self._looks(lambda: standing(self._ledger.controls(job)))
                if said.state != "open":
                    self._dispatch.said(job, said.state, now=self._now())
                    self._changed()
        finally:
            self._looking.discard(job)
        self.read(job)

    async def _claim(self, job: str) -> None:
        """Hold a job's claim, or learn who does. Where that cannot be found out, things stay as they were."""
        async with self._claiming[job]:
            if self._closed:
                return
            self._due[job] = self._now() + CLAIM_LOOK_S
            try:
                hold = await self._claims_in(lambda: self._claims.hold(job))
            except StoreUnavailableError as exc:
                log.warning("claim not renewed", extra={"job": job, "reason": exc.message})
                return
            except FarmError as exc:
                # A store that takes pictures and no claims: rendering what another farm renders too loses nothing.
                hold = Hold(True)
                if hold != self._holds.get(job):
                    log.error("rendering without a claim", extra={"job": job, "reason": exc.message})
            if hold.held:
                self._due[job] = self._now() + CLAIM_RENEW_S
            if hold != self._holds.get(job):
                log.info("claim", extra={"job": job, "held": hold.held, "by": hold.by})
            self._holds[job] = hold
            self._dispatch.claimed(job, hold.held, by=hold.by, now=self._now())
            self._changed()

    async def _let_go(self, job: str) -> None:
        async with self._claiming[job]:
            hold = self._holds.pop(job, None)
            self._dispatch.claimed(job, False, now=self._now())
            self._changed()
            if hold is None or hold.held:
                await self._claims_in(lambda: self._claims.release(job))

    async def _answered(self, threads: Threads, work: Callable[[], T]) -> T:
        """Ask the store in a thread, again and again while it does not answer."""
        while True:
            try:
                return await threads(work)
            except StoreUnavailableError as exc:
                log.warning("store not available", extra={"reason": exc.message})
                await asyncio.sleep(AGAIN_S)

    def _prune(self) -> None:
        """Forget jobs that the rules have forgotten: done long ago, or never there."""
        known = {*self._dispatch.jobs(), *self._due, *self._to_read, *self._asked, *self._looking}
        if len(self._reading) <= 2 * len(known) + JOBS_KEPT:
            return
        for job in [one for one, lock in self._reading.items() if one not in known and not lock.locked()]:
            del self._reading[job]
            for kept in (self._claiming, self._controls, self._read_again_at, self._said, self.troubles):
                kept.pop(job, None)

    def _spawn(self, work: Coroutine[Any, Any, None], job: str) -> None:
        task = asyncio.create_task(self._alone(work, job))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _spawn_claim(self, job: str) -> None:
        task = asyncio.create_task(self._alone(self._claim(job), job))
        self._claim_tasks.add(task)
        task.add_done_callback(self._claim_tasks.discard)

    async def _alone(self, work: Coroutine[Any, Any, None], job: str) -> None:
        """Keep one job's trouble from the others."""
        try:
            await work
            self._said.pop(job, None)
        except FarmError as exc:
            if self._said.get(job) != exc.message:
                log.error("job not looked after", extra={"job": job, "code": exc.code, "reason": exc.message})
            self._said[job] = exc.message
        except Exception:
            log.exception("job not looked after", extra={"job": job})

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


def _read(ledger: Ledger, job: str) -> tuple[int, JobView]:
    """A job, and the number of its last control: looked up first, so that a later one is noticed by its number."""
    controls = ledger.last_control(job)
    return controls, read_job(ledger, job)
