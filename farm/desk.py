"""The dispatcher at its desk: the dispatch rules, and all that goes on around them, without Ray.

Answers renderers and people, parks questions for work, does what the rules ask for (`effects`), keeps jobs as the store
has them and a renderer in every slot. One event loop owns it, and nothing on that loop blocks. What it forgets when its
process dies is read again from the store, or told again by the renderers.
"""

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

from farm.claims import Claims
from farm.crew import START_S, Crew, Pool
from farm.dispatch import Dispatch
from farm.errors import FarmError, FarmUnavailableError
from farm.jobwatch import JobWatch, Threads
from farm.lease import (
    POLL_S,
    Ask,
    Beat,
    Check,
    Completion,
    Drop,
    End,
    GiveBack,
    Hello,
    Read,
    Renewal,
    Reply,
    Revoke,
    beat_s,
)
from farm.ledger import Ledger
from farm.parking import Parking
from farm.run import JobProgress

log = logging.getLogger(__name__)

T = TypeVar("T")

TICK_S = 1.0
STOP_S = 5.0
"""How long a stopping farm waits for its renderers to put down what they hold."""
RELEASE_S = 3.0
"""How long it then tries to let go of its claims; those that stay time out."""
GREETING_S = 2.0
"""After a restart, how long past a beat renderers that live have to report their leases before new ones are given."""
READ_THREADS = 8
LOOK_THREADS = 8
CLAIM_THREADS = 4


