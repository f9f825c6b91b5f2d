"""A renderer that follows the protocol of `farm/renderer.py` without drawing: batches are spans of time.

One shard on the device, one lease ahead, the last one's pictures on their way to the store. It can die, hang, stand still
or be cut off at any moment, and what it wrote until then is written.
"""

from collections.abc import Callable
from typing import Protocol

from farm.idle import NO_PROGRESS_S
from farm.lease import (
    RENEW_S,
    STAGE_LIMIT_S,
    Ask,
    Beat,
    Completion,
    GiveBack,
    Hello,
    Lease,
    Renewal,
    Reply,
    Report,
)
from farm.simulation.jobs import Books, SimReceipt, SimRun
from farm.simulation.network import Network
from farm.simulation.store import UNAVAILABLE
from farm.simulation.task import Task
from farm.simulation.world import World

CALL_AGAIN_S = (0.1, 0.2, 0.5, 1.0, 2.0)
ANNOUNCE_S = 5.0
STEPS = 8
"""Steps of one batch, each a tick."""
ENCODE_S = 0.2
WRITE_S = 0.3
"""How long the last pictures of a shard are on their way when the device is free again."""


class Watcher(Protocol):
    """What is told of a renderer's own deeds, for the audit."""

    def worked(self, renderer: "SimRenderer", lease: Lease, seconds: float) -> None: ...
    def loaded(self, renderer: "SimRenderer", lease: Lease, seconds: float) -> None: ...
    def died_with(self, renderer: "SimRenderer", task: "Task | None") -> None: ...
    def finalising(self, lease: Lease) -> None: ...


