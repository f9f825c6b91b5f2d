"""What a renderer's shards and urgent images share of its device: the cores of a CPU, or the one place of a GPU."""

import threading
import time
from collections.abc import Callable

from farm.engine import Engine


class Cores:
    """So many cores, taken several at a time. `urgent`: asked under `changed` whether shards must let others go first.

    `clock`: monotonic seconds.
    """

    def __init__(
        self,
        total: int,
        *,
        changed: threading.Condition | None = None,
        urgent: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.total = total
        self.free = total
        self.wanted = 0
        self.changed = changed or threading.Condition()
        self._urgent = urgent
        self._clock = clock
        self._idle_s = 0.0
        self._idle_since = clock()
        self._wanted_s = 0.0
        self._wanted_since = 0.0

    def idle_s(self) -> float:
        """Seconds so far in which nobody had any of them."""
        with self.changed:
            return self._idle_s + (self._clock() - self._idle_since if self.free == self.total else 0.0)

    def wanted_s(self) -> float:
        """Seconds so far in which a shard waited for some of them."""
        with self.changed:
            return self._wanted_s + (self._clock() - self._wanted_since if self.wanted else 0.0)

    def take(self, count: int, *, timeout: float) -> bool:
        """Take so many at once for a shard, or none; waits for `timeout` seconds."""
        with self.changed:
            if not self.wanted:
                self._wanted_since = self._clock()
            self.wanted += 1
            try:
                if not self.changed.wait_for(lambda: self.free >= count and not self._urgent(), timeout):
                    return False
            finally:
                self.wanted -= 1
                if not self.wanted:
                    self._wanted_s += self._clock() - self._wanted_since
            self._taken(count)
            return True

    def take_when(self, wanted: Callable[[], int], *, again_s: Callable[[], float | None] = lambda: None) -> int:
        """Take as many as `wanted` says, asked under `changed`, once they are free; or 0, once it says less than 0.

        It is asked again when something has changed, and after `again_s` seconds where that is no None.
        """
        with self.changed:
            while (count := wanted()) == 0 or count > self.free:
                self.changed.wait(again_s())
            if count < 0:
                return 0
            self._taken(count)
            return count

    def give_back(self, count: int) -> None:
        """Let others have them."""
        with self.changed:
            self.free += count
            if self.free == self.total:
                self._idle_since = self._clock()
            self.changed.notify_all()

    def _taken(self, count: int) -> None:
        if self.free == self.total:
            self._idle_s += self._clock() - self._idle_since
        self.free -= count


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
