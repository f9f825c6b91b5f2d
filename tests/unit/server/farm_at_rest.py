"""The endpoint over a store, with a farm that knows its renderers and renders nothing: for tests of what reads and writes jobs.

asking(FarmAtRest(tmp_path), lambda client: client.get("/v1/jobs"))
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import httpx2

from farm.devices import DeviceInfo
from farm.errors import FarmUnavailableError, UnknownRendererError
from farm.keys import Scope, create_key
from farm.ledger import Ledger
from farm.portion import Allowance, Answer, Entry, Placing, PoolView, Portion, Refusal, RendererView, SeatEnd
from farm.run import JobProgress
from farm.server.app import create_app
from farm.server.services import build_services
from farm.settings import Settings
from farm.storage.base import ObjectStore
from farm.storage.local import LocalStore
from farm.tally import Snapshot

T = TypeVar("T")

NOW = 1_795_000_000.0  # 2026-11-18T11:06:40Z
MACHINE = DeviceInfo("cpu", "CPU, 4 cores", (), 4)


class FarmAtRest:
    """A FarmLink, and the app over it. `away`: whether it answers nobody; `told`: jobs that it was told of."""

    def __init__(self, folder: Path, *, store: ObjectStore | None = None, **settings: Any):
        self.now = NOW
        self.settings = Settings(**{"store": str(folder / "store"), "owner": "me"} | settings)
        self.ledger = Ledger(store or LocalStore(Path(self.settings.store)))
        self.away = False
        self.machine: DeviceInfo | None = MACHINE
        self.renderers = (
            RendererView("renderer-0", "rendering", "CPU", "sketch", "captions", 2, False),
            RendererView("renderer-1", "idle", "CPU", None, None, 0, True),
        )
        self.told: list[str] = []
        self.charged: list[tuple[str, int]] = []
        self.refusal: Refusal | None = None
        self.progresses: dict[str, JobProgress] = {}
        self.stall_codes: dict[str, str] = {}
        self.services = build_services(
            self.settings, name="gateway-0", incarnation="1", link=self, ledger=self.ledger, wall=lambda: self.now
        )
        self.app = create_app(self.services)

    @asynccontextmanager
    async def http(self, key: str | None = None) -> AsyncIterator[httpx2.AsyncClient]:
        """A client on the app itself, with a key."""
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        transport = httpx2.ASGITransport(app=self.app)
        async with httpx2.AsyncClient(
            transport=transport, base_url="http://127.0.0.1:8000", headers=headers, timeout=60
        ) as client:
            yield client

    def key(self, owner: str, *scopes: Scope, allowance: Allowance | None = None) -> str:
        """Make a key, and return its text."""
        made = create_key(
            self.ledger.store, owner=owner, scopes=scopes, at=datetime.fromtimestamp(self.now, UTC), allowance=allowance
        )
        return made.text

    async def enter(self, entry: Entry) -> Placing:
        self._here()
        return Placing(refusal=Refusal("busy", "this farm renders nothing", 5.0))

    async def draw(self, renderer: str, portion: Portion) -> Answer:
        raise FarmUnavailableError("this farm renders nothing")

    async def drop(self, renderer: str, token: str) -> None:
        self._here()

    async def leave(self, token: str, *, seconds: float, end: SeatEnd = "done") -> None:
        self._here()

    async def hold(self, gateway: str, tokens: Sequence[str], snapshot: Snapshot) -> None:
        self._here()

    async def charge(self, key: str, allowance: Allowance, images: int) -> Refusal | None:
        self._here()
        if self.refusal is None:
            self.charged.append((key, images))
        return self.refusal

    async def submit(self, job: str) -> None:
        self._here()
        self.told.append(job)

    async def progress(self, job: str) -> tuple[JobProgress | None, str | None]:
        self._here()
        return self.progresses.get(job), self.stall_codes.get(job)

    async def pool(self) -> PoolView:
        self._here()
        return PoolView(
            "1", self.ledger.store.url, self.renderers, self.machine, waiting=2, capacity=self.settings.max_waiting
        )

    async def drain(self, renderer: str, drained: bool) -> None:
        self._here()
        if renderer not in [one.name for one in self.renderers]:
            raise UnknownRendererError(f"no renderer {renderer!r}; there are renderer-0, renderer-1")
        state = "drained" if drained else "idle"
        self.renderers = tuple(replace(one, state=state) if one.name == renderer else one for one in self.renderers)

    async def metrics(self) -> Sequence[Snapshot]:
        self._here()
        return ()

    def _here(self) -> None:
        if self.away:
            raise FarmUnavailableError("the dispatcher is away")


def asking(farm: FarmAtRest, ask: Callable[[httpx2.AsyncClient], Awaitable[T]], *, key: str | None = None) -> T:
    """Run what a client asks in an event loop of its own."""

    async def main() -> T:
        async with farm.http(key) as client:
            return await ask(client)

    return asyncio.run(main())
