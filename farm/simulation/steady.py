"""Long calm worlds of one seed: owners with more to do than the farm can, to measure who gets how much of it."""

import random

from farm.dispatch import Dispatch
from farm.queue import SWAPS_WORTH
from farm.simulation.audit import Audit, Violation
from farm.simulation.farm import Farm, Make
from farm.simulation.jobs import Books, SimJob, SimRun
from farm.simulation.people import People
from farm.simulation.renderers import SimRenderer
from farm.simulation.scenario import UNIX, Tell
from farm.simulation.store import Store
from farm.simulation.world import World

WITHIN = 0.05
"""How far an owner's GPU-seconds may be from its share, as a part of it."""
WARM_UP_S = 300.0
MEASURED_S = 4000.0


class Steady:
    """Two to four owners, a model and a speed each, four to six renderers; nobody is ever without work."""

    def __init__(self, seed: int, *, make: Make = Dispatch, tell: Tell | None = None):
        rng = random.Random(seed)
        self.world = World(rng, tell=tell)
        self.store = Store(self.world)
        self.books = Books(self.store)
        self.audit = Audit(self.world, self.books)
        self.audit.window = (WARM_UP_S, WARM_UP_S + MEASURED_S)
        owners = [f"owner{n}" for n in range(rng.randint(2, 4))]
        self.shares = {owner: float(rng.choice((1, 1, 2, 3))) for owner in owners}
        self.load_s = rng.choice((1.0, 2.0, 4.0))
        self.speeds = [rng.choice((1.0, 1.0, 2.0)) for _ in range(rng.randint(4, 6))]
        models = rng.randint(1, len(owners))
        self.jobs = [self._job(n, owner, models) for n, owner in enumerate(owners * rng.randint(1, 2))]
        self.farm = Farm(
            self.world,
            self.books,
            self.audit,
            name="a",
            slots=len(self.speeds),
            make=make,
            make_renderer=self._renderer,
            shares=self.shares,
            wall=lambda: UNIX + self.world.now,
        )
        people = People(self.world, self.books, [self.farm])
        for job in self.jobs:
            self.world.after(rng.uniform(0.0, 20.0), people.submit, job)

    def _job(self, number: int, owner: str, models: int) -> SimJob:
        rng = self.world.rng
        batch = rng.randint(2, 4)
        run = SimRun(
            job=f"job{number}",
            run=f"run{number}",
            model=f"model{number % models}",
            images=120_000,
            shard_images=batch * rng.randint(2, 5),
            batch=batch,
            image_s=rng.choice((0.5, 1.0, 2.0)),
            created_at=f"2026-01-{number + 1:02d}",
        )
        return SimJob(f"job{number}", owner, 50, (run,))

    def _renderer(self, farm: Farm, name: str, incarnation: str) -> SimRenderer:
        speed = self.speeds[int(name[1:])]
        return SimRenderer(
            self.world,
            farm.network,
            self.books,
            self.audit,
            name=name,
            incarnation=incarnation,
            speed=speed,
            load_s=self.load_s,
        )

    def run(self) -> None:
        """Let the time pass, then look at who had how much. Raises Violation."""
        self.world.run(WARM_UP_S + MEASURED_S, lambda: False)
        self.check()

    def shares_got(self) -> dict[str, float]:
        """GPU-seconds of each owner as a part of what its share comes to."""
        total, weights = sum(self.audit.gpu_s.values()), sum(self.shares.values())
        return {
            owner: self.audit.gpu_s.get(owner, 0.0) / total * weights / weight for owner, weight in self.shares.items()
        }

    @property
    def most_swap_s(self) -> float:
        """A bound of the time that swaps may take.

        A renderer changes the model for an owner whose deficit is worth SWAPS_WORTH swaps, so that as many GPU-seconds
        are rendered before the owners' order turns again; and each renderer once for its first model.
        """
        return sum(self.audit.gpu_s.values()) / SWAPS_WORTH + len(self.speeds) * self.load_s

    def check(self) -> None:
        """Compare shares, swaps and idle time with what they may be."""
        for owner, part in self.shares_got().items():
            if abs(part - 1.0) > WITHIN:
                raise Violation(f"{owner} got {part:.3f} of its share: {self.audit.gpu_s}, weights {self.shares}")
        if self.audit.swap_s > self.most_swap_s:
            raise Violation(f"{self.audit.swap_s:.0f} s of swaps are more than {self.most_swap_s:.0f} s")
        busy = sum(self.audit.gpu_s.values()) / (MEASURED_S * len(self.speeds))
        if busy < 0.9:
            raise Violation(f"GPUs were busy for {busy:.1%} of the time, with work for all")
