"""The dispatcher at its desk: the dispatch rules, and all that goes on around them, without Ray.

Answers renderers and people, parks questions for work, does what the rules ask for (`effects`), keeps jobs as the store
has them and a renderer in every slot. One event loop owns it, and nothing on that loop blocks. What it forgets when its
process dies is read again from the store, or told again by the renderers.
"""

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

from farm.claims import Claims
from farm.crew import START_S, Crew, Pool
from farm.dispatch import BLAMELESS, Dispatch
from farm.errors import FarmError, FarmUnavailableError, UnknownRendererError
from farm.frontdesk import QUOTAS_START_S, FrontDesk
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
from farm.meters import Meters
from farm.parking import Parking
from farm.portion import Allowance, Entry, Leaving, Placing, PoolView, Refusal, SeatEnd
from farm.run import JobProgress
from farm.settings import Reserve
from farm.tally import Snapshot

log = logging.getLogger(__name__)

T = TypeVar("T")

TICK_S = 1.0
STOP_S = 5.0
"""How long a stopping farm waits for its renderers to put down what they hold."""
RELEASE_S = 3.0
"""How long it then tries to write quotas and to let go of its claims; those that stay time out. Who stops a farm waits for
both times together, and little more."""
GREETING_S = 2.0
"""After a restart, how long past a beat renderers that live have to report their leases before new ones are given."""
READ_THREADS = 8
LOOK_THREADS = 8
CLAIM_THREADS = 4
QUOTA_THREADS = 1


