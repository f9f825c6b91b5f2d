"""The Ray actor that hands out leases: a shell around `farm.desk.Desk`."""

import asyncio
import uuid
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import ray

from actors.logs import log_to_stderr
from actors.pool import RayPool
from farm import __version__
from farm.claims import Claims, claim_of
from farm.desk import Desk
from farm.errors import FarmError
from farm.lease import Ask, Beat, Completion, GiveBack, Hello, Renewal, Reply
from farm.ledger import Ledger
from farm.portion import Allowance, Entry, Leaving, Placing, PoolView, Refusal
from farm.run import JobProgress
from farm.settings import Settings
from farm.storage.opening import open_store
from farm.tally import Snapshot

T = TypeVar("T")
Method = TypeVar("Method", bound=Callable[..., Any])

RENEWALS = 10_000
POLLS = 20_000
"""Parked questions, one a renderer; more than one only until a dead caller's is forgotten."""
CONTROLS = 1_000
URGENT = 10_000
"""Questions of gateways, each answered at once."""


def _in(group: str) -> Callable[[Method], Method]:
    """Have Ray run a method in one of its concurrency groups."""
    put: Callable[[Method], Method] = ray.method(concurrency_group=group)
    return put


@ray.remote(
    max_restarts=-1,
    max_task_retries=-1,
    num_cpus=0,
    max_concurrency=RENEWALS,
    enable_task_events=False,
    concurrency_groups={"polls": POLLS, "control": CONTROLS, "urgent": URGENT},
)
class DispatcherActor:
    """Hands out leases and keeps the renderers.

    Restarts under its name; every method may be repeated. With `all_open` it takes up every unfinished job of the store
    by itself, else those that it is told of: whoever follows a job tells it again after a restart. What it acknowledged
    about a job is in the store; leases, speeds and blame are forgotten by a crash, which costs time alone. So are the seats
    of urgent images, which are drawn all the same; of the day's quotas, what was used in the last seconds.

    Ray bounds the calls of each concurrency group by itself, so that polls never use up what a cancel needs, and runs
    each group on a thread and an event loop of its own. All state belongs to the loop of the default group, where
    renewals, completions and questions for seats arrive; calls of the other groups are carried there, which takes some
    tenths of a millisecond. Ray keeps no record of the calls: at two an image those are of no use to anybody.
    A lock instead would not do: what a parked question awaits belongs to one loop.

    `farm`, drawn once, and `pid`, the process on this machine that the farm ends with (or 0), make its claims.
    """

    def __init__(
        self, settings: Settings, renderers: int, *, cores: int, gpu: bool, all_open: bool, farm: str, pid: int
    ):
        log_to_stderr()
        self._home = asyncio.get_running_loop()
        self._store = settings.store
        store = open_store(settings.store, settings)
        pool = RayPool(settings, renderers, cores=cores, gpu=gpu)
        self._desk = Desk(
            epoch=uuid.uuid4().hex[:8],
            pool=pool,
            ledger=Ledger(store),
            claims=Claims(store, claim_of(farm, pid=pid)),
            names=pool.names,
            free="GPU" if gpu else "CPU",
            all_open=all_open,
            shares=settings.shares,
            max_waiting=settings.max_waiting,
            reserve=settings.reserve,
        )

    async def _at_home(self, call: Coroutine[Any, Any, T]) -> T:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(call, self._home))

    @_in("control")
    async def about(self) -> tuple[str, str]:
        """The store that this farm serves, and its version."""
        return self._store, __version__

    @_in("control")
    async def submit(self, job: str) -> None:
        """Take up what the store holds of a job: its open runs, or its being stopped."""
        await self._at_home(self._desk.submit(job))

    @_in("control")
    async def progress(self, job: str) -> tuple[JobProgress | None, str | None]:
        """A job's snapshot, None where it is not known here, and the error code of what stalled it."""
        return await self._at_home(self._desk.progress(job))

    @_in("control")
    async def unfinished(self) -> tuple[str, ...]:
        """Names of jobs still being worked on."""
        return await self._at_home(self._desk.unfinished())

    @_in("control")
    async def stop(self) -> None:
        """End every renderer, each within a denoising step, and this actor's own work."""
        await self._at_home(self._desk.stop())

    async def turn(self, leavings: Sequence[Leaving], entries: Sequence[Entry]) -> tuple[Placing | FarmError, ...]:
        """Take back seats of urgent images, then give some or refuse; what an entry would raise stands in its answer's place."""
        return await self._desk.turn(leavings, entries)

    @_in("urgent")
    async def hold(self, gateway: str, tokens: Sequence[str], snapshot: Snapshot) -> None:
        """Take in a gateway's sign of life."""
        await self._at_home(self._desk.hold(gateway, tokens, snapshot))

    @_in("urgent")
    async def charge(self, key: str, allowance: Allowance, images: int) -> Refusal | None:
        """Count a job's images for a key's day; repeated, it counts them again."""
        return await self._at_home(self._desk.charge(key, allowance, images))

    @_in("urgent")
    async def pool(self) -> PoolView:
        """How the farm stands."""
        return await self._at_home(self._desk.pool())

    @_in("urgent")
    async def drain(self, renderer: str, drained: bool) -> None:
        """Give a renderer no more work, or again."""
        await self._at_home(self._desk.drain(renderer, drained))

    @_in("urgent")
    async def metrics(self) -> Sequence[Snapshot]:
        """What every process of the farm counted."""
        return await self._at_home(self._desk.metrics())

    @_in("polls")
    async def ask(self, question: Ask) -> Reply:
        """Answer a renderer's question for work, parked while there is none."""
        return await self._at_home(self._desk.ask(question))

    async def meet(self, hello: Hello) -> tuple[str, ...]:
        """Know a renderer; returns tokens of leases to drop."""
        return await self._desk.meet(hello)

    async def renew(self, beat: Beat) -> Renewal:
        """Take in a renderer's sign of life."""
        return await self._desk.renew(beat)

    async def report(self, snapshot: Snapshot) -> None:
        """Take in what a renderer has counted."""
        await self._desk.report(snapshot)

    async def complete(self, completion: Completion) -> None:
        """Take in that a receipt is stored."""
        await self._desk.complete(completion)

    async def give_back(self, end: GiveBack) -> None:
        """Take in that a lease ended without a receipt."""
        await self._desk.give_back(end)
