"""A bucket whose calls take time, fail, or answer 412 to their own write.

Objects appear and change at one instant between a call and its answer. Knows nothing of jobs. Keys are tuples.
"""

from collections.abc import Callable
from typing import Any

from farm.simulation.world import World

Key = tuple[Any, ...]
Then = Callable[[Any], object]

CALL_S = 0.03
"""What a call usually takes."""
SLOW_S = 6.0
PATIENCE_S = 3.0
"""How long the client tries on its own before it says that the store is unavailable."""


class Unavailable:
    """The answer of a store that did not answer: a write may have happened or not."""


UNAVAILABLE = Unavailable()


class Store:
    """What is there: `objects[key]` is the content and its version. Without `conditional` a create is look, then put."""

    def __init__(self, world: World, *, conditional: bool = True):
        self.objects: dict[Key, tuple[Any, int]] = {}
        self.conditional = conditional
        self.down_until = 0.0
        self.on_write: Callable[[Key, Any], None] = lambda key, content: None
        self._world = world
        self._version = 0

    # At this very instant

    def get(self, key: Key) -> Any:
        """The content, or None."""
        found = self.objects.get(key)
        return found[0] if found else None

    def put(self, key: Key, content: Any) -> int:
        """Write, whatever was there; returns the version."""
        self._version += 1
        self.objects[key] = (content, self._version)
        self.on_write(key, content)
        return self._version

    def create(self, key: Key, content: Any) -> bool:
        """Write unless there is one."""
        if key in self.objects:
            return False
        self.put(key, content)
        return True

    # As clients see it: an answer, after a while

    def read(self, look: Callable[[], Any], then: Then) -> None:
        """Look at the bucket at one instant; `then` gets what was seen, or UNAVAILABLE."""
        world = self._world
        if self._away(then):
            return
        world.after(CALL_S + self._slow(), self._look, look, then)

    def _look(self, look: Callable[[], Any], then: Then) -> None:
        if self.down_until > self._world.now:
            then(UNAVAILABLE)
        else:
            then(look())

    def write(self, key: Key, content: Any, then: Then) -> None:
        """Create if absent; `then` gets True for the winner, False for others, or UNAVAILABLE.

        Who is told 412 reads back and compares, as the S3 store does: its own content there means that it had won.
        """
        if self._away(then):
            return
        slow = self._slow()
        if self.conditional:
            self._world.after(CALL_S + slow, self._create, key, content, then)
        else:
            self._world.after(CALL_S, self._look_first, key, content, slow, then)

    def _look_first(self, key: Key, content: Any, slow: float, then: Then) -> None:
        if key in self.objects:
            then(False)
        else:
            self._world.after(CALL_S + slow, self._plain_put, key, content, then)

    def _plain_put(self, key: Key, content: Any, then: Then) -> None:
        self.put(key, content)
        self._answer_write(True, then)

    def _create(self, key: Key, content: Any, then: Then) -> None:
        self._answer_conditional(self.create(key, content), key, content, then)

    def _answer_conditional(self, won: bool, key: Key, content: Any, then: Then) -> None:
        world = self._world
        if won and world.chance(world.faults.store_412):
            world.say(f"the store answers 412 to its own write of {key}")
            self.read(lambda: self.get(key), lambda seen: then(seen if seen is UNAVAILABLE else seen is content))
            return
        self._answer_write(won, then)

    def replace(self, key: Key, content: Any, version: int, then: Then) -> None:
        """Write if the version is still that one; `then` gets True, False or UNAVAILABLE. Reads back as `write` does."""
        if self._away(then):
            return
        self._world.after(CALL_S + self._slow(), self._replace, key, content, version, then)

    def _replace(self, key: Key, content: Any, version: int, then: Then) -> None:
        found = self.objects.get(key)
        won = found is not None and found[1] == version
        if won:
            self.put(key, content)
        self._answer_conditional(won, key, content, then)

    def _answer_write(self, won: bool, then: Then) -> None:
        world = self._world
        if world.chance(world.faults.store_unsure):
            world.say("a write happened, and its writer is told that the store is unavailable")
            world.after(PATIENCE_S, then, UNAVAILABLE)
        else:
            then(won)

    def _away(self, then: Then) -> bool:
        world = self._world
        if self.down_until > world.now or world.chance(world.faults.store_refuses):
            world.after(PATIENCE_S, then, UNAVAILABLE)
            return True
        return False

    def _slow(self) -> float:
        world = self._world
        return world.rng.random() * SLOW_S if world.chance(world.faults.store_slow) else 0.0
