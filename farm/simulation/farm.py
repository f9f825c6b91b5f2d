"""The process around a dispatcher's rules, as `actors/dispatcher.py` is: it reads the bucket, parks questions, keeps renderers.

What it knows dies with it. Renderers live on, as Ray's actors do, and are found again by their names.
"""

from collections.abc import Callable, Mapping
from typing import Any

from farm.dispatch import Dispatch
from farm.lease import POLL_S, Ask, Beat, Check, Completion, Drop, End, GiveBack, Hello, Lease, Read, Revoke
from farm.records import Standing
from farm.simulation.audit import Audit
from farm.simulation.claims import SimClaims
from farm.simulation.jobs import Books, SimReceipt
from farm.simulation.network import Call, Network
from farm.simulation.renderers import SimRenderer
from farm.simulation.store import UNAVAILABLE
from farm.simulation.world import World

TICK_S = 1.0
CONTROLS_S = 3.0
ELSEWHERE_S = 9.0
"""How often a job that another farm renders is read again."""
GREETING_S = 3.0
RESTART_S = 1.4
START_AGAIN_S = 1.0
NODE_DEATH_S = 4.0
"""How long Ray takes to notice that a node is gone."""
ZOMBIE_S = 5.0
"""How long a process that was cut off lives on after it is healed."""

Make = Callable[..., Dispatch]
MakeRenderer = Callable[["Farm", str, str], SimRenderer]


class _Parked:
    """A question that waits for work, answered or given up at `until`."""

    __slots__ = ("ask", "call", "reply", "until")

    def __init__(self, ask: Ask, call: Call, reply: Callable[[Any], None], until: float):
        self.ask = ask
        self.call = call
        self.reply = reply
        self.until = until


