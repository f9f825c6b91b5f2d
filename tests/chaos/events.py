"""What happens to a farm and when, drawn from a seed, and carried out while commands run.

Knows no processes: a round says how each event is performed.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from tests.chaos.command import Command
from tests.chaos.processes import ChaosError, bury

Action = Literal["kill", "stop", "cut", "outage"]

LOOK_EVERY_S = 0.05
PATIENCE_S = 900.0
FIRST_S = 6.0


@dataclass(frozen=True, slots=True)
class Event:
    """Something done to one process, node or server of a kind, `wait_s` after the event before it.

    `length_s`: how long it lasts where it does not last for ever.
    """

    action: Action
    kind: str
    wait_s: float
    length_s: float

    def __str__(self) -> str:
        lasts = "" if self.action == "kill" else f" for {self.length_s:.1f} s"
        return f"{self.action} {self.kind}{lasts}"


def draw(
    rng: random.Random,
    choices: Sequence[tuple[Action, str]],
    count: int,
    *,
    waits: tuple[float, float] = (0.5, 8.0),
    lengths: Sequence[tuple[float, float]],
) -> list[Event]:
    """Each choice in turn, every time round in a new order. Each length is drawn from one of the ranges."""
    drawn: list[tuple[Action, str]] = []
    while len(drawn) < count:
        drawn += rng.sample(choices, len(choices))
    return [
        Event(action, kind, rng.uniform(*waits), rng.uniform(*rng.choice(lengths))) for action, kind in drawn[:count]
    ]


def seconds_of(events: Sequence[Event]) -> float:
    """How long a job must take at least, so that all events fall into it."""
    return FIRST_S + sum(event.wait_s for event in events)


class Later:
    """What is to be done at given moments: mostly undoing what was done."""

    def __init__(self) -> None:
        self._due: list[tuple[float, Callable[[], object]]] = []

    def after(self, seconds: float, call: Callable[[], object]) -> None:
        self._due.append((time.monotonic() + seconds, call))

    def run(self, *, everything: bool = False) -> None:
        """Do what is due, or all there is."""
        now = time.monotonic()
        due = [entry for entry in self._due if everything or entry[0] <= now]
        self._due = [entry for entry in self._due if entry not in due]
        for _, call in sorted(due, key=lambda entry: entry[0]):
            call()


def carry_out(
    events: Sequence[Event],
    commands: Sequence[Command],
    perform: Callable[[Event], bool],
    *,
    later: Later,
    every_look: Callable[[], object] = lambda: None,
    after_last: Callable[[], object] = lambda: None,
) -> list[str]:
    """Perform the events in order while the commands run, then wait until all have ended well.

    `perform` returns False where there is nothing of that kind at this moment; it is asked again at the next look.
    `after_last` is called when all events have been performed. Returns what was performed. Raises ChaosError.
    """
    waiting = list(events)
    performed: list[str] = []
    next_at = time.monotonic() + FIRST_S
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        done = [command.step() for command in commands]
        if all(done):
            return performed
        later.run()
        every_look()
        if waiting and time.monotonic() >= next_at and perform(waiting[0]):
            event = waiting.pop(0)
            say(str(event))
            performed.append(f"{event.action} {event.kind}")
            next_at = time.monotonic() + event.wait_s
            if not waiting:
                after_last()
        bury()
        time.sleep(LOOK_EVERY_S)
    exits = {command.name: command.exits for command in commands}
    raise ChaosError(f"not done after {PATIENCE_S:.0f} s; exits so far {exits}")


def say(words: str) -> None:
    """A line of a round's story."""
    print(f"  {time.strftime('%X')} {words}", flush=True)
