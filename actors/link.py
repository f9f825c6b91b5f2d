"""The live farm as a gateway sees it: `farm.server.link.FarmLink` over the actors, which it looks up by their names."""

import asyncio
import logging
from collections.abc import Awaitable, Sequence
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from actors.names import DISPATCHER, NAMESPACE
from farm.errors import FarmError, FarmUnavailableError, RendererDiedError, RenderError
from farm.portion import Allowance, Answer, Entry, Placing, PoolView, Portion, Refusal
from farm.run import JobProgress
from farm.tally import Snapshot

log = logging.getLogger(__name__)

CALL_S = 10.0
"""How long the dispatcher may take to answer before it counts as away; it answers in milliseconds, or restarts."""
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

    # The dispatcher

    async def enter(self, entry: Entry) -> Placing:
        placing: Placing = await self._call("enter", entry)
        for seat in placing.seats:
            if self._incarnations.get(seat.renderer) != seat.incarnation:
                self._incarnations[seat.renderer] = seat.incarnation
                self._renderers.pop(seat.renderer, None)
        return placing

    async def leave(self, token: str, *, seconds: float) -> None:
        await self._call("leave", token, seconds)

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
