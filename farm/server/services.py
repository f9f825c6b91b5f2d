"""What the routes need, built once for an app: settings, store, live farm, keys, cards, kept images, counters.

Nothing in it lasts: any gateway answers any request, and one that ends takes only what it was drawing with it.
"""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, cast

from fastapi import Depends, Request

from farm.exposure import needs_no_key
from farm.keys import Key, Keys, keyless
from farm.ledger import Ledger
from farm.meters import Meters
from farm.portion import PoolView
from farm.server.cards import Cards
from farm.server.gateway import Gateway
from farm.server.keeping import Keeping
from farm.server.link import FarmLink
from farm.settings import Settings
from farm.singles import Singles

POOL_S = 0.5
"""How old what is told of the farm may be."""


@dataclass(slots=True)
class Sending:
    """Bytes of finished answers that their clients have not read yet."""

    bytes: int = 0


@dataclass(slots=True)
class Services:
    """`name`: this gateway's, lasting over its restarts. `local`: who asks without a key, None where a key is needed.

    `wall`: Unix seconds.
    """

    settings: Settings
    name: str
    link: FarmLink
    ledger: Ledger
    keys: Keys
    singles: Singles
    meters: Meters
    cards: Cards
    gateway: Gateway
    keeping: Keeping
    local: Key | None
    wall: Callable[[], float] = time.time
    sending: Sending = field(default_factory=Sending)
    _pool: PoolView | None = None
    _pool_at: float = 0.0
    _asking: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def pool(self, *, max_age_s: float = POOL_S) -> PoolView:
        """How the farm stands, or stood so long ago; many who ask at once ask it once. Raises FarmUnavailableError."""
        loop = asyncio.get_running_loop()
        if self._pool is None or loop.time() - self._pool_at > max_age_s:
            async with self._asking:
                if self._pool is None or loop.time() - self._pool_at > max_age_s:
                    self._pool = await self.link.pool()
                    self._pool_at = loop.time()
        return self._pool


def build_services(
    settings: Settings,
    *,
    name: str,
    incarnation: str,
    link: FarmLink,
    ledger: Ledger,
    wall: Callable[[], float] = time.time,
) -> Services:
    """Put together what one gateway needs. `settings.owner` is who asks without a key."""
    meters = Meters(name, incarnation)
    singles = Singles(ledger.store)
    return Services(
        settings=settings,
        name=name,
        link=link,
        ledger=ledger,
        keys=Keys(ledger.store),
        singles=singles,
        meters=meters,
        cards=Cards(settings),
        gateway=Gateway(f"{name}/{incarnation}", link, meters),
        keeping=Keeping(singles, meters),
        local=keyless(settings.owner or "local") if needs_no_key(settings) else None,
        wall=wall,
    )


async def _services(request: Request) -> Services:
    return cast(Services, request.app.state.services)


Served = Annotated[Services, Depends(_services)]
"""The type of a route's parameter that wants them."""
