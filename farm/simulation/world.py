"""The clock of a simulated farm, its dice, and how much goes wrong.

Nothing happens but what was put on the heap; time jumps from one deed to the next. Equal seeds give equal worlds.
"""

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Faults:
    """How often what goes wrong. Probabilities are for each call or write, numbers for the whole time of faults."""

    request_lost: float = 0.0
    answer_lost: float = 0.0
    slow: float = 0.0
    slow_s: float = 4.0
    duplicated: float = 0.0
    store_refuses: float = 0.0
    store_unsure: float = 0.0
    store_412: float = 0.0
    store_slow: float = 0.0
    outages: int = 0
    crashes: int = 0
    hangs: int = 0
    cuts: int = 0
    standstills: int = 0
    kills: int = 0
    dispatcher_standstills: int = 0
    wall_jumps: int = 0
    errors: float = 0.0
    deadly_loads: float = 0.0
    deadly_finalises: float = 0.0

    @property
    def call(self) -> bool:
        """Whether calls can fail at all."""
        return bool(self.request_lost or self.answer_lost or self.slow or self.duplicated)

    @property
    def store(self) -> bool:
        """Whether writes and reads can fail at all."""
        return bool(self.store_refuses or self.store_unsure or self.store_412 or self.store_slow)


CALM = Faults()


class World:
    """Deeds in the order of their time. `end_of_faults` turns the weather calm."""

    __slots__ = ("_heap", "_order", "after_event", "events", "faults", "now", "rng", "tell")

    def __init__(self, rng: random.Random, faults: Faults = CALM, *, tell: Callable[[str], None] | None = None):
        self.now = 0.0
        self.rng = rng
        self.faults = faults
        self.events = 0
        self.tell = tell
        self.after_event: Callable[[], None] = lambda: None
        self._heap: list[tuple[float, int, Callable[..., object], tuple[object, ...]]] = []
        self._order = 0

    def after(self, delay_s: float, deed: Callable[..., object], *given: object) -> None:
        """Put a deed on the heap."""
        self._order += 1
        heapq.heappush(self._heap, (self.now + delay_s, self._order, deed, given))

    def chance(self, probability: float) -> bool:
        """Throw the dice; a probability of nothing throws none."""
        return probability > 0.0 and self.rng.random() < probability

    def end_of_faults(self) -> None:
        """From now on nothing new goes wrong."""
        self.faults = CALM
        self.say("from now on nothing goes wrong")

    def say(self, line: str) -> None:
        """Add a line to the trace, where there is one."""
        if self.tell is not None:
            self.tell(f"{self.now:9.3f}  {line}")

    def run(self, until: float, over: Callable[[], bool]) -> None:
        """Let time pass until `over`, looked at every so many events, or `until`."""
        heap, pop = self._heap, heapq.heappop
        while heap and heap[0][0] <= until:
            self.now, _, deed, given = pop(heap)
            deed(*given)
            self.events += 1
            self.after_event()
            if not self.events & 31 and over():
                return
