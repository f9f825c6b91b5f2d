"""The Ray actor that hands out leases: a shell around `farm.dispatch.Dispatch`.

Supplies the clock, reads the ledger in threads, parks questions for work, and keeps one renderer alive in every slot.
"""

import asyncio
import logging
import os
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any, TypeVar

import ray
from ray.exceptions import ActorDiedError, RayError

from actors.logs import log_to_stderr
from actors.names import NAMESPACE, renderer_name
from actors.renderer import RendererActor
from farm import __version__
from farm.dispatch import Dispatch
from farm.errors import FarmError
from farm.lease import POLL_S, Ask, Beat, Completion, GiveBack, Hello, Renewal, Reply
from farm.ledger import Ledger
from farm.rebuild import open_runs, stopped
from farm.run import JobProgress
from farm.settings import Settings
from farm.storage.opening import open_store

log = logging.getLogger(__name__)

T = TypeVar("T")

TICK_S = 1.0
CONTROLS_S = 3.0
"""How often unfinished jobs are looked at for controls written by somebody who could not reach this actor."""
START_AGAIN_S = (0.0, 1.0, 3.0, 10.0)
"""Pauses before a renderer is started again, by its deaths in a row before it was ready; the last repeats."""
STOP_S = 5.0
"""How long a stopping farm waits for its renderers to put down what they hold."""
GREETING_S = 3.0
"""After a restart, how long renderers that live have to report their leases before new ones are given: some beats."""
TROUBLE_DEATHS = 3
"""Failures to start in a row after which a renderer's trouble is the job's: one may be the last farm's slow end."""
START_S = 60.0
"""How long a renderer may take to start before people are told that none has."""


