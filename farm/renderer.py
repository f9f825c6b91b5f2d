"""What one renderer does: ask for leases, render them one at a time, store while the next one renders.

Owns one device. A GPU renders one shard at a time; a CPU as many side by side as the plan's threads leave cores for. The
event loop asks, renews and answers; threads render; the writer's threads encode and upload. Knows nothing of Ray: the
dispatcher is behind a `Link`. Nothing is done until its receipt is in the store, so every call to the dispatcher may
fail, be repeated, or come too late, and nothing is lost by it.
"""

import asyncio
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

from farm.cores import Cores, Place
from farm.cutin import CutIn
from farm.devices import DeviceInfo, renderers_on
from farm.drawing import ShardProgress
from farm.engines import Engines
from farm.errors import (
    CancelledError,
    DeviceLostError,
    FarmError,
    FarmUnavailableError,
    RecordError,
    RendererDiedError,
    StoreError,
)
from farm.export import finalise
from farm.gpu import DeviceMeter
from farm.lease import RENEW_S, Ask, Beat, Completion, GiveBack, Hello, Lease, Renewal, Reply, Standing
from farm.ledger import Ledger
from farm.meters import Meters
from farm.modelcard import ModelCard
from farm.needs import measured_of
from farm.plan import Numerics, Plan
from farm.portion import Answer, Portion
from farm.records import WorkingMemory
from farm.shard import ShardRunner
from farm.tally import Snapshot
from farm.task import Task
from farm.urgent import UrgentQueue
from farm.watchdog import Watchdog

log = logging.getLogger(__name__)

T = TypeVar("T")