class Desk:
    """Every method but `stop` may be repeated, and is called on one event loop.

    `names`: the slots' renderers. `free`: what a renderer needs to start, for people (`CPU`, `GPU`). With `all_open` it
    takes up every unfinished job of the store by itself, else those that it is told of. `max_waiting`: urgent images that
    may wait; `reserve`: renderers kept for them, by the time of day. A part of it that fails for a reason of its own ends
    the process by `end_process`, so that it is started anew.
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
        max_waiting: int = 512,
        reserve: Sequence[Reserve] = (),
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
        self._meters = Meters("dispatcher", epoch, began_at=wall())
        self._front = FrontDesk(
            self._dispatch,
            pool,
            ledger.store,
            names=names,
            capacity=max_waiting,
            reserve=reserve,
            meters=self._meters,
            threads=threads(QUOTA_THREADS, "quotas"),
            wall=wall,
        )
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
        elif progress.state == "waiting" and self._all_kept():
            progress = replace(progress, message="waits: every renderer is drained, or kept for urgent images")
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
        self._front.met(hello.renderer, hello.incarnation, now=self._now())
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
        if end.code not in BLAMELESS:
            self._meters.count("farm_retries_total", code=end.code)
        self._dispatch.give_back(end, now=self._now())
        self._changed()

    async def report(self, snapshot: Snapshot) -> None:
        """Take in what a renderer has counted."""
        await self._ready()
        self._front.report(snapshot, now=self._now())

    async def drain(self, renderer: str, drained: bool) -> None:
        """Give a renderer no more work, or again; what it has begun it ends. Raises UnknownRendererError."""
        await self._ready()
        names = self._crew.names
        if renderer not in names:
            raise UnknownRendererError(f"no renderer is called {renderer!r}; there are {names[0]} to {names[-1]}")
        self._dispatch.drain(renderer, drained, now=self._now())
        self._changed()

    # Urgent images

    async def enter(self, entry: Entry) -> Placing:
        """Give seats for urgent images, the same ones whenever their token asks; or refuse.

        Raises RequestError where they can never fit, and FarmUnavailableError just after a start.
        """
        await self._ready()
        now = self._now()
        greeting = bool(self._to_greet) and now < self._greets_until
        return self._front.enter(entry, now=now, greeting=greeting, trouble=self._crew.trouble)

    async def leave(self, token: str, *, seconds: float, end: SeatEnd = "done") -> None:
        """Take back a seat, or all of an entry's; `seconds` of device time are charged to their owner."""
        await self._ready()
        self._front.leave(token, seconds=seconds, end=end, now=self._now())

    async def turn(self, leavings: Sequence[Leaving], entries: Sequence[Entry]) -> tuple[Placing | FarmError, ...]:
        """Take back seats, then answer entries, each for itself: what one of them would raise stands in its answer's place."""
        for one in leavings:
            await self.leave(one.token, seconds=one.seconds, end=one.end)
        answers: list[Placing | FarmError] = []
        for entry in entries:
            try:
                answers.append(await self.enter(entry))
            except FarmError as exc:
                answers.append(exc)
        return tuple(answers)

    async def hold(self, gateway: str, tokens: Sequence[str], snapshot: Snapshot) -> None:
        """Take in a gateway's sign of life: seats that it still needs, and what it counted."""
        await self._ready()
        self._front.hold(gateway, tokens, snapshot, now=self._now())

    async def charge(self, key: str, allowance: Allowance, images: int) -> Refusal | None:
        """Count a job's images for a key's day; a refusal counts nothing. Raises RequestError where they never fit a day."""
        await self._ready()
        return self._front.charge(key, allowance, images)

    async def pool(self) -> PoolView:
        """How the farm stands."""
        await self._ready()
        return self._front.pool(now=self._now())

    async def metrics(self) -> Sequence[Snapshot]:
        """What all processes of the farm counted, and what this one did."""
        await self._ready()
        return self._front.snapshots(self._meters, now=self._now())

    async def stop(self) -> None:
        """End every renderer, each within a denoising step, let go of every claim, and end this desk's own work."""
        self._stopping = self._front.stopping = True
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
        await asyncio.gather(self._save_quotas(), self._release_claims())

    # Inside

    async def _save_quotas(self) -> None:
        try:
            await asyncio.wait_for(self._front.save_quotas(), RELEASE_S)
        except TimeoutError:
            log.warning("quotas not written: what was used in the last seconds is forgotten")

    async def _release_claims(self) -> None:
        try:
            await asyncio.wait_for(self._jobs.release(), RELEASE_S)
        except (TimeoutError, FarmError) as exc:
            log.warning("claims not let go of: another farm waits until they time out", extra={"reason": str(exc)})

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
        await asyncio.wait((asyncio.create_task(self._front.recall_quotas()),), timeout=QUOTAS_START_S)
        self._keepers = [self._lasting(self._crew.keep(name)) for name in self._crew.names]
        self._rounds = [
            self._lasting(self._tick()),
            self._lasting(self._front.keep_quotas()),
            self._lasting(self._jobs.watch_controls()),
            self._lasting(self._jobs.watch_tombstones()),
            self._lasting(self._jobs.keep_claims()),
        ]
        if self._all_open:
            self._rounds.append(self._lasting(self._jobs.find_open()))
            self._rounds.append(self._lasting(self._front.sweep_singles()))

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            now = self._now()
            forgiven_s = self._dispatch.tick(now=now, wall=self._wall())
            self._front.tick(now=now, late=forgiven_s)
            self._parking.expire(self._nothing)
            self._changed()

    def _offer(self, question: Ask) -> Reply:
        now = self._now()
        reply = self._dispatch.ask(question, now=now, grants=not self._to_greet or now >= self._greets_until)
        self._act()
        return reply

    def _has_work(self) -> bool:
        return self._dispatch.has_work(now=self._now())

    def _all_kept(self) -> bool:
        return all(self._dispatch.board.is_kept(name) for name in self._crew.names)

    def _lost(self, renderer: str, by_itself: bool) -> None:
        self._meters.count("farm_renderer_losses_total")
        self._dispatch.lost(renderer, now=self._now(), blame=by_itself)
        self._front.lost(renderer, now=self._now())
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
