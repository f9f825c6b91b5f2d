"""Map a blocking function over a stream in threads, in order, with a bounded number in hand."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

IN_HAND = 4  # calls begun or waiting to be taken, per thread


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], *, threads: int, in_hand: int = IN_HAND
) -> Generator[Result, None, None]:
    """Yield `function(item)` for each item, in the items' order, `threads` at a time.

    Items are taken from their stream only as results are taken, `in_hand` of them per thread, so neither side piles up.
    The first error of a call, or of the stream itself, is raised where its result would have stood.
    """
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="prefetch") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) >= threads * in_hand:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for call in waiting:
                call.cancel()
