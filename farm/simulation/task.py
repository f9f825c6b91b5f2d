"""A lease in a simulated renderer's hand, and how far it is."""

from farm.lease import Lease, Stage
from farm.simulation.jobs import SimRun


class Task:
    """A lease in hand. `turn` grows whenever what was put on the heap for it must not happen any more."""

    __slots__ = (
        "asks_next",
        "batches",
        "began",
        "committing",
        "drawn",
        "failed",
        "in_hand",
        "lease",
        "load_s",
        "progressed_at",
        "run",
        "seconds",
        "stage",
        "stop",
        "ticks",
        "turn",
        "until",
    )

    def __init__(self, lease: Lease, run: SimRun, now: float):
        self.lease = lease
        self.run = run
        self.turn = 0
        self.stop = False
        self.stage: Stage = "waiting"
        self.ticks = 0
        self.began = now
        self.until = now
        self.progressed_at = now
        self.in_hand: tuple[int, ...] = ()
        self.batches: list[tuple[int, ...]] = []
        self.drawn = 0
        self.failed: set[int] = set()
        self.asks_next = False
        self.committing = False
        self.load_s = 0.0
        self.seconds = 0.0
