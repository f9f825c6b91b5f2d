"""A few threads for blocking work of one kind, and a bound on how much of it may wait for them.

Each kind has its own, so that what takes long keeps nothing waiting that does not.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

from farm.errors import BusyError

RETRY_S = 5.0

P = ParamSpec("P")
T = TypeVar("T")


class Threads:
    """`count` threads called `name`; `most` calls may be begun or wait. For one event loop."""

    def __init__(self, name: str, *, count: int, most: int):
        self._name = name
        self._most = most
        self._in_hand = 0
        self._pool = ThreadPoolExecutor(count, thread_name_prefix=name)

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call a function in a thread. Raises BusyError where too much waits already."""
        if self._in_hand >= self._most:
            raise BusyError(f"{self._most} requests of this kind are in hand; try again in some seconds", RETRY_S)
        self._in_hand += 1
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._pool, partial(function, *args, **kwargs))
        finally:
            self._in_hand -= 1
