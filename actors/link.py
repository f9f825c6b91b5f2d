"""The live farm as a gateway sees it: `farm.server.link.FarmLink` over the actors, which it looks up by their names."""

import asyncio
import logging
from collections.abc import Awaitable, Sequence
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from actors.names import DISPATCHER, NAMESPACE
from farm.errors import FarmError, FarmUnavailableError, RendererDiedError, RenderError
from farm.portion import Allowance, Answer, Entry, Leaving, Placing, PoolView, Portion, Refusal, SeatEnd
from farm.run import JobProgress
from farm.tally import Snapshot

log = logging.getLogger(__name__)

CALL_S = 10.0
"""How long the dispatcher may take to answer before it counts as away; it answers in milliseconds, or restarts."""
LEAVE_S = 0.02
"""How long seats that are given back wait for a question to go with."""
DIED_PAUSE_S = 0.5
"""How much later the end of a renderer is told: by then the dispatcher knows of it too, and gives no seat there again."""


class RayLink:
    """For one event loop of a process in the farm's Ray cluster.

    A call of the dispatcher that fails may have been heard: each may be repeated. What a renderer was drawing when its
    process ended is lost; where only the way there failed, it is told to drop the portion.
    """

    def __init__(self) -> None:
        self._dispatcher: Any = None
        self._looking = asyncio.Lock()
        self._renderers: dict[str, Any] = {}
        self._incarnations: dict[str, str] = {}
        self._leavings: list[tuple[Leaving, asyncio.Future[None]]] = []
        self._entries: list[tuple[Entry, asyncio.Future[Placing]]] = []
        self._turning: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    # The dispatcher

    async def enter(self, entry: Entry) -> Placing:
        answer: asyncio.Future[Placing] = asyncio.get_running_loop().create_future()
        self._entries.append((entry, answer))
        self._take_turns()
        placing = await answer
        for seat in placing.seats:
            if self._incarnations.get(seat.renderer) != seat.incarnation:
                self._incarnations[seat.renderer] = seat.incarnation
                self._renderers.pop(seat.renderer, None)
        return placing

    async def leave(self, token: str, *, seconds: float, end: SeatEnd = "done") -> None:
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._leavings.append((Leaving(token, seconds, end), answer))
        self._turn_soon()
        await answer

    async def hold(self, gateway: str, tokens: Sequence[str], snapshot: Snapshot) -> None:
        await self._call("hold", gateway, tuple(tokens), snapshot)

    async def charge(self, key: str, allowance: Allowance, images: int) -> Refusal | None:
        refusal: Refusal | None = await self._call("charge", key, allowance, images)
        return refusal

    async def submit(self, job: str) -> None:
        await self._call("submit", job)

    async def progress(self, job: str) -> tuple[JobProgress | None, str | None]:
        progress: tuple[JobProgress | None, str | None] = await self._call("progress", job)
        return progress

    async def pool(self) -> PoolView:
        pool: PoolView = await self._call("pool")
        return pool

    async def drain(self, renderer: str, drained: bool) -> None:
        await self._call("drain", renderer, drained)

    async def metrics(self) -> Sequence[Snapshot]:
        snapshots: Sequence[Snapshot] = await self._call("metrics")
        return snapshots

    # Renderers

    async def draw(self, renderer: str, portion: Portion) -> Answer:
        handle: Any = None
        try:
            handle = await self._renderer(renderer)
            answer: Answer = await handle.draw.remote(portion)
            return answer
        except RayTaskError as exc:
            if isinstance(exc.cause, FarmError):
                raise exc.cause from None
            raise RenderError(f"{renderer} failed: {type(exc.cause).__name__}: {exc.cause}; its log has more") from exc
        except (RayError, ValueError) as exc:
            self._renderers.pop(renderer, None)
            if handle is not None:
                handle.drop.remote(portion.token)
            await asyncio.sleep(DIED_PAUSE_S)
            raise RendererDiedError(f"{renderer} ended while it drew: {_last_line(exc)}") from exc

    async def drop(self, renderer: str, token: str) -> None:
        try:
            (await self._renderer(renderer)).drop.remote(token)
        except (RayError, ValueError) as exc:
            self._renderers.pop(renderer, None)
            log.info("nothing to drop: the renderer is gone", extra={"renderer": renderer, "reason": _last_line(exc)})

    # Inside

    def _take_turns(self) -> None:
        """Have what is said of seats sent: at once, or together with all else when the call under way returns.

        So a hundred requests at a time cost the dispatcher few calls, and a question alone waits for nothing.
        """
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._turning is None:
            self._turning = asyncio.create_task(self._turns())

    def _turn_soon(self) -> None:
        """Nobody waits for seats that are given back: they go with the next question, if one comes soon."""
        if self._timer is None and self._turning is None:
            self._timer = asyncio.get_running_loop().call_later(LEAVE_S, self._take_turns)

    async def _turns(self) -> None:
        try:
            while True:
                leavings, self._leavings = self._leavings, []
                entries, self._entries = self._entries, []
                await self._turn(leavings, entries)
                if not self._entries:
                    return
        finally:
            self._turning = None
            if self._leavings:
                self._turn_soon()

    async def _turn(
        self,
        leavings: Sequence[tuple[Leaving, asyncio.Future[None]]],
        entries: Sequence[tuple[Entry, asyncio.Future[Placing]]],
    ) -> None:
        try:
            placings = await self._call("turn", tuple(one for one, _ in leavings), tuple(one for one, _ in entries))
        except Exception as exc:
            if not isinstance(exc, FarmError):
                log.exception("what was said of seats could not be sent")
            answers: list[asyncio.Future[Any]] = [answer for _, answer in leavings] + [answer for _, answer in entries]
            for answer in answers:
                if not answer.done():
                    answer.set_exception(FarmUnavailableError(str(exc)))
            return
        for _, left in leavings:
            if not left.done():
                left.set_result(None)
        for (_, asked), placing in zip(entries, placings, strict=True):
            if asked.done():
                continue  # who asked has gone, and tells the dispatcher so
            if isinstance(placing, FarmError):
                asked.set_exception(placing)
            else:
                asked.set_result(placing)

    async def _call(self, method: str, *arguments: object) -> Any:
        handle: Any = None
        try:
            async with asyncio.timeout(CALL_S):
                handle = await self._found()
                call: Awaitable[Any] = getattr(handle, method).remote(*arguments)
                return await call
        except RayTaskError as exc:
            if isinstance(exc.cause, FarmError):
                raise exc.cause from None
            raise FarmUnavailableError(
                f"the dispatcher failed in {method}: {type(exc.cause).__name__}: {exc.cause}; its log has more"
            ) from exc
        except (RayError, TimeoutError, ValueError) as exc:
            if self._dispatcher is handle:
                self._dispatcher = None
            reason = _last_line(exc) or f"no answer within {CALL_S:.0f} s"
            raise FarmUnavailableError(f"the dispatcher does not answer {method}: {reason}") from exc

    async def _found(self) -> Any:
        """The dispatcher, looked up once however many ask."""
        async with self._looking:
            if self._dispatcher is None:
                self._dispatcher = await asyncio.to_thread(ray.get_actor, DISPATCHER, NAMESPACE)
            return self._dispatcher

    async def _renderer(self, name: str) -> Any:
        handle = self._renderers.get(name)
        if handle is None:
            handle = self._renderers[name] = await asyncio.to_thread(ray.get_actor, name, NAMESPACE)
        return handle


def _last_line(exc: BaseException) -> str:
    lines = str(exc).strip().splitlines()
    return lines[-1] if lines else ""
