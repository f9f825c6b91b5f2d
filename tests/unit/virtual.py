"""An event loop whose time passes at once: it jumps to the next timer whenever nothing else is to do."""

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from farm.jobwatch import Threads

T = TypeVar("T")


class _Jumping(selectors.DefaultSelector):
    loop: "VirtualLoop"

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "nothing will ever happen any more"
            self.loop.now += timeout
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """`now`: seconds since its start."""

    def __init__(self) -> None:
        selector = _Jumping()
        selector.loop = self
        self.now = 0.0
        super().__init__(selector)

    def time(self) -> float:
        return self.now


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on such a loop, whatever is left over cancelled."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


def inline(count: int, name: str) -> Threads:
    """Threads that are none: work is done where it is asked for."""

    async def call(work: Callable[[], T]) -> T:
        return work()

    return call


async def settle() -> None:
    """Let everything that is ready run, without time passing."""
    for _ in range(50):
        await asyncio.sleep(0)
