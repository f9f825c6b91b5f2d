"""Worlds drawn from seeds: small ones in which all kinds of things go wrong, and long calm ones to measure fairness in."""

import math
import random
from collections.abc import Callable
from dataclasses import replace

from farm.dispatch import Dispatch
from farm.simulation.audit import Audit, Violation
from farm.simulation.farm import ZOMBIE_S, Farm, Make
from farm.simulation.jobs import Books, SimJob, SimRun
from farm.simulation.people import People
from farm.simulation.renderers import SimRenderer
from farm.simulation.store import Store
from farm.simulation.world import Faults, World

ENDS_S = 5000.0
"""Simulated seconds within which everything ends once nothing goes wrong any more."""
QUIET_S = 45.0
"""Faults happen in so many seconds from the start, at most."""
SETTLING_S = 8.0
UNIX = 1_800_000_000.0

Tell = Callable[[str], None]


class Small:
    """A world of one seed: some renderers, some jobs, and faults drawn for it."""

    def __init__(self, seed: int, *, make: Make = Dispatch, tell: Tell | None = None, faults: Faults | None = None):
        rng = random.Random(seed)
        self.two_farms = rng.random() < 0.15
        self.faults = faults if faults is not None else drawn_faults(rng)
        self.world = world = World(rng, self.faults, tell=tell)
        self.store = Store(world, conditional=self.two_farms or rng.random() < 0.9)
        self.books = Books(self.store)
        self.audit = Audit(world, self.books, claims=self.two_farms)
        self.store.on_write = self.audit.wrote
        self.wall_offset = 0.0
        self.quiet_at = rng.uniform(10.0, QUIET_S)
        self.speeds = [rng.choice((1.0, 1.0, 1.0, 2.0, 0.25)) for _ in range(3)]
        self.models = rng.randint(1, 3)
        self.image_s = rng.choice((0.3, 1.0, 2.5))
        self.load_s = rng.choice((0.5, 2.0, 6.0))
        owners = [f"owner{n}" for n in range(rng.randint(1, 3))]
        self.shares = {owner: float(rng.choice((1, 1, 2))) for owner in owners}
        self.drawn = [self._job(number, owners) for number in range(rng.randint(1, 3))]
        self.unfit = {run.run for job in self.drawn for run in job.runs if rng.random() < 0.08}
        slots = rng.randint(1, 3)
        self.farms = [self._farm(name, slots, make) for name in ("a", "b")[: 1 + self.two_farms]]
        self.people = People(world, self.books, self.farms)
        self._put_on_the_heap()

    def _job(self, number: int, owners: list[str]) -> SimJob:
        rng = self.world.rng
        images = rng.randint(1, 18)
        batch = rng.randint(1, 3)
        pilot = rng.randint(1, images - 1) if images > 2 and rng.random() < 0.2 else 0

        def few(chance: float) -> frozenset[int]:
            return frozenset(i for i in range(images) if rng.random() < 0.2) if rng.random() < chance else frozenset()

        run = SimRun(
            job=f"job{number}",
            run=f"run{number}",
            model=f"model{rng.randrange(self.models)}",
            images=images,
            shard_images=batch * rng.randint(1, 3),
            batch=batch,
            image_s=self.image_s,
            created_at=f"2026-01-{number + 1:02d}",
            pilot=pilot,
            measured=rng.random() < 0.5,
            poison=frozenset({rng.randrange(images)}) if rng.random() < 0.06 else frozenset(),
            bad=few(0.15),
        )
        return SimJob(
            name=f"job{number}",
            owner=rng.choice(owners),
            priority=rng.choice((50, 50, 50, 80)),
            runs=(run,),
            max_images=rng.randint(1, images) if rng.random() < 0.12 else None,
            max_gpu_s=rng.uniform(1.0, images * self.image_s) if rng.random() < 0.08 else None,
            finish_by=UNIX + rng.uniform(5.0, 120.0) if rng.random() < 0.1 else None,
        )

    def _farm(self, name: str, slots: int, make: Make) -> Farm:
        return Farm(
            self.world,
            self.books,
            self.audit,
            name=name,
            slots=slots,
            make=make,
            make_renderer=self._renderer,
            shares=self.shares,
            wall=self.wall,
            claims=self.two_farms,
        )

    def _renderer(self, farm: Farm, name: str, incarnation: str) -> SimRenderer:
        slot = int(name[-1])
        return SimRenderer(
            self.world,
            farm.network,
            self.books,
            self.audit,
            name=name,
            incarnation=incarnation,
            speed=self.speeds[slot % len(self.speeds)],
            load_s=self.load_s,
            unfit=frozenset(self.unfit) if slot == 0 and len(farm.slots) > 1 else frozenset(),
        )

    def wall(self) -> float:
        """Unix seconds, as the farm's clock shows them."""
        return UNIX + self.world.now + self.wall_offset

    # What happens, and when

    def _put_on_the_heap(self) -> None:
        world, rng, faults, quiet = self.world, self.world.rng, self.faults, self.quiet_at
        for number, job in enumerate(self.drawn):
            world.after(0.0 if number == 0 else rng.uniform(0.0, quiet), self.people.submit, job)
        for _ in range(rng.choice((0, 0, 1, 2, 4))):
            world.after(rng.uniform(1.0, quiet), self._somebody)
        for count, deed in (
            (faults.crashes, self._crash),
            (faults.hangs, self._hang),
            (faults.cuts, self._cut),
            (faults.standstills, self._stand_still),
            (faults.dispatcher_standstills, self._stop_dispatcher),
            (faults.outages, self._outage),
            (faults.wall_jumps, self._jump),
        ):
            for _ in range(count):
                world.after(rng.uniform(0.5, quiet), deed)
        if faults.kills:
            self._kills = sorted(rng.randrange(2, 500) for _ in range(faults.kills))
            world.after_event = self._kill_between_events
        world.after(quiet, self._calm)

    def _kill_between_events(self) -> None:
        if self.world.events >= self._kills[0]:
            self._kills.pop(0)
            self.world.rng.choice(self.farms).kill()
            if not self._kills:
                self.world.after_event = _nothing

    def _calm(self) -> None:
        self.world.after_event = _nothing
        self.world.end_of_faults()
        self.people.settle()

    def _somebody(self) -> None:
        rng = self.world.rng
        name = rng.choice(self.drawn).name
        deed = rng.random()
        if deed < 0.25:
            self.people.say(name, "pause")
            self.world.after(rng.uniform(0.1, 10.0), self.people.say, name, "resume")
        elif deed < 0.4:
            self.people.say(name, "change", priority=rng.choice((10, 50, 90)))
        elif deed < 0.5:
            self.people.say(name, "cancel")
        elif deed < 0.6:
            self.people.say(name, "resume")
        elif deed < 0.7:
            self.people.say(name, "approve")
        elif deed < 0.85:
            self.people.retry(name)
        elif deed < 0.92:
            self.people.delete(name)
        else:
            self._append(name)

    def _append(self, name: str) -> None:
        job = self.books.job(name)
        if job is not None and len(job.runs) == 1:
            first = job.runs[0]
            run = replace(first, run=f"{first.run}+", created_at="2026-02-01", poison=frozenset(), pilot=0)
            self.people.append(name, run)

    def _some_renderer(self) -> SimRenderer | None:
        alive = [one for farm in self.farms for one in farm.slots.values() if one is not None and one.alive]
        return self.world.rng.choice(alive) if alive else None

    def _crash(self) -> None:
        renderer = self._some_renderer()
        if renderer is not None:
            renderer.die()

    def _hang(self) -> None:
        renderer = self._some_renderer()
        if renderer is not None:
            renderer.hang(deaf=self.world.rng.random() < 0.3)

    def _cut(self) -> None:
        renderer = self._some_renderer()
        if renderer is None or renderer.cut:
            return
        rng = self.world.rng
        renderer.cut = True
        self.world.say(f"{renderer.name} is cut off")
        if rng.random() < 0.5:  # Ray takes the node for dead
            farm = next(farm for farm in self.farms if renderer.name in farm.slots)
            self.world.after(rng.uniform(1.0, 5.0), farm.slot_lost, renderer)
        self.world.after(rng.uniform(1.0, 60.0), self._heal, renderer)

    def _heal(self, renderer: SimRenderer) -> None:
        renderer.cut = False
        self.world.say(f"{renderer.name}/{renderer.incarnation} is healed")
        if all(farm.slots.get(renderer.name) is not renderer for farm in self.farms):
            self.world.after(self.world.rng.random() * ZOMBIE_S, renderer.die)

    def _stand_still(self) -> None:
        renderer = self._some_renderer()
        if renderer is not None:
            renderer.stand_still(self.world.rng.uniform(1.0, 45.0))

    def _stop_dispatcher(self) -> None:
        self.world.rng.choice(self.farms).stand_still(self.world.rng.uniform(1.0, 60.0))

    def _outage(self) -> None:
        self.store.down_until = self.world.now + self.world.rng.uniform(1.0, 20.0)
        self.world.say(f"the store is away until {self.store.down_until:.1f}")

    def _jump(self) -> None:
        self.wall_offset += self.world.rng.choice((-3600.0, -60.0, 30.0, 3600.0))
        self.world.say(f"the wall clock jumps to {self.wall():.0f}")

    # To the end

    def run(self) -> None:
        """Let it all happen. Raises Violation."""
        world = self.world
        until = self.quiet_at + ENDS_S
        while True:
            world.run(until, self._over)
            if not self._over():
                raise Violation(f"after {until:.0f} s not all has ended: {self._state()}")
            world.run(world.now + SETTLING_S, lambda: False)
            if self._over():  # and nobody has set anything going again meanwhile
                break
        self.audit.at_the_end(self.people.jobs, self.farms)

    def _over(self) -> bool:
        if self.world.now < self.quiet_at or any(not farm.up for farm in self.farms):
            return False
        return all(self._ended(job.name) for job in self.people.jobs)

    def _ended(self, name: str) -> bool:
        job = self.books.job(name)
        if job is None:
            return all(farm.dispatch is None or name not in farm.dispatch.jobs() for farm in self.farms)
        if self.books.finished(job):
            known = all(farm.dispatch is None or name not in farm.dispatch.unfinished() for farm in self.farms)
            return known and ("open", name) not in self.store.objects
        said = self.books.standing(name)
        if said.state == "cancelled":
            return True
        if job.max_images is None and job.max_gpu_s is None and job.finish_by is None:
            return False
        shown = [farm.dispatch.progress(name) for farm in self.farms if farm.dispatch is not None]
        return any(progress is not None and progress.state == "stopped" for progress in shown)

    def _state(self) -> str:
        lines = []
        for job in self.people.jobs:
            if not self._ended(job.name):
                shown = [(farm.name, farm.dispatch.progress(job.name)) for farm in self.farms if farm.dispatch]
                lines.append(f"{job.name}: {shown}")
        return "; ".join(lines)


