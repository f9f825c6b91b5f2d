"""One renderer in every slot: started, waited for, and started again when it ended.

Knows neither leases nor Ray: processes are behind a `Pool`.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

from farm.errors import FarmUnavailableError, NodeDiedError, RendererDiedError

log = logging.getLogger(__name__)

START_AGAIN_S = (0.0, 2.0, 5.0, 10.0)
"""Pauses before a renderer is started again, by its deaths in a row before it was ready; the last repeats. The third
comes when a process that was stopped has surely left its device: Ray ends it after five seconds."""
START_S = 60.0
"""How long a renderer may take to start; one that ends sooner died of its start."""
TROUBLE_DEATHS = 3
"""Failures to start in a row after which a renderer's trouble is the job's: one may be the last farm's slow end."""


class Pool(Protocol):
    """Renderers' processes by name. Only `find` blocks; what is said to a renderer that is gone is lost without a word."""

    def find(self) -> tuple[str, ...]:
        """Return the names of those that live already."""

    async def work(self, renderer: str) -> None:
        """Have it work, started where there is none; returns once it was retired.

        Raises FarmUnavailableError where it does not start, RendererDiedError where it ended, NodeDiedError where its node
        did; its process is gone then.
        """

    def drop(self, renderer: str, token: str) -> None:
        """Tell it to stop working on a lease, or on a portion of urgent images."""

    def revoke(self, renderer: str, token: str) -> None:
        """Ask it to give a lease back that it has not begun."""

    def warm(self, renderer: str, model: str) -> None:
        """Ask it to load a model when its device is free."""

    def retire(self, renderer: str) -> None:
        """Tell it to put everything down and end its work."""

    def end(self, renderer: str) -> None:
        """End its process, which may not even listen."""


class Crew:
    """Keeps the renderers `names` at work. `lost` is called with the name of each that ended, and whether it did by itself."""

    def __init__(self, pool: Pool, names: tuple[str, ...], *, lost: Callable[[str, bool], None]):
        self.names = names
        self._pool = pool
        self._lost = lost
        self._troubles: dict[str, str] = {}
        self._closed = False

    @property
    def trouble(self) -> str | None:
        """Why no renderer at all can be started, or None."""
        return next(iter(self._troubles.values())) if len(self._troubles) == len(self.names) else None

    def came(self, renderer: str) -> None:
        """A renderer has shown life."""
        self._troubles.pop(renderer, None)

    def close(self) -> None:
        """Start none again."""
        self._closed = True

    async def keep(self, name: str) -> None:
        """Keep one renderer at work until it is retired."""
        loop = asyncio.get_running_loop()
        deaths = 0
        while True:
            started = loop.time()
            try:
                await self._pool.work(name)
                return
            except (FarmUnavailableError, RendererDiedError) as exc:
                self._lost(name, not isinstance(exc, NodeDiedError))
                deaths = deaths + 1 if loop.time() - started < START_S else 0
                if deaths >= TROUBLE_DEATHS and isinstance(exc, FarmUnavailableError):
                    self._troubles[name] = exc.message
                if self._closed:
                    return
                log.warning("renderer lost", extra={"renderer": name, "reason": exc.message})
            await asyncio.sleep(START_AGAIN_S[min(deaths, len(START_AGAIN_S) - 1)])