class Farm:
    """A dispatcher and its renderers. `slots`: how many renderers it keeps."""

    def __init__(
        self,
        world: World,
        books: Books,
        audit: Audit,
        *,
        name: str,
        slots: int,
        make: Make,
        make_renderer: MakeRenderer,
        shares: Mapping[str, float],
        wall: Callable[[], float],
        claims: bool = False,
    ):
        self.name = name
        self.network = Network(world, self)
        self.slots: dict[str, SimRenderer | None] = {f"{name}{slot}": None for slot in range(slots)}
        self.zombies: list[SimRenderer] = []
        self.dispatch: Dispatch | None = None
        self.up = False
        self.life = 0
        self.still_until = 0.0
        self._world = world
        self._books = books
        self._audit = audit
        self._make = make
        self._make_renderer = make_renderer
        self._shares = shares
        self._wall = wall
        self._with_claims = claims
        self._claims: SimClaims | None = None
        self._parked: list[_Parked] = []
        self._early: list[tuple[Call, Callable[[Any], None]]] = []
        self._reading: dict[str, bool] = {}
        self._seen: dict[str, object] = {}
        self._woken = False
        self._grants_from = 0.0
        self._started = 0
        self._to_take_up: set[str] = set()
        self._again: set[str] = set()
        self._looked_at: dict[str, float] = {}
        self._start()

    # Its life

    def kill(self) -> None:
        """The dispatcher's process ends; Ray starts it again."""
        if self.dispatch is None:
            return
        world = self._world
        world.say(f"dispatcher {self.name} is killed")
        self.life += 1
        self._audit.forgets(self)
        self.dispatch = None
        self.up = False
        self.still_until = 0.0
        for parked in self._parked:
            world.after(0.1 + world.rng.random() * RESTART_S, parked.call.fail)
        for call, _ in self._early:
            world.after(0.1 + world.rng.random() * RESTART_S, call.fail)
        self._parked, self._early = [], []
        self._reading, self._seen, self._woken = {}, {}, False
        self._again.clear()
        world.after(RESTART_S, self._start)

    def stand_still(self, seconds: float) -> None:
        """The dispatcher's process does nothing for a while."""
        self.still_until = max(self.still_until, self._world.now + seconds)
        self._world.say(f"dispatcher {self.name} stands still for {seconds:.0f} s")

    def _start(self) -> None:
        self.dispatch = self._make(epoch=f"{self.name}.{self.life}", shares=self._shares, claims=self._with_claims)
        self._world.say(f"dispatcher {self.dispatch.epoch} starts")
        self._audit.begins(self)
        if self._with_claims:
            self._claims = SimClaims(
                self._books.store,
                self.name,
                now=lambda: self._world.now,
                later=self._after,
                heard=self._mine,
                held=self._claimed,
            )
        self._list_open()

    def _list_open(self) -> None:
        def listed(found: Any) -> None:
            if found is UNAVAILABLE:
                self._after(TICK_S, self._list_open)
                return
            self._to_take_up = set(found)
            for job in found:
                self._read(job)
            if not found:
                self._ready()

        self._books.store.read(self._books.open_jobs, self._mine(listed))

    def _ready(self) -> None:
        if self.up:
            return
        self.up = True
        alive = any(renderer is not None and renderer.alive for renderer in self.slots.values())
        self._grants_from = self._world.now + (GREETING_S if alive else 0.0)
        for name, renderer in self.slots.items():
            if renderer is None or not renderer.alive:
                self._new_renderer(name)
        early, self._early = self._early, []
        for call, reply in early:
            self.receive(call, reply)
        self._after(TICK_S, self._tick)
        self._after(CONTROLS_S, self._watch)

    # Time of a process that may stand still, or be another by then

    def _after(self, delay_s: float, deed: Callable[..., object], *given: object) -> None:
        self._world.after(delay_s, self._do, self.life, deed, given)

    def _do(self, life: int, deed: Callable[..., object], given: tuple[object, ...]) -> None:
        if life != self.life:
            return
        wait = self.still_until - self._world.now
        if wait > 0:
            self._world.after(wait + self._world.rng.random() * 0.01, self._do, life, deed, given)
        else:
            deed(*given)

    def _mine(self, then: Callable[[Any], object]) -> Callable[[Any], object]:
        """An answer of the store, heard only by the process that asked."""
        life = self.life
        return lambda answer: self._do(life, then, (answer,))

    # Calls of renderers

    def receive(self, call: Call, reply: Callable[[Any], None]) -> None:
        """Take a call in; while the process starts it waits."""
        world = self._world
        if self.dispatch is None:
            world.after(0.1 + world.rng.random() * RESTART_S, call.fail)
        elif self.still_until > world.now:
            world.after(
                self.still_until - world.now + world.rng.random() * 0.01, self._stood_still, self.life, call, reply
            )
        elif not self.up:
            self._early.append((call, reply))
        else:
            self._serve(call.method, call, reply)

    def _stood_still(self, life: int, call: Call, reply: Callable[[Any], None]) -> None:
        """Take in a call that came while the process stood still, if it is still the same."""
        if life == self.life:
            self.receive(call, reply)
        else:
            call.fail()

    def _serve(self, method: str, call: Call, reply: Callable[[Any], None]) -> None:
        dispatch, now, said = self._rules, self._world.now, call.argument
        if method == "renew":
            assert isinstance(said, Beat)
            renewal = dispatch.renew(said, now=now)
            self._audit.renewed(self, said, renewal)
            reply(renewal)
        elif method == "ask":
            self._ask(_Parked(said, call, reply, now + POLL_S))
        elif method == "meet":
            assert isinstance(said, Hello)
            refused = dispatch.meet(said, now=now)
            self._audit.met(self, said, refused)
            reply(refused)
        elif method == "complete":
            assert isinstance(said, Completion)
            dispatch.complete(said, now=now)
            self._audit.completed(self, said)
            reply(None)
        else:
            assert isinstance(said, GiveBack)
            dispatch.give_back(said, now=now)
            self._audit.gave_back(self, said)
            reply(None)
        self._heed(wake=method in ("meet", "complete", "give_back"))

    def _ask(self, parked: _Parked) -> bool:
        """Answer a question, or park it; whether it was answered."""
        now = self._world.now
        reply = self._rules.ask(parked.ask, now=now, grants=now >= self._grants_from)
        if reply.lease is not None:
            self._audit.granted(self, parked.ask, reply.lease, may=now >= self._grants_from)
        if not reply.is_final and now < parked.until:
            if parked not in self._parked:
                self._parked.append(parked)
            return False
        if reply.lease is not None:
            self._world.say(f"{self.name} leases {_brief(reply.lease)} to {parked.ask.renderer}")
        parked.reply(reply)
        return True

    @property
    def parked(self) -> list[Ask]:
        """Questions that wait, and whose askers do."""
        return [one.ask for one in self._parked if not one.call.settled]

    @property
    def grants(self) -> bool:
        """Whether new leases are given."""
        return self.up and self._world.now >= self._grants_from and self._world.now >= self.still_until

    @property
    def _rules(self) -> Dispatch:
        assert self.dispatch is not None
        return self.dispatch

    def _wake_all(self) -> None:
        if self._parked and not self._woken:
            self._woken = True
            self._after(0.0, self._wake)

    def _wake(self) -> None:
        self._woken = False
        if self._parked:
            self._parked = [parked for parked in self._parked if not self._ask(parked)]
            self._heed(wake=False)

    # What the rules want done

    def _heed(self, *, wake: bool) -> None:
        for effect in self._rules.effects():
            self._audit.effect(self, effect)
            match effect:
                case Drop(renderer, token):
                    self._tell(renderer, "drop", token)
                case Revoke(renderer, token):
                    self._tell(renderer, "revoke", token)
                case End(renderer, why):
                    self._world.say(f"{self.name} ends {renderer}: {why}")
                    self._end(renderer)
                case Check():
                    self._check(effect)
                case Read(job):
                    self._read(job)
        if wake:
            self._wake_all()

    def _tell(self, name: str, what: str, token: str) -> None:
        """Call a renderer; who is cut off or gone hears nothing."""
        renderer = self.slots.get(name)
        if renderer is None or not renderer.alive or renderer.cut:
            return
        self._world.say(f"{name}: {what} {token}")
        delay = 0.002 + (self._world.rng.random() * 3 if self._world.chance(self._world.faults.slow) else 0.0)
        deed = renderer.drop if what == "drop" else renderer.revoke
        self._world.after(delay, renderer._do, deed, (token,))

    def _end(self, name: str) -> None:
        renderer = self.slots.get(name)
        if renderer is None or not renderer.alive:
            return
        if renderer.cut:
            self._world.after(NODE_DEATH_S, self.slot_lost, renderer)
        else:
            renderer.die()

    def _check(self, check: Check) -> None:
        key = ("receipt", check.run, check.pass_number, check.shard)

        def seen(found: object) -> None:
            if found is UNAVAILABLE:
                self._after(TICK_S, self._check, check)
                return
            done = _as_completion(check, found) if isinstance(found, SimReceipt) else None
            self._rules.checked(check, done, now=self._world.now)
            self._audit.checked(self, check, done)
            self._heed(wake=True)

        self._books.store.read(lambda: self._books.store.get(key), self._mine(seen))

    # Jobs

    def tell_of(self, job: str) -> None:
        """Somebody says that there is something new about a job; what had stalled is tried again."""
        if self.up:
            self._again.add(job)
            self._after(0.0, self._read, job)

    def _read(self, job: str) -> None:
        """Read a job and take it up; one reading of a job at a time."""
        if job in self._reading:
            self._reading[job] = True
            return
        self._reading[job] = False
        self._read_controls(job)

    def _read_controls(self, job: str) -> None:
        def heard(found: Any) -> None:
            if found is UNAVAILABLE:
                self._after(TICK_S, self._read_controls, job)
                return
            said, self._seen[job] = found
            self._read_passes(job, said)

        self._books.store.read(lambda: (self._books.standing(job), self._mark(job)), self._mine(heard))

    def _read_passes(self, job: str, said: Standing) -> None:
        def seen(view: Any) -> None:
            if view is UNAVAILABLE:
                self._after(TICK_S, self._read_passes, job, said)
                return
            # Some time lies between the last look into the bucket and this.
            self._after(self._world.rng.random() * 0.2, self._take_up, job, view)

        self._books.store.read(lambda: self._books.view(job, said), self._mine(seen))

    def _take_up(self, job: str, view: Any) -> None:
        self._audit.takes_up(self, view)
        self._rules.take_up(view, again=job in self._again, now=self._world.now)
        self._again.discard(job)
        if self._world.tell is not None:
            runs = [(entry.run, entry.pass_number, entry.done.flags().astype(int).tolist()) for entry in view.runs]
            self._world.say(f"{self.name} takes up {job}: {view.state} priority {view.priority} {runs}")
        if self._claims is not None:
            if view.state != "deleted" and view.runs:
                self._claims.follow(job)
            else:
                self._claims.release(job)
        self._heed(wake=True)
        again = self._reading.pop(job, False)
        self._to_take_up.discard(job)
        if not self.up and not self._to_take_up:
            self._ready()
        if again:
            self._read(job)

    def _claimed(self, job: str, held: bool, by: str) -> None:
        self._audit.claimed(self, job, held=held)
        self._rules.claimed(job, held, by=by, now=self._world.now)
        self._heed(wake=True)

    def _mark(self, job: str) -> object:
        """What changes when somebody writes about a job."""
        sim = self._books.job(job)
        return sim and (len(self._books.controls(job)), len(sim.runs), [self._books.passes(run) for run in sim.runs])

    def _watch(self) -> None:
        """Look for what was written by somebody who could not reach this process."""
        books, mine = self._books, self._rules.jobs()

        def look() -> dict[str, object]:
            return {job: self._mark(job) for job in dict.fromkeys([*books.open_jobs(), *mine])}

        def seen(found: Any) -> None:
            self._after(CONTROLS_S, self._watch)
            for job, mark in found.items() if found is not UNAVAILABLE else ():
                if job not in self._seen or self._seen[job] != mark or self._is_elsewhere(job):
                    self._read(job)

        books.store.read(look, self._mine(seen))

    def _is_elsewhere(self, job: str) -> bool:
        """Whether another farm renders a job, and it is time to see how far it is."""
        shown = self._rules.progress(job)
        if shown is None or shown.state != "elsewhere" or self._world.now < self._looked_at.get(job, 0.0) + ELSEWHERE_S:
            return False
        self._looked_at[job] = self._world.now
        return True

    def _tick(self) -> None:
        self._after(TICK_S, self._tick)
        wall = self._wall()
        self._audit.ticks(self, wall)
        self._rules.tick(now=self._world.now, wall=wall)
        self._heed(wake=True)

    # Renderers

    def _new_renderer(self, name: str) -> None:
        self._started += 1
        renderer = self._make_renderer(self, name, f"i{self._started:04d}")
        renderer.on_death = self._died
        self.slots[name] = renderer
        self._world.say(f"{name} starts as {renderer.incarnation}")

    def _died(self, renderer: SimRenderer) -> None:
        """Ray notices within milliseconds, or some seconds where the node is gone."""
        if renderer in self.zombies:
            self.zombies.remove(renderer)
            return
        delay = NODE_DEATH_S * self._world.rng.random() if self._world.chance(self._world.faults.slow) else 0.01
        self._world.after(delay, self.slot_lost, renderer)

    def slot_lost(self, renderer: SimRenderer) -> None:
        """A slot's renderer is given up: dead, or on a node that nobody reaches."""
        if self.slots.get(renderer.name) is not renderer:
            return
        self.slots[renderer.name] = None
        if renderer.alive:
            self.zombies.append(renderer)
            if not renderer.cut:  # healed before anybody noticed that it was gone: its node ends itself
                self._world.after(self._world.rng.random() * ZOMBIE_S, renderer.die)
        if self.up:
            self._after(0.0, self._replace, renderer.name)

    def _replace(self, name: str) -> None:
        self._audit.lost(self, name)
        self._rules.lost(name, now=self._world.now)
        self._heed(wake=True)
        self._after(START_AGAIN_S, self._new_if_none, name)

    def _new_if_none(self, name: str) -> None:
        if self.slots.get(name) is None:
            self._new_renderer(name)


def _as_completion(check: Check, receipt: SimReceipt) -> Completion:
    ok = sum(receipt.rows)
    lease = Lease("", "render", check.job, check.run, check.pass_number, check.shard, len(receipt.rows), 0)
    return Completion(lease, receipt.renderer, ok, len(receipt.rows) - ok, receipt.seconds)


def _brief(lease: Lease) -> str:
    marks = "".join(
        f" {name} {sorted(which)}" for name, which in (("alone", lease.alone), ("skip", lease.skip)) if which
    )
    shard = "finalise" if lease.task == "finalise" else f"shard {lease.shard}"
    twin = " as a twin" if lease.twin else ""
    return f"{lease.token}: {lease.run} pass {lease.pass_number} {shard} attempt {lease.attempt}{marks}{twin}"