def _nothing() -> None:
    """Nothing happens between events."""


def drawn_faults(rng: random.Random) -> Faults:
    """Some kinds of faults, each seldom or often."""

    def rate(chance: float, low: float, high: float) -> float:
        return math.exp(rng.uniform(math.log(low), math.log(high))) if rng.random() < chance else 0.0

    def count(chance: float, most: int) -> int:
        return rng.randint(1, most) if rng.random() < chance else 0

    return Faults(
        request_lost=rate(0.3, 0.005, 0.15),
        answer_lost=rate(0.3, 0.005, 0.15),
        slow=rate(0.3, 0.01, 0.3),
        slow_s=rng.choice((1.0, 4.0, 12.0)),
        duplicated=rate(0.3, 0.01, 0.3),
        store_refuses=rate(0.25, 0.01, 0.2),
        store_unsure=rate(0.3, 0.02, 0.4),
        store_412=rate(0.3, 0.05, 0.6),
        store_slow=rate(0.25, 0.05, 0.4),
        outages=count(0.12, 2),
        crashes=count(0.35, 3),
        hangs=count(0.03, 1),
        cuts=count(0.2, 2),
        standstills=count(0.15, 2),
        kills=count(0.4, 3),
        dispatcher_standstills=count(0.12, 1),
        wall_jumps=count(0.1, 2),
        errors=rate(0.1, 0.01, 0.1),
        deadly_loads=rate(0.06, 0.1, 0.9),
        deadly_finalises=rate(0.06, 0.1, 0.9),
    )