CALL_AGAIN_S = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Pauses before a call to a dispatcher that did not answer is made again; the last repeats."""

RUNNERS_KEPT = 4
ANNOUNCE_S = 5.0
"""How long a batch that may end this process waits for the dispatcher to know of it."""
WATCH_S = 1.0
"""How often a renderer looks whether it is stuck."""
PROFILE_S = 5.0
"""How long a load waits to learn what was measured of a model."""
REPORT_S = 5.0
"""How often a renderer tells what it has counted."""
DEVICE_LOST_EXIT = 70
STUCK_EXIT = 71
REPLACED_EXIT = 72


class Link(Protocol):
    """The dispatcher, as a renderer sees it. Every method raises FarmUnavailableError while it is away."""

    async def meet(self, hello: Hello) -> tuple[str, ...]:
        """Say hello; returns tokens of held leases to drop."""

    async def ask(self, question: Ask) -> Reply:
        """Wait for work, for some seconds at most."""

    async def renew(self, beat: Beat) -> Renewal:
        """Show life and report on held leases."""

    async def complete(self, completion: Completion) -> None:
        """Tell that a receipt is stored."""

    async def give_back(self, end: GiveBack) -> None:
        """Tell that a lease ended without a receipt."""

    async def report(self, snapshot: Snapshot) -> None:
        """Tell what this process has counted."""


class Renderer:
    """One device's worker. `device` is torch's name of it, `device_name` what receipts call it.

    Of two processes of one `name` the one with the greater `incarnation` is the renderer, and the other ends itself.

    `work` returns when it was retired and everything in hand has ended. A device that failed takes every later batch
    with it, and a call that hangs keeps its device for ever: `end_process` then ends this process, and another takes its
    place. While no dispatcher answers, what is in hand is rendered and stored to its end, and nothing more is begun.

    Urgent images come by `draw`, and cut into what is rendered (`farm.cutin`). `gpu`: the GPU whose memory and
    utilisation it tells, by index or UUID; None on a CPU. `renderers`: the farm's, where somebody set their number.
    """

    def __init__(
        self,
        *,
        name: str,
        incarnation: str,
        device: str,
        device_name: str,
        cores: int,
        vram_gib: float,
        host_gib: float | None = None,
        ledger: Ledger,
        link: Link,
        machine: DeviceInfo | None = None,
        renderers: int | None = None,
        gpu: str | None = None,
        watchdog: Watchdog | None = None,
        end_process: Callable[[int], object] = os._exit,
    ):
        self.name = name
        self._incarnation = incarnation
        self._device = device
        self._device_name = device_name
        self._machine = machine
        self._drained = False
        self._ledger = ledger
        self._link = link
        self._watchdog = watchdog or Watchdog()
        self._end_process = end_process
        self._epoch = ""
        self._sequence = 0
        self._beat_s = RENEW_S
        self._replaced = False
        self._tasks: dict[str, Task] = {}
        self._changed = asyncio.Event()
        self._retired = asyncio.Event()
        self._threads = ThreadPoolExecutor(cores + 1, thread_name_prefix="shard")
        self._meters = Meters(name, incarnation)
        changed = threading.Condition()
        self._urgent = UrgentQueue(changed)
        self._cores = Cores(cores, changed=changed, urgent=self._urgent.may_cut_in)
        self._device_meter = DeviceMeter(name, self._meters, idle_s=self._cores.idle_s, gpu=gpu)
        beside = renderers_on(machine, cores, most=renderers) if machine else 1
        self._engines = Engines(
            device, vram_gib, meters=self._meters, host_gib=host_gib, renderers=beside, measured=self._measured
        )
        self._cutin = CutIn(
            renderer=name,
            device=device_name,
            cores=self._cores,
            queue=self._urgent,
            engines=self._engines,
            meters=self._meters,
            on_lost=lambda: self._end_process(DEVICE_LOST_EXIT),
        )
        self._runners: OrderedDict[str, ShardRunner] = OrderedDict()
        self._runners_lock = threading.Lock()

    async def work(self) -> None:
        """Ask for leases and serve them until retired, and draw what is urgent meanwhile."""
        self._cutin.start()
        beat = asyncio.create_task(self._beat())
        telling = asyncio.create_task(self._tell())
        ended = threading.Event()
        threading.Thread(target=self._watch, args=(ended,), name="watchdog", daemon=True).start()
        serving: set[asyncio.Task[None]] = set()
        try:
            while not self._retired.is_set():
                if not self._has_room():
                    self._changed.clear()
                    await self._changed.wait()
                    continue
                lease = await self._ask_unless_retired()
                if lease is not None and lease.token not in self._tasks:
                    serving.add(served := asyncio.create_task(self._serve(lease)))
                    served.add_done_callback(serving.discard)
                    await asyncio.sleep(0)
            await asyncio.gather(*serving)
        finally:
            beat.cancel()
            telling.cancel()
            ended.set()
            self._end_urgent()
            self._threads.shutdown(wait=False)
            if self._replaced:
                self._end_process(REPLACED_EXIT)

    def retire(self) -> None:
        """Take no more work, and give back what is in hand within a denoising step."""
        self._retired.set()
        self._end_urgent()
        for token in list(self._tasks):
            self.drop(token)
        self._changed.set()

    def _end_urgent(self) -> None:
        self._cutin.close(RendererDiedError(f"{self.name} was asked to end; ask for another renderer"))

    async def draw(self, portion: Portion) -> Answer:
        """Draw urgent images as soon as their turn comes; a token that is in hand already brings the same answer.

        An image that fails says so in the answer. Raises CancelledError where the portion was dropped, RendererDiedError where
        this renderer ends, and what loading the model raises. Who stops waiting drops the portion.
        """
        answer = self._urgent.put(portion, now=time.monotonic())
        try:
            return await asyncio.wrap_future(answer)
        except asyncio.CancelledError:
            self._urgent.drop(portion.token)
            raise

    def warm(self, card: ModelCard, numerics: Numerics) -> None:
        """Load a model as soon as nothing else wants the device; of several calls the last one counts."""
        self._cutin.warm(card, numerics)

    def drop(self, token: str) -> None:
        """Stop working on a lease or a portion that is no longer ours, within a denoising step."""
        task = self._tasks.get(token)
        if task:
            task.stop.set()
        else:
            self._urgent.drop(token)

    def revoke(self, token: str) -> None:
        """Give a lease back if the device has not begun with it; one that has begun goes on."""
        task = self._tasks.get(token)
        if task:
            task.revoke()

    # The event loop's side

    def _has_room(self) -> bool:
        """One more shard than the device has room for: its prompts are read, and it starts when another's last batch ends."""
        wanted = sum(
            task.cores or self._cores.total for task in self._tasks.values() if task.stop.is_set() or not task.asks_next
        )
        return wanted < self._cores.total and len(self._tasks) <= self._cores.total

    async def _ask_unless_retired(self) -> Lease | None:
        """Ask for work; a question in flight when retired is dropped, and the lease it may bring is never reported."""
        asking = asyncio.create_task(self._ask())
        retired = asyncio.create_task(self._retired.wait())
        await asyncio.wait((asking, retired), return_when=asyncio.FIRST_COMPLETED)
        retired.cancel()
        if not asking.done():
            asking.cancel()
            return None
        return asking.result()

    async def _ask(self) -> Lease | None:
        question = Ask(self.name, self._incarnation, self._epoch, self._sequence, self._engines.loaded_model)
        try:
            reply = await self._call(lambda: self._link.ask(question))
            self._sequence += 1
            if reply.replaced:
                self._leave()
            if reply.meet:
                self._epoch = reply.epoch
                await self._call(self._meet)
                return None
            return reply.lease
        except Exception:
            log.exception("the dispatcher failed to answer", extra={"renderer": self.name})
            await asyncio.sleep(RENEW_S)
            return None

    async def _meet(self) -> None:
        held = tuple(task.lease for task in self._tasks.values() if not task.stop.is_set())
        hello = Hello(
            self.name, self._incarnation, self._device_name, held, machine=self._machine, drained=self._drained
        )
        for token in await self._link.meet(hello):
            self.drop(token)

    def _leave(self) -> None:
        """Put everything down and end this process: another has this renderer's name, since this one was given up."""
        log.warning("replaced, this process ends", extra={"renderer": self.name, "incarnation": self._incarnation})
        self._replaced = True
        self.retire()

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(self._beat_s)
            try:
                await self._renew()
            except FarmUnavailableError:
                log.info("no answer to a beat", extra={"renderer": self.name})
            except Exception:
                log.exception("the dispatcher failed on a beat", extra={"renderer": self.name})

    async def _renew(self) -> None:
        """Report on every lease in hand, so that what the dispatcher knows is of one moment."""
        reports = tuple(task.report() for task in self._tasks.values() if not task.stop.is_set())
        engines = self._engines
        standing = Standing(
            engines.loaded_model,
            engines.loading,
            self._urgent.in_hand,
            engines.load_s,
            urgent_ticks=self._urgent.ticks,
        )
        renewal = await self._link.renew(Beat(self.name, self._incarnation, self._epoch, reports, standing))
        self._beat_s = renewal.every_s
        if renewal.replaced:
            self._leave()
        if renewal.meet:
            self._epoch = renewal.epoch
            await self._meet()
        elif not renewal.replaced:
            self._drained = renewal.drained
        for token in renewal.gone:
            self.drop(token)

    async def _tell(self) -> None:
        """Tell what was counted, for as long as this renderer works."""
        while True:
            await asyncio.sleep(REPORT_S)
            try:
                await asyncio.to_thread(self._device_meter.measure)
                await self._link.report(self._meters.snapshot())
            except FarmUnavailableError:
                log.info("no answer to a report", extra={"renderer": self.name})
            except Exception:
                log.exception("what was counted could not be told", extra={"renderer": self.name})

    async def _serve(self, lease: Lease) -> None:
        task = Task(lease)
        self._tasks[lease.token] = task
        loop = asyncio.get_running_loop()
        try:
            end = await loop.run_in_executor(self._threads, self._result, task, loop)
            task.ended = True
            if isinstance(end, Completion):
                await self._call(lambda: self._link.complete(end))
                return
            log.warning("lease given back", extra={"renderer": self.name, "code": end.code, "reason": end.message})
            await self._call(lambda: self._link.give_back(end))
            if end.code == DeviceLostError.code:
                self._end_process(DEVICE_LOST_EXIT)
        except Exception:
            # The dispatcher answered with an error of its own. The receipt is stored, or the lease goes back unreported.
            log.exception("the end of a lease was not heard", extra={"renderer": self.name, "token": lease.token})
        finally:
            del self._tasks[lease.token]
            self._changed.set()

    async def _call(self, call: Callable[[], Awaitable[T]]) -> T:
        """Make a call until it is answered. Raises what the dispatcher raised, and FarmUnavailableError once retired."""
        tries = 0
        while True:
            try:
                return await call()
            except FarmUnavailableError:
                if self._retired.is_set():
                    raise
                await asyncio.sleep(CALL_AGAIN_S[min(tries, len(CALL_AGAIN_S) - 1)])
                tries += 1

    # The threads' side

    def _watch(self, ended: threading.Event) -> None:
        while not ended.wait(WATCH_S):
            at_work = [task.report() for task in list(self._tasks.values()) if not task.ended]
            at_work += self._cutin.reports()
            stuck = self._watchdog.look(at_work, now=time.monotonic())
            if stuck is not None:
                log.critical(
                    "stuck, this process ends",
                    extra={"renderer": self.name, "token": stuck.token, "stage": stuck.stage, "images": stuck.in_hand},
                )
                self._end_process(STUCK_EXIT)
                return

    def _result(self, task: Task, loop: asyncio.AbstractEventLoop) -> Completion | GiveBack:
        """Work on a lease to its end, whichever it is."""
        lease = task.lease
        try:
            return self._work_on(task, loop)
        except FarmError as exc:
            code = exc.code
            if isinstance(exc, CancelledError):
                code = "revoked" if task.revoked else "retired" if self._retired.is_set() else code
            return GiveBack(lease, self.name, code, exc.message)
        except Exception as exc:
            log.exception("lease failed", extra={"renderer": self.name, "job": lease.job, "shard": lease.shard})
            return GiveBack(lease, self.name, "internal", f"{type(exc).__name__}: {exc}")

    def _work_on(self, task: Task, loop: asyncio.AbstractEventLoop) -> Completion:
        lease = task.lease
        runner = self._runner(lease)
        if lease.task == "finalise":
            return self._finalise(task, runner.plan, loop)

        def on_progress(progress: ShardProgress) -> None:
            task.progress = progress
            if progress.last_batch and not task.asks_next:
                task.asks_next = True
                loop.call_soon_threadsafe(self._changed.set)
            if progress.announce:
                self._announce(task, loop, wait=not progress.aside)

        task.cores = min(runner.plan.numerics.threads, self._cores.total)
        loop.call_soon_threadsafe(self._changed.set)
        place = Place(self._cores, task.cores, begin=task.begin, engine_back=self._engines.give_back)
        receipt = runner.run(
            pass_number=lease.pass_number,
            shard=lease.shard,
            attempt=lease.attempt,
            skip=lease.skip,
            alone=lease.alone,
            cautious=lease.cautious,
            engine=lambda plan: place.use(self._engines.take(plan.card, plan.numerics)),
            on_device=place,
            on_progress=on_progress,
            cancelled=task.stop.is_set,
            aside=self._cutin,
        )
        failed = sum(row.status == "failed" for row in receipt.rows)
        return Completion(lease, self.name, len(receipt.rows) - failed, failed, receipt.seconds)

    def _finalise(self, task: Task, plan: Plan, loop: asyncio.AbstractEventLoop) -> Completion:
        if not task.begin():
            raise CancelledError("the lease was asked back before it had begun")
        task.asks_next = True  # it needs no device
        loop.call_soon_threadsafe(self._changed.set)

        def on_rows(rows: int) -> None:
            if task.stop.is_set():
                raise CancelledError("the lease was taken away while the dataset was written")
            task.progress = ShardProgress(stage="finalise", ticks=rows, fraction=1.0)

        on_rows(0)
        totals = finalise(self._ledger, plan, task.lease.pass_number, on_rows=on_rows)
        return Completion(task.lease, self.name, totals.ok, totals.failed)

    def _announce(self, task: Task, loop: asyncio.AbstractEventLoop, *, wait: bool) -> None:
        """Let the dispatcher know what is in hand before it can end this process; for ANNOUNCE_S at most.

        Urgent images do not `wait` for that: it is on its way while they are drawn, and a beat brings it where it is lost.
        """
        told = asyncio.run_coroutine_threadsafe(self._renew(), loop)
        if not wait:
            return
        try:
            told.result(timeout=ANNOUNCE_S)
        except (TimeoutError, FarmUnavailableError):
            told.cancel()
            log.warning("announcement not answered", extra={"renderer": self.name, "token": task.lease.token})
        except Exception:
            # The dispatcher's own trouble, which is no reason to give up the shard.
            log.exception("the dispatcher failed on an announcement", extra={"renderer": self.name})

    def _measured(self, card: ModelCard, numerics: Numerics) -> WorkingMemory | None:
        """What `farm bench` measured of a model on such a GPU; a store that is silent is waited for PROFILE_S."""
        if numerics.device == "cpu":
            return None
        found: list[WorkingMemory | None] = []

        def read() -> None:
            try:
                profile = self._ledger.profile(card.name, self._device_name, card.accelerated_on(numerics.device))
                found.append(measured_of(profile, card, numerics))
            except StoreError as exc:
                log.warning("profile not read, memory is estimated", extra={"model": card.name, "reason": exc.message})

        reading = threading.Thread(target=read, name="profile", daemon=True)
        reading.start()
        reading.join(PROFILE_S)
        return found[0] if found else None

    def _runner(self, lease: Lease) -> ShardRunner:
        """The runner of a lease's plan; the last few are kept, with the prompts that they have read."""
        with self._runners_lock:
            runner = self._runners.pop(lease.run, None) or self._open_runner(lease)
            self._runners[lease.run] = runner
            while len(self._runners) > RUNNERS_KEPT:
                self._runners.popitem(last=False)
            return runner

    def _open_runner(self, lease: Lease) -> ShardRunner:
        plan = next((plan for plan in self._ledger.plans(lease.job) if plan.run == lease.run), None)
        if plan is None:
            raise RecordError(f"job {lease.job}: run {lease.run} is leased and has no plan; was the job deleted?")
        return ShardRunner(self._ledger, plan, renderer=self.name, device=self._device_name, meters=self._meters)
