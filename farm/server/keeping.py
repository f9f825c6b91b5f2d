"""Single images on their way into the store, after who asked for them has the answer.

Bounded: where the store falls behind, the next answer waits for it. What is in hand when a gateway ends is waited for.
"""

import asyncio
import logging
from collections.abc import Sequence

from farm.errors import FarmError
from farm.meters import Meters
from farm.singles import Single, Singles

log = logging.getLogger(__name__)

SOON_S = 0.02
"""How long storing waits, so that the answer is out before it takes the processor."""
PENDING = 64
"""Requests whose images may be on their way at a time."""
CLOSE_S = 30.0

Kept = tuple[Single, bytes]


class Keeping:
    """Keeps images. For one event loop; the store is spoken to in threads."""

    def __init__(self, singles: Singles, meters: Meters):
        self._singles = singles
        self._meters = meters
        self._room = asyncio.Semaphore(PENDING)
        self._storing: set[asyncio.Task[None]] = set()

    async def now(self, images: Sequence[Kept]) -> None:
        """Keep them before this returns. Raises StoreError."""
        async with self._room:
            await asyncio.to_thread(self._put, images)

    async def soon(self, images: Sequence[Kept]) -> None:
        """Keep them in the background; waits only where too many are on their way already."""
        await self._room.acquire()
        storing = asyncio.create_task(self._store(images))
        self._storing.add(storing)
        storing.add_done_callback(self._storing.discard)

    async def close(self) -> None:
        """Wait for what is on its way, for CLOSE_S at most."""
        if self._storing:
            await asyncio.wait(self._storing, timeout=CLOSE_S)

    async def _store(self, images: Sequence[Kept]) -> None:
        try:
            await asyncio.sleep(SOON_S)
            await asyncio.to_thread(self._put, images)
        except FarmError as exc:
            log.warning("images of the endpoint are not kept", extra={"images": len(images), "reason": exc.message})
        except Exception:
            log.exception("images of the endpoint are not kept", extra={"images": len(images)})
        finally:
            self._room.release()

    def _put(self, images: Sequence[Kept]) -> None:
        for single, data in images:
            self._singles.put(single, data)
            self._meters.count("farm_stored_bytes_total", len(data), **{"class": "urgent"})
