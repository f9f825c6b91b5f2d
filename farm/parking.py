"""Questions for work that wait for some: at most one for each renderer, the oldest answered first.

Nobody looks for work on his own account. A wake-up offers to the parked questions in turn for as long as there is work,
so that one new shard costs one offer, however many wait. Runs on one event loop; knows no leases and no Ray.
"""

import asyncio
from collections.abc import Callable, Generator
from dataclasses import dataclass

from farm.lease import Ask, Reply

OFFERS_AT_ONCE = 64
"""Offers made before other work of the loop has its turn."""
IN_VAIN_PAUSE_S = 0.5
"""After all were asked and none could take the work that there is, they are not asked again sooner than this."""


@dataclass(slots=True)
class _Parked:
    question: Ask
    until: float
    answer: asyncio.Future[Reply]


class Parking:
    """`offer` asks the dispatch rules for a parked question's reply, `has_work` whether asking can bring anything."""

    def __init__(self, *, offer: Callable[[Ask], Reply], has_work: Callable[[], bool]):
        self._offer = offer
        self._has_work = has_work
        self._parked: dict[str, _Parked] = {}
        self._round: Generator[None, None, bool] | None = None
        self._woken = False
        self._rest: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._parked)

    async def wait(self, question: Ask, nothing: Reply, *, seconds: float) -> Reply:
        """Park a question until it is answered, with `nothing` after so many seconds or soon after.

        A renderer's older question is answered with `nothing` too: nobody listens for it any more.
        """
        self.forget(question.renderer, nothing)
        loop = asyncio.get_running_loop()
        parked = _Parked(question, loop.time() + seconds, loop.create_future())
        self._parked[question.renderer] = parked
        try:
            return await parked.answer
        finally:
            if self._parked.get(question.renderer) is parked:
                del self._parked[question.renderer]

    def wake(self) -> None:
        """Something may have changed: offer again, once this turn of the loop is over."""
        if self._parked and not self._woken:
            self._woken = True
            if self._round is None and self._rest is None:
                asyncio.get_running_loop().call_soon(self._go_on)

    def forget(self, renderer: str, nothing: Reply) -> None:
        """End a renderer's question with `nothing`: it asked again, or died."""
        parked = self._parked.pop(renderer, None)
        if parked is not None and not parked.answer.done():
            parked.answer.set_result(nothing)

    def expire(self, nothing: Reply) -> None:
        """End the questions that have waited for long enough; to be called now and then."""
        now = asyncio.get_running_loop().time()
        for renderer in [name for name, parked in self._parked.items() if parked.until <= now]:
            self.forget(renderer, nothing)

    def _go_on(self) -> None:
        """Make some offers, and come back for the others."""
        self._rest = None
        if self._round is None:
            self._woken = False
            self._round = self._offers()
        loop = asyncio.get_running_loop()
        for _ in range(OFFERS_AT_ONCE):
            try:
                next(self._round)
            except StopIteration as end:
                self._round = None
                if end.value:
                    self._rest = loop.call_later(IN_VAIN_PAUSE_S, self._rested)
                elif self._woken:
                    loop.call_soon(self._go_on)
                return
            except Exception:
                self._round, self._woken = None, False  # the next wake-up begins anew, and does not wait for this one
                raise
        loop.call_soon(self._go_on)

    def _rested(self) -> None:
        self._rest = None
        if self._woken:
            self._go_on()

    def _offers(self) -> Generator[None, None, bool]:
        """Offer to everyone once, oldest first, as long as there is work. Returns whether there was, and none took it."""
        offered = taken = 0
        for renderer, parked in list(self._parked.items()):
            if not self._has_work():
                return False
            if parked.answer.done() or self._parked.get(renderer) is not parked:
                continue
            offered += 1
            reply = self._offer(parked.question)
            if reply.is_final:
                taken += 1
                self.forget(renderer, reply)
            yield
        return offered > 0 and not taken
