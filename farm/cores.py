"""What a renderer's shards share of its device: the cores of a CPU, or the one place of a GPU."""

import threading
from collections.abc import Callable

from farm.engine import Engine


class Cores:
    """So many cores, taken several at a time."""

    def __init__(self, total: int):
        self.total = total
        self._free = total
        self._changed = threading.Condition()

    def take(self, count: int, *, timeout: float) -> bool:
        """Take so many at once, or none; waits for `timeout` seconds."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._free >= count, timeout):
                return False
            self._free -= count
            return True

    def give_back(self, count: int) -> None:
        """Let others have them."""
        with self._changed:
            self._free += count
            self._changed.notify_all()


class Place:
    """A shard's hold on its share of the device, and on the engine that it uses there; acquired and released as a lock.

    `begin` is asked with the share in hand; where it says no, the shard was asked back meanwhile, and nothing is held.
    """

    def __init__(self, cores: Cores, count: int, *, begin: Callable[[], bool], engine_back: Callable[[Engine], None]):
        self._cores = cores
        self._count = count
        self._begin = begin
        self._engine_back = engine_back
        self._engine: Engine | None = None

    def acquire(self, *, timeout: float) -> bool:
        """Take the share, or return False after `timeout` seconds."""
        if not self._cores.take(self._count, timeout=timeout):
            return False
        if not self._begin():
            self._cores.give_back(self._count)
            return False
        return True

    def use(self, engine: Engine) -> Engine:
        """Hold an engine until the share is let go."""
        self._engine = engine
        return engine

    def release(self) -> None:
        """Let go of share and engine."""
        if self._engine is not None:
            self._engine_back(self._engine)
            self._engine = None
        self._cores.give_back(self._count)