@ray.remote(max_restarts=-1, max_task_retries=-1, num_cpus=0, max_concurrency=10_000)
class DispatcherActor:
    """Hands out leases and keeps the renderers.

    Restarts under its name; every method may be repeated. With `all_open` it takes up every unfinished job of the store
    by itself, else those that it is told of: whoever follows a job tells it again after a restart. What it acknowledged
    about a job is in the store; leases, speeds and blame are forgotten by a crash, which costs time alone.
    """

    def __init__(self, settings: Settings, renderers: int, *, cores: int, gpu: bool, all_open: bool):
        log_to_stderr()
        self._settings = settings
        self._slots = renderers
        self._cores = cores
        self._gpu = gpu
        self._all_open = all_open
        self._ledger = Ledger(open_store(settings.store, settings))
        self._dispatch = Dispatch(epoch=uuid.uuid4().hex[:8])
        self._handles: dict[str, Any] = {}
        self._trouble: dict[str, str] = {}
        self._jobs: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._wake = asyncio.Event()
        self._keepers: list[asyncio.Task[None]] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._starting: asyncio.Task[None] | None = None
        self._started_at = time.monotonic()
        self._grants_from = 0.0

    async def about(self) -> tuple[str, str]:
        """The store that this farm serves, and its version."""
        return self._settings.store, __version__

    # Jobs

    async def submit(self, job: str) -> None:
        """Take up what the store holds of a job: its open runs, or its being stopped."""
        await self._ready()
        await self._take_up(job)

    async def progress(self, job: str) -> tuple[JobProgress | None, str | None]:
        """A job's snapshot, None where it is not known here, and the error code of what stalled it."""
        await self._ready()
        progress = self._dispatch.progress(job)
        code = self._dispatch.stall_code(job)
        if len(self._trouble) == self._slots and code is None:
            return progress, f"renderers: {next(iter(self._trouble.values()))}"
        if progress and not progress.renderers and time.monotonic() - self._started_at > START_S:
            what = "GPU" if self._gpu else "CPU"
            progress = replace(
                progress, message=f"no renderer has started yet: Ray has no free {what} for one, or starts slowly"
            )
        return progress, code

    async def unfinished(self) -> tuple[str, ...]:
        """Names of jobs still being worked on."""
        await self._ready()
        return self._dispatch.unfinished()

    # Renderers

    async def meet(self, hello: Hello) -> tuple[str, ...]:
        await self._ready()
        refused = self._dispatch.meet(hello, now=time.monotonic())
        self._trouble.pop(hello.renderer, None)
        self._wake_all()
        return refused

    async def ask(self, question: Ask) -> Reply:
        await self._ready()
        until = time.monotonic() + POLL_S
        while True:
            now = time.monotonic()
            reply = self._dispatch.ask(question, now=now, grants=now >= self._grants_from)
            if reply.lease or reply.meet or now >= until:
                return reply
            wake = self._wake
            try:
                await asyncio.wait_for(wake.wait(), max(0.01, min(until - now, TICK_S)))
            except TimeoutError:
                continue

    async def renew(self, beat: Beat) -> Renewal:
        await self._ready()
        return self._dispatch.renew(beat, now=time.monotonic())

    async def complete(self, completion: Completion) -> None:
        await self._ready()
        if completion.lease.task == "finalise":
            await self._close_if_done(completion.lease.job)
        self._drop(self._dispatch.complete(completion, now=time.monotonic()))
        self._wake_all()

    async def give_back(self, end: GiveBack) -> None:
        await self._ready()
        self._dispatch.give_back(end, now=time.monotonic())
        self._wake_all()

    async def stop(self) -> None:
        """End every renderer, each within a denoising step, and this actor's own work."""
        for task in self._tasks:
            task.cancel()
        self._tasks = []
        for handle in self._handles.values():
            handle.retire.remote()
        if self._keepers:
            await asyncio.wait(self._keepers, timeout=STOP_S)
        for keeper in self._keepers:
            keeper.cancel()

    # Inside

    async def _ready(self) -> None:
        """Start up on the first call after a start or restart; every caller waits for the same start.

        One that failed is tried again by the next call.
        """
        if self._starting is None:
            self._starting = asyncio.create_task(self._start())
        starting = self._starting
        try:
            await asyncio.shield(starting)
        except Exception:
            if self._starting is starting:
                self._starting = None
            raise

    async def _start(self) -> None:
        alive = await asyncio.to_thread(self._find_renderers)
        for job in await self._until_answered(self._ledger.open_jobs) if self._all_open else ():
            try:
                await self._take_up(job)
            except FarmError as exc:
                log.error("job not taken up", extra={"job": job, "code": exc.code, "reason": exc.message})
        self._grants_from = time.monotonic() + (GREETING_S if alive else 0.0)
        self._keepers = [_background(self._keep(slot)) for slot in range(self._slots)]
        self._tasks = [_background(self._tick()), _background(self._watch_controls())]

    async def _take_up(self, job: str) -> None:
        async with self._jobs[job]:
            stop = await self._until_answered(lambda: stopped(self._ledger, job))
            if stop:
                self._drop(self._dispatch.stop(job, stop))
            else:
                for entry in await self._until_answered(lambda: open_runs(self._ledger, job)):
                    self._dispatch.add(entry)
        self._wake_all()

    async def _close_if_done(self, job: str) -> None:
        """Take a job's marker away unless another run or pass of it is open; a marker too many costs a listing."""
        try:
            await asyncio.to_thread(open_runs, self._ledger, job)
        except FarmError as exc:
            log.warning("job not closed", extra={"job": job, "code": exc.code, "reason": exc.message})

    async def _until_answered(self, read: Callable[[], T]) -> T:
        """Read from the ledger in a thread, again and again while the store does not answer."""
        while True:
            try:
                return await asyncio.to_thread(read)
            except FarmError as exc:
                if exc.code != "store_unavailable":
                    raise
                log.warning("store not available", extra={"reason": exc.message})
                await asyncio.sleep(TICK_S)

    def _find_renderers(self) -> bool:
        for slot in range(self._slots):
            try:
                self._handles[renderer_name(slot)] = ray.get_actor(renderer_name(slot), NAMESPACE)
            except ValueError:
                continue
        return bool(self._handles)

    async def _keep(self, slot: int) -> None:
        """Keep a renderer alive in one slot; its death ends the wait for `work` within milliseconds."""
        name = renderer_name(slot)
        deaths = 0
        while True:
            started = time.monotonic()
            handle: Any = self._handles.get(name)
            try:
                if handle is None:
                    handle = await asyncio.to_thread(self._create, name)
                    self._handles[name] = handle
                await handle.work.remote()
                return
            except RayError as exc:
                if handle is not None and not isinstance(exc, ActorDiedError):
                    ray.kill(handle)  # unreachable, or its work failed: what is left of it must not keep the device
                self._handles.pop(name, None)
                self._dispatch.lost(name)
                self._wake_all()
                deaths = deaths + 1 if time.monotonic() - started < START_S else 0
                if deaths >= TROUBLE_DEATHS and "creation" in str(exc):
                    self._trouble[name] = str(exc).strip().splitlines()[-1]
                log.warning("renderer lost", extra={"renderer": name, "reason": str(exc)})
                await asyncio.sleep(START_AGAIN_S[min(deaths, len(START_AGAIN_S) - 1)])

    def _create(self, name: str) -> Any:
        return RendererActor.options(  # type: ignore[attr-defined]
            name=name,
            namespace=NAMESPACE,
            lifetime="detached",
            num_gpus=1 if self._gpu else 0,
            num_cpus=0 if self._gpu else 1,
            max_restarts=0,
            get_if_exists=True,
        ).remote(name, self._settings, self._cores)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            for renderer, why in self._dispatch.tick(now=time.monotonic()):
                log.warning("renderer given up", extra={"renderer": renderer, "why": why})
                handle = self._handles.get(renderer)
                if handle is not None:
                    ray.kill(handle)
                self._wake_all()

    async def _watch_controls(self) -> None:
        while True:
            await asyncio.sleep(CONTROLS_S)
            for job in self._dispatch.unfinished():
                async with self._jobs[job]:
                    try:
                        stop = await asyncio.to_thread(stopped, self._ledger, job)
                    except FarmError as exc:
                        log.warning("controls not read", extra={"job": job, "reason": exc.message})
                        continue
                    if stop:
                        self._drop(self._dispatch.stop(job, stop))

    def _drop(self, leases: tuple[tuple[str, str], ...]) -> None:
        for renderer, token in leases:
            handle = self._handles.get(renderer)
            if handle is not None:
                handle.drop.remote(token)

    def _wake_all(self) -> None:
        wake, self._wake = self._wake, asyncio.Event()
        wake.set()


def _background(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """Run what must never end by an error: if it does, this process ends, and Ray starts the actor anew."""
    task = asyncio.create_task(work)
    task.add_done_callback(_end_on_error)
    return task


def _end_on_error(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.critical("the dispatcher cannot go on", exc_info=task.exception())
        os._exit(1)
