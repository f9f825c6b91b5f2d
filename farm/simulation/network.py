"""Calls between renderers and a dispatcher: they arrive late, twice, or never, and so do their answers."""

from collections.abc import Callable
from typing import Any, Protocol

from farm.simulation.world import World

CALL_S = 30.0
"""How long a caller waits for an answer that never comes; as in `actors/renderer.py`."""
DELAY_S = 0.002


class Call:
    """One call on its way. Settled once: by the first answer, or by its failure."""

    __slots__ = ("answered", "argument", "failed", "method", "settled")

    def __init__(
        self, method: str, argument: Any, answered: Callable[[Any], object], failed: Callable[[], object]
    ) -> None:
        self.method = method
        self.argument = argument
        self.answered = answered
        self.failed = failed
        self.settled = False

    def settle(self, answer: Any) -> None:
        """Give the caller its answer, unless it has one or gave up."""
        if not self.settled:
            self.settled = True
            self.answered(answer)

    def fail(self) -> None:
        """Tell the caller that nobody answered."""
        if not self.settled:
            self.settled = True
            self.failed()


class Callee(Protocol):
    """What takes calls."""

    def receive(self, call: Call, reply: Callable[[Any], None]) -> None:
        """Do what the call says; `reply` is to be called once, at once or later."""


class Caller(Protocol):
    """What makes calls. While `cut` nothing leaves it and nothing reaches it."""

    cut: bool


class Network:
    """Between the renderers of a farm and its dispatcher."""

    def __init__(self, world: World, callee: Callee):
        self._world = world
        self._callee = callee

    def call(
        self,
        caller: Caller,
        method: str,
        argument: Any,
        answered: Callable[[Any], object],
        failed: Callable[[], object],
    ) -> None:
        """Call the dispatcher. One of `answered` and `failed` is called, once."""
        world, faults = self._world, self._world.faults
        call = Call(method, argument, answered, failed)
        if caller.cut:
            world.after(CALL_S, call.fail)
            return
        if not faults.call:
            if method == "renew":
                self._callee.receive(call, lambda answer: self._answer(caller, call, answer, False))
            else:
                world.after(DELAY_S, self._arrive, caller, call, False)
            return
        if world.chance(faults.request_lost):
            world.say(f"lost: {method} {argument}")
            world.after(world.rng.uniform(0.5, CALL_S), call.fail)
            return
        lost = world.chance(faults.answer_lost)
        world.after(DELAY_S + self._slow(), self._arrive, caller, call, lost)
        if world.chance(faults.duplicated):
            world.after(DELAY_S + world.rng.random() * 2 * faults.slow_s, self._arrive, caller, call, lost)

    def _arrive(self, caller: Caller, call: Call, lost: bool) -> None:
        if caller.cut:
            self._world.after(CALL_S, call.fail)
        else:
            self._callee.receive(call, lambda answer: self._answer(caller, call, answer, lost))

    def _answer(self, caller: Caller, call: Call, answer: Any, lost: bool) -> None:
        world = self._world
        if lost or caller.cut:
            if lost:
                world.say(f"lost: the answer to {call.method}: {answer}")
            world.after(world.rng.uniform(0.5, CALL_S), call.fail)
            return
        delay = self._slow()
        if delay or call.method != "renew":
            world.after(DELAY_S + delay, call.settle, answer)
        else:
            call.settle(answer)

    def _slow(self) -> float:
        world = self._world
        return world.rng.random() * world.faults.slow_s if world.chance(world.faults.slow) else 0.0