class SimRenderer:
    """One process with one GPU. `speed` 2 takes half the time. `load_s`: seconds that a change of model costs."""

    def __init__(
        self,
        world: World,
        network: Network,
        books: Books,
        watcher: Watcher,
        *,
        name: str,
        incarnation: str,
        speed: float,
        load_s: float,
        unfit: frozenset[str] = frozenset(),
    ):
        self.name = name
        self.incarnation = incarnation
        self.alive = True
        self.cut = False
        self.retired = False
        self.hung = False
        self.deaf = False
        self.still_until = 0.0
        self.tasks: dict[str, Task] = {}
        self.parked_since: float | None = None
        self.loaded_model: str | None = None
        self.on_death: Callable[[SimRenderer], None] = lambda renderer: None
        self._world = world
        self._network = network
        self._books = books
        self._watcher = watcher
        self._speed = speed
        self._load_s = load_s
        self._unfit = unfit
        self._epoch = ""
        self._sequence = 0
        self._asking = False
        self._device: Task | None = None
        self._queue: list[Task] = []
        self._after(world.rng.random() * RENEW_S, self._beat)
        self._after(0.0, self._pump)

    @property
    def busy(self) -> bool:
        """Whether something is on the device."""
        return self._device is not None

    @property
    def unheard_s(self) -> float:
        """For how long nobody can know that what is on the device hangs: as long as a slow shard takes."""
        ahead = self._device
        return max(NO_PROGRESS_S, ahead.lease.images * ahead.run.image_s / 0.25) if ahead else 0.0

    def hoards(self, longer_than_s: float) -> tuple[Lease, Lease] | None:
        """A lease that has not begun, and will not for so many seconds, and the one that is truly on the device."""
        ahead = self._device
        if ahead is None or ahead.stage == "load" or self.cut or self.still_until > self._world.now or not self.alive:
            return None
        if not self.hung and (ahead.batches or ahead.until - self._world.now <= longer_than_s):
            return None
        return next(((task.lease, ahead.lease) for task in self._queue if not task.stop), None)

    # What happens to it

    def die(self) -> None:
        """The process ends, here and now."""
        if not self.alive:
            return
        self.alive = False
        self._watcher.died_with(self, self._device)
        self._world.say(f"{self.name}/{self.incarnation} dies holding {list(self.tasks)}")
        self.on_death(self)

    def hang(self, *, deaf: bool) -> None:
        """What is on the device never ends; a `deaf` one cannot even end its own process."""
        if self.alive and self._device is not None and not self.hung:
            self.hung, self.deaf = True, deaf
            self._freeze_ticks(self._device)
            self._device.turn += 1
            self._world.say(f"{self.name} hangs with {self._device.in_hand}")

    def stand_still(self, seconds: float) -> None:
        """The process does nothing for a while, then goes on as if nothing had been."""
        self.still_until = max(self.still_until, self._world.now + seconds)
        self._world.say(f"{self.name} stands still for {seconds:.0f} s")

    def drop(self, token: str) -> None:
        """Stop with a lease within a step."""
        task = self.tasks.get(token)
        if task is not None and not task.stop:
            task.stop = True
            step_s = task.run.image_s * task.run.batch / STEPS / self._speed
            self._after(self._world.rng.random() * step_s, self._stopped, task)

    def revoke(self, token: str) -> None:
        """Give a lease back if it has not begun."""
        task = self.tasks.get(token)
        if task is not None and not task.stop and task.stage == "waiting" and task is not self._device:
            task.stop = True
            self._give_back(task, "revoked", "asked back before it had begun")

    # Time of a process that may stand still or be dead by then

    def _after(self, delay_s: float, deed: Callable[..., object], *given: object) -> None:
        self._world.after(delay_s, self._do, deed, given)

    def _do(self, deed: Callable[..., object], given: tuple[object, ...]) -> None:
        if not self.alive:
            return
        wait = self.still_until - self._world.now
        if wait > 0:
            self._world.after(wait + 0.001, self._do, deed, given)
        else:
            deed(*given)

    def _call(self, method: str, argument: object, answered: Callable[..., object], tries: int = 0) -> None:
        """Call until answered."""

        def failed() -> None:
            pause = CALL_AGAIN_S[min(tries, len(CALL_AGAIN_S) - 1)]
            self._after(pause, self._call, method, argument, answered, tries + 1)

        self._network.call(self, method, argument, lambda answer: self._do(answered, (answer,)), failed)

    # Asking

    def _has_room(self) -> bool:
        return len(self.tasks) <= 1 and all(task.asks_next and not task.stop for task in self.tasks.values())

    def _pump(self) -> None:
        if self._asking or not self._has_room():
            return
        self._asking = True
        self.parked_since = self._world.now
        question = Ask(self.name, self.incarnation, self._epoch, self._sequence, self.loaded_model)
        self._call("ask", question, self._answered)

    def _answered(self, reply: Reply) -> None:
        self._asking = False
        self.parked_since = None
        self._sequence += 1
        if reply.replaced:
            self._replaced()
            return
        if reply.meet:
            self._epoch = reply.epoch
            self._meet()
            return
        lease = reply.lease
        if lease is not None and lease.token not in self.tasks:
            self._serve(lease)
        self._pump()

    def _meet(self, *, ask: bool = True) -> None:
        if ask:
            self._asking = True
        held = tuple(task.lease for task in self.tasks.values() if not task.stop)
        hello = Hello(self.name, self.incarnation, "sim", held)
        self._call("meet", hello, self._met_to_ask if ask else self._met)

    def _met(self, dropped: tuple[str, ...]) -> None:
        for token in dropped:
            self.drop(token)

    def _met_to_ask(self, dropped: tuple[str, ...]) -> None:
        self._asking = False
        self._met(dropped)
        self._pump()

    # Beating

    def _beat(self) -> None:
        if self.hung and not self.deaf and self._device is not None:
            task = self._device
            if self._world.now - task.progressed_at > STAGE_LIMIT_S[task.stage]:
                self._world.say(f"{self.name} sees itself stuck and ends")
                self.die()
                return
        self._network.call(self, "renew", self._report(), self._renewed, self._not_renewed)

    def _report(self) -> Beat:
        reports = tuple(self._of(task) for task in self.tasks.values() if not task.stop)
        return Beat(self.name, self.incarnation, self._epoch, reports)

    def _of(self, task: Task) -> Report:
        if task.in_hand and not self.hung:
            self._advance_ticks(task)
        steps = task.ticks % (STEPS + 2) / STEPS if task.in_hand else 0.0
        share = (task.drawn + min(1.0, steps) * len(task.in_hand)) / task.lease.images if task.lease.images else 0.0
        return Report(task.lease.token, task.stage, task.ticks, min(1.0, share), task.in_hand)

    def _advance_ticks(self, task: Task) -> None:
        span = task.until - task.began
        steps = int(STEPS * (self._world.now - task.began) / span) if span > 0 else 0
        before = task.ticks // (STEPS + 2) * (STEPS + 2)
        task.ticks = max(task.ticks, before + min(STEPS, steps))

    def _freeze_ticks(self, task: Task) -> None:
        if task.in_hand:
            self._advance_ticks(task)
        task.progressed_at = self._world.now

    def _renewed(self, renewal: Renewal) -> None:
        if self.alive:
            self._do(self._heed, (renewal,))
            self._after(renewal.every_s, self._beat)

    def _replaced(self) -> None:
        """Another process has this one's name."""
        self._world.say(f"{self.name}/{self.incarnation} is replaced, and ends")
        self.die()

    def _heed(self, renewal: Renewal) -> None:
        if renewal.replaced:
            self._replaced()
            return
        if renewal.meet:
            self._epoch = renewal.epoch
            self._meet(ask=False)
        for token in renewal.gone:
            self.drop(token)

    def _not_renewed(self) -> None:
        self._after(RENEW_S, self._beat)

    # A lease's way

    def _serve(self, lease: Lease) -> None:
        job = self._books.store.get(("plan", lease.job))
        run = next((run for run in job.runs if run.run == lease.run), None) if job else None
        if run is None:
            gone = GiveBack(lease, self.name, "record", f"run {lease.run} is leased and has no plan")
            self._call("give_back", gone, lambda _: self._pump())
            return
        task = Task(lease, run, self._world.now)
        self.tasks[lease.token] = task
        if lease.task == "finalise":
            task.asks_next = True
            task.stage = "finalise"
            self._read_receipts(task)
            return
        self._look_for_receipt(task)

    def _look_for_receipt(self, task: Task) -> None:
        lease, turn = task.lease, task.turn
        key = ("receipt", lease.run, lease.pass_number, lease.shard)

        def seen(found: object) -> None:
            if task.turn != turn or lease.token not in self.tasks:
                return
            if found is UNAVAILABLE:
                self._give_back(task, "store_unavailable", "the receipt could not be looked for")
            elif isinstance(found, SimReceipt):
                self._complete(task, found)
            elif lease.run in self._unfit:
                self._give_back(task, "does_not_fit", "this renderer's device cannot run the plan")
            else:
                self._queue.append(task)
                self._next_on_device()

        self._books.store.read(lambda: self._books.store.get(key), lambda found: self._do(seen, (found,)))

    def _next_on_device(self) -> None:
        while self._device is None and self._queue:
            task = self._queue.pop(0)
            if not task.stop and task.lease.token in self.tasks:
                self._begin(task)

    def _begin(self, task: Task) -> None:
        lease, run = task.lease, task.run
        self._device = task
        task.batches = self._cut(lease, run)
        if not task.batches:
            self._device = None
            self._store(task)
            return
        task.stage, task.ticks = "load", task.ticks + 1
        task.progressed_at = self._world.now
        if self.loaded_model != run.model:
            task.load_s = self._load_s
        self._after(task.load_s + ENCODE_S / self._speed, self._loaded, task, task.turn)

    def _cut(self, lease: Lease, run: SimRun) -> list[tuple[int, ...]]:
        """The planned batches without what is to be skipped, then those to be drawn alone."""
        indexes = self._books.shard_indexes(run, lease.pass_number, lease.shard)
        alone = frozenset(indexes) if lease.cautious else lease.alone
        task_batches = []
        for start in range(0, len(indexes), run.batch):
            planned = [i for i in indexes[start : start + run.batch] if i not in lease.skip]
            together = tuple(i for i in planned if i not in alone)
            task_batches += [together] if together else []
            task_batches += [(i,) for i in planned if i in alone]
        return task_batches

    def _loaded(self, task: Task, turn: int) -> None:
        if task.turn != turn:
            return
        if self._world.chance(self._world.faults.deadly_loads):
            self.die()
            return
        if task.load_s:
            self.loaded_model = task.run.model
            self._watcher.loaded(self, task.lease, task.load_s)
        if self._world.chance(self._world.faults.errors):
            self._off_device(task)
            self._give_back(task, "internal", "something that nobody explains")
            return
        self._next_batch(task)

    def _next_batch(self, task: Task) -> None:
        batch = task.batches.pop(0)
        alone = len(batch) == 1 and batch[0] in task.lease.alone
        task.stage, task.in_hand = "denoise", batch
        task.ticks = (task.ticks // (STEPS + 2) + 1) * (STEPS + 2)
        task.began = task.until = task.progressed_at = self._world.now
        if not task.batches:
            task.asks_next = True
            self._after(0.0, self._pump)
        if task.lease.attempt > 1 or task.lease.cautious or alone:
            self._announce(task, batch)
        else:
            self._draw(task, batch, task.turn)

    def _announce(self, task: Task, batch: tuple[int, ...]) -> None:
        """Tell what is about to be drawn, and draw when that was heard, or after a while."""
        task.turn += 1
        turn = task.turn

        def heard(renewal: Renewal) -> None:
            if renewal.meet or renewal.replaced:
                self._heed(renewal)
            self._draw(task, batch, turn)

        beat = self._report()
        self._network.call(self, "renew", beat, lambda answer: self._do(heard, (answer,)), lambda: None)
        self._after(ANNOUNCE_S, self._draw, task, batch, turn)

    def _draw(self, task: Task, batch: tuple[int, ...], turn: int) -> None:
        if task.turn != turn:
            return
        task.turn += 1
        now = self._world.now
        span = task.run.image_s * len(batch) / self._speed
        task.began, task.until, task.progressed_at = now, now + span, now
        if not task.run.poison.isdisjoint(batch):
            self._after(span * self._world.rng.random(), self._poisoned, task, task.turn)
        else:
            self._after(span, self._drawn, task, task.turn, batch, span)

    def _poisoned(self, task: Task, turn: int) -> None:
        if task.turn == turn:
            self._world.say(f"{self.name}: poison in {task.in_hand}")
            self.die()

    def _drawn(self, task: Task, turn: int, batch: tuple[int, ...], span: float) -> None:
        if task.turn != turn:
            return
        task.ticks = task.ticks // (STEPS + 2) * (STEPS + 2) + STEPS + 1
        task.in_hand = ()
        task.drawn += len(batch)
        task.seconds += span
        task.failed.update(task.run.bad.intersection(batch))
        self._watcher.worked(self, task.lease, span)
        if task.batches:
            self._next_batch(task)
        else:
            self._off_device(task)
            self._store(task)

    def _off_device(self, task: Task) -> None:
        """The device is free for what waits."""
        task.in_hand = ()
        if self._device is task:
            self._device = None
            self._next_on_device()

    def _store(self, task: Task) -> None:
        task.stage, task.asks_next = "write", True
        task.ticks += STEPS + 2
        self._after(0.0, self._pump)
        self._after(WRITE_S, self._commit, task, task.turn)

    def _commit(self, task: Task, turn: int) -> None:
        if task.turn != turn or task.stop:
            return
        task.committing = True
        lease, run = task.lease, task.run
        indexes = self._books.shard_indexes(run, lease.pass_number, lease.shard)
        rows = tuple(not (i in lease.skip or i in task.failed) for i in indexes)
        seconds = {"load": task.load_s, "denoise": task.seconds, "total": self._world.now - task.began}
        receipt = SimReceipt(self.name, indexes, rows, seconds)
        key = ("receipt", lease.run, lease.pass_number, lease.shard)

        def answered(won: object) -> None:
            if won is UNAVAILABLE:
                self._give_back(task, "store_unavailable", "the receipt could not be written")
            elif won:
                self._complete(task, receipt)
            else:
                self._read_theirs(task)

        self._books.store.write(key, receipt, lambda won: self._do(answered, (won,)))

    def _read_theirs(self, task: Task) -> None:
        """Another's receipt was first."""
        lease = task.lease
        key = ("receipt", lease.run, lease.pass_number, lease.shard)

        def seen(found: object) -> None:
            if isinstance(found, SimReceipt):
                self._complete(task, found)
            else:
                self._give_back(task, "store_unavailable", "the other's receipt could not be read")

        self._books.store.read(lambda: self._books.store.get(key), lambda found: self._do(seen, (found,)))

    def _read_receipts(self, task: Task) -> None:
        """Finalise: read every receipt of the pass, then write the totals."""
        lease, turn, shards = task.lease, task.turn, self._books.shards(task.run, task.lease.pass_number)

        def read(receipts: object) -> None:
            if task.turn != turn:
                return
            if receipts is UNAVAILABLE:
                self._give_back(task, "store_unavailable", "the receipts could not be read")
                return
            if self._world.chance(self._world.faults.deadly_finalises):
                self.die()
                return
            self._watcher.finalising(lease)
            task.committing = True
            self._books.store.write(
                ("totals", lease.run, lease.pass_number), receipts, lambda won: self._do(written, (won,))
            )

        def written(won: object) -> None:
            if won is UNAVAILABLE:
                self._give_back(task, "store_unavailable", "the totals could not be written")
            else:
                self._end(task, "complete", Completion(lease, self.name, 0, 0))

        def look() -> int:
            found = (self._books.receipt(lease.run, lease.pass_number, shard) for shard in range(shards))
            return sum(len(receipt.rows) for receipt in found if receipt is not None)

        task.ticks += 1
        self._books.store.read(look, lambda found: self._do(read, (found,)))

    # A lease's ends

    def _stopped(self, task: Task) -> None:
        """A step after it was told to stop; a receipt on its way goes on."""
        if task.committing or task.lease.token not in self.tasks or (self.hung and task is self._device):
            return
        task.turn += 1
        self._give_back(task, "cancelled", "no longer ours")
        self._off_device(task)

    def _complete(self, task: Task, receipt: SimReceipt) -> None:
        failed = len(receipt.rows) - sum(receipt.rows)
        done = Completion(task.lease, self.name, len(receipt.rows) - failed, failed, receipt.seconds)
        self._end(task, "complete", done)

    def _give_back(self, task: Task, code: str, message: str) -> None:
        self._end(task, "give_back", GiveBack(task.lease, self.name, code, message))

    def _end(self, task: Task, method: str, said: Completion | GiveBack) -> None:
        task.turn += 1
        if task in self._queue:
            self._queue.remove(task)
        self._call(method, said, lambda _: self._ended(task))

    def _ended(self, task: Task) -> None:
        self.tasks.pop(task.lease.token, None)
        self._pump()