class Desk:
    """Every method but `stop` may be repeated, and is called on one event loop.

    `names`: the slots' renderers. `free`: what a renderer needs to start, for people (`CPU`, `GPU`). With `all_open` it
    takes up every unfinished job of the store by itself, else those that it is told of. A part of it that fails for a
    reason of its own ends the process by `end_process`, so that it is started anew.
    """

    def __init__(
        self,
        *,
        epoch: str,
        pool: Pool,
        ledger: Ledger,
        claims: Claims,
        names: tuple[str, ...],
        free: str = "CPU",
        all_open: bool = False,
        shares: Mapping[str, float] = {},
        wall: Callable[[], float] = time.time,
        threads: Callable[[int, str], Threads] | None = None,
        end_process: Callable[[int], object] = os._exit,
    ):
        self._dispatch = Dispatch(epoch=epoch, shares=shares, claims=True)
        self._nothing = Reply(epoch)
        self._pool = pool
        self._ledger = ledger
        self._free = free
        self._all_open = all_open
        self._wall = wall
        self._end_process = end_process
        threads = threads or in_threads
        self._looks = threads(LOOK_THREADS, "looks")
        self._crew = Crew(pool, names, lost=self._lost)
        self._jobs = JobWatch(
            self._dispatch,
            ledger,
            claims,
            reads=threads(READ_THREADS, "reads"),
            looks=self._looks,
            claiming=threads(CLAIM_THREADS, "claims"),
            changed=self._changed,
        )
        self._parking = Parking(offer=self._offer, has_work=self._has_work)
        self._to_greet: set[str] = set()
        self._greets_until = 0.0
        self._keepers: list[asyncio.Task[None]] = []
        self._rounds: list[asyncio.Task[None]] = []
        self._started_at: float | None = None
        self._starting: asyncio.Task[None] | None = None
        self._stopping = False

    # Jobs

    async def submit(self, job: str) -> None:
        """Take up what the store holds of a job, because a person asks for it. Raises what the store says of it."""
        await self._ready()
        await self._jobs.ask_for(job)

    async def progress(self, job: str) -> tuple[JobProgress | None, str | None]:
        """A job's snapshot, None where it is not known here, and the error code of what stalled it."""
        await self._ready()
        progress = self._dispatch.progress(job)
        code = self._dispatch.stall_code(job)
        if progress is None or code is not None:
            return progress, code
        if self._crew.trouble is not None:
            return progress, f"renderers: {self._crew.trouble}"
        if job in self._jobs.troubles:
            progress = replace(
                progress,
                message=f"it could not be read again, and goes on as far as it was: {self._jobs.troubles[job]}",
            )
        elif not progress.renderers and self._now() - (self._started_at or 0.0) > START_S:
            what = f"no renderer has started yet: Ray has no free {self._free} for one, or starts slowly"
            progress = replace(progress, message=what)
        return progress, None

    async def unfinished(self) -> tuple[str, ...]:
        """Names of jobs still being worked on."""
        await self._ready()
        return self._dispatch.unfinished()

    # Renderers

    async def meet(self, hello: Hello) -> tuple[str, ...]:
        """Know a renderer and the leases that it holds; returns tokens that it should drop."""
        await self._ready()
        refused = self._dispatch.meet(hello, now=self._now())
        self._crew.came(hello.renderer)
        self._to_greet.discard(hello.renderer)
        self._changed()
        return refused

    async def ask(self, question: Ask) -> Reply:
        """Answer a question for work; where there is none, it is parked for POLL_S."""
        await self._ready()
        reply = self._offer(question)
        if reply.is_final:
            return reply
        return await self._parking.wait(question, self._nothing, seconds=POLL_S)

    async def renew(self, beat: Beat) -> Renewal:
        """Take in a renderer's sign of life."""
        await self._ready()
        renewal = self._dispatch.renew(beat, now=self._now())
        self._changed()
        return renewal

    async def complete(self, completion: Completion) -> None:
        """Take in a lease's good end."""
        await self._ready()
        self._dispatch.complete(completion, now=self._now())
        self._changed()

    async def give_back(self, end: GiveBack) -> None:
        """Take in a lease's other end."""
        await self._ready()
        self._dispatch.give_back(end, now=self._now())
        self._changed()

    async def stop(self) -> None:
        """End every renderer, each within a denoising step, let go of every claim, and end this desk's own work."""
        self._stopping = True
        self._crew.close()
        if self._starting is None:
            await self._looks(self._pool.find)  # renderers of the process before this one
        for task in self._rounds:
            task.cancel()
        self._jobs.close()
        for name in self._crew.names:
            self._parking.forget(name, self._nothing)
            self._pool.retire(name)
        if self._keepers:
            await asyncio.wait(self._keepers, timeout=STOP_S)
        for task in self._keepers:
            task.cancel()
        try:
            await asyncio.wait_for(self._jobs.release(), RELEASE_S)
        except (TimeoutError, FarmError) as exc:
            log.warning("claims not let go of: another farm waits until they time out", extra={"reason": str(exc)})

    # Inside

    async def _ready(self) -> None:
        """Start up on the first call; every caller waits for the same start. One that failed is tried again."""
        if self._starting is None:
            if self._stopping:
                raise FarmUnavailableError("the farm is being stopped; run the command again to start another")
            self._starting = asyncio.create_task(self._start())
        starting = self._starting
        try:
            await asyncio.shield(starting)
        except Exception:
            if self._starting is starting:
                self._starting = None
            raise

    async def _start(self) -> None:
        alive = await self._looks(self._pool.find)
        self._started_at = self._now()
        self._to_greet = set(alive)
        self._greets_until = self._started_at + beat_s(len(self._crew.names)) + GREETING_S
        self._keepers = [self._lasting(self._crew.keep(name)) for name in self._crew.names]
        self._rounds = [
            self._lasting(self._tick()),
            self._lasting(self._jobs.watch_controls()),
            self._lasting(self._jobs.watch_tombstones()),
            self._lasting(self._jobs.keep_claims()),
        ]
        if self._all_open:
            self._rounds.append(self._lasting(self._jobs.find_open()))

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._dispatch.tick(now=self._now(), wall=self._wall())
            self._parking.expire(self._nothing)
            self._changed()

    def _offer(self, question: Ask) -> Reply:
        now = self._now()
        reply = self._dispatch.ask(question, now=now, grants=not self._to_greet or now >= self._greets_until)
        self._act()
        return reply

    def _has_work(self) -> bool:
        return self._dispatch.has_work(now=self._now())

    def _lost(self, renderer: str, by_itself: bool) -> None:
        self._dispatch.lost(renderer, now=self._now(), blame=by_itself)
        self._to_greet.discard(renderer)
        self._parking.forget(renderer, self._nothing)
        self._changed()

    def _changed(self) -> None:
        """Do what the rules ask for, and see whether a parked question can be answered now."""
        self._act()
        self._parking.wake()

    def _act(self) -> None:
        for effect in self._dispatch.effects():
            match effect:
                case Drop(renderer, token):
                    self._pool.drop(renderer, token)
                case Revoke(renderer, token):
                    self._pool.revoke(renderer, token)
                case End(renderer, why):
                    log.warning("renderer given up", extra={"renderer": renderer, "why": why})
                    self._pool.end(renderer)
                case Check():
                    self._jobs.check(effect)
                case Read(job):
                    self._jobs.read(job)

    def _lasting(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Run what must never end by an error: if it does, this process ends, and is started anew."""
        task = asyncio.create_task(work)
        task.add_done_callback(self._end_on_error)
        return task

    def _end_on_error(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            log.critical("the dispatcher cannot go on", exc_info=task.exception())
            self._end_process(1)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()


def in_threads(count: int, name: str) -> Threads:
    """Return threads of their own, so many of them."""
    pool = ThreadPoolExecutor(count, thread_name_prefix=name)

    def call(work: Callable[[], T]) -> Awaitable[T]:
        return asyncio.get_running_loop().run_in_executor(pool, work)

    return call
