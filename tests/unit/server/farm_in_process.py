"""A real farm in one process, without Ray: the desk, renderers, engine, model `sketch`, a store in a folder, and the endpoint.

    async with FarmInProcess(tmp_path) as farm:            # in one event loop
        async with farm.http() as client:                  # httpx2 on the ASGI app itself
            answer = await client.post("/v1/images/generations", json={...})
        async with farm.listening() as socket:             # a live uvicorn on a UNIX socket: streams, disconnects
            ...

What Ray does is done by hand: processes start, are told things by name, and can be killed (`kill`); the dispatcher can be
away (`away`).
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx2
import uvicorn
from fastapi import FastAPI

from farm.claims import Claims, claim_of
from farm.desk import Desk
from farm.devices import DeviceInfo
from farm.engine import Engine
from farm.errors import FarmUnavailableError, RendererDiedError
from farm.ledger import Ledger
from farm.portion import Allowance, Answer, Entry, Placing, PoolView, Portion, Refusal, SeatEnd
from farm.renderer import Renderer
from farm.run import JobProgress
from farm.server.app import create_app
from farm.server.services import Services, build_services
from farm.settings import Settings
from farm.storage.local import LocalStore
from farm.tally import Snapshot

T = TypeVar("T")

URL = "http://127.0.0.1:8000"
STOP_S = 20.0


class FarmInProcess:
    """A farm and its endpoint; a FarmLink, a Pool and a renderer's Link at once. Enter it inside a running event loop.

    `settings`: of `farm.settings.Settings`. `renderers`: how many, each with `cores` places to render in.
    """

    def __init__(self, folder: Path, *, renderers: int = 1, cores: int = 1, **settings: Any):
        self.settings = Settings(**{"store": str(folder / "store"), "owner": "me"} | settings)
        self.names = tuple(f"renderer-{slot}" for slot in range(renderers))
        self.device = DeviceInfo("cpu", f"CPU, {cores} cores", (), cores * renderers)
        self.ledger = Ledger(LocalStore(Path(self.settings.store)))
        self.renderers: dict[str, Renderer] = {}
        self.lives = 0
        self.away = False
        """Whether the dispatcher answers nobody."""
        self.drawn: list[tuple[str, Portion]] = []
        """Portions as they came to renderers."""
        self.dropped: list[tuple[str, str]] = []
        self._cores = cores
        self._ends: dict[str, asyncio.Future[None]] = {}
        self._told: set[asyncio.Task[Any]] = set()
        self._folder = folder
        self._undo = contextlib.ExitStack()
        self.services: Services
        self.app: FastAPI
        self.desk: Desk

    async def __aenter__(self) -> Self:
        settings = self.settings
        self._undo.callback(setattr, Engine, "load", Engine.load)
        Engine.load = _alone(Engine.load)  # type: ignore[assignment, method-assign]
        self.desk = Desk(
            epoch="epoch-1",
            pool=self,
            ledger=self.ledger,
            claims=Claims(self.ledger.store, claim_of("farm-in-process", pid=0)),
            names=self.names,
            all_open=True,
            shares=settings.shares,
            max_waiting=settings.max_waiting,
            reserve=settings.reserve,
        )
        self.services = build_services(
            settings, name="gateway-0", incarnation="1", link=self, ledger=self.ledger, wall=time.time
        )
        self.app = create_app(self.services)
        self._lifespan = self.app.router.lifespan_context(self.app)
        await self._lifespan.__aenter__()
        async with asyncio.timeout(STOP_S):
            while any(one.state == "starting" for one in (await self.desk.pool()).renderers):  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._lifespan.__aexit__(None, None, None)
        await asyncio.wait_for(self.desk.stop(), STOP_S)
        for task in list(self._told):
            task.cancel()
        await asyncio.gather(*self._told, return_exceptions=True)
        self._undo.close()

    # For tests

    @contextlib.asynccontextmanager
    async def http(self, **options: Any) -> AsyncIterator[httpx2.AsyncClient]:
        """A client on the app itself; it sees an answer when it is whole."""
        transport = httpx2.ASGITransport(app=self.app)
        async with httpx2.AsyncClient(transport=transport, base_url=URL, timeout=60, **options) as client:
            yield client

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[Path]:
        """The app behind a live uvicorn on a UNIX socket; yields its path, for `httpx2.AsyncHTTPTransport(uds=...)`."""
        path = self._folder / "http.sock"
        config = uvicorn.Config(self.app, uds=str(path), lifespan="off", log_config=None, timeout_graceful_shutdown=2)
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server._serve())
        try:
            await self.until(lambda: server.started)
            yield path
        finally:
            server.should_exit = True
            await asyncio.wait_for(serving, STOP_S)

    @contextlib.asynccontextmanager
    async def live(self, **options: Any) -> AsyncIterator[httpx2.AsyncClient]:
        """A client over that socket: streams and disconnects are real."""
        async with self.listening() as path:
            transport = httpx2.AsyncHTTPTransport(uds=str(path))
            async with httpx2.AsyncClient(transport=transport, base_url=URL, timeout=60, **options) as client:
                yield client

    async def until(self, true: Callable[[], object], *, seconds: float = 60) -> None:
        """Wait until something is true."""
        async with asyncio.timeout(seconds):
            while not true():  # noqa: ASYNC110  (what it waits for has no event)
                await asyncio.sleep(0.005)

    def kill(self, renderer: str) -> None:
        """End a renderer's process: what it drew is lost, and the desk starts another."""
        _end(self._ends[renderer], f"{renderer} was killed")

    # A pool of processes

    def find(self) -> tuple[str, ...]:
        return ()

    async def work(self, renderer: str) -> None:
        self.lives += 1
        loop = asyncio.get_running_loop()
        end: asyncio.Future[None] = loop.create_future()
        process = Renderer(
            name=renderer,
            incarnation=f"{self.lives:08d}",
            device="cpu",
            device_name=self.device.name,
            cores=self._cores,
            vram_gib=self.settings.vram_gib,
            ledger=self.ledger,
            link=_RendererLink(self, end),
            machine=self.device,
            end_process=lambda code: loop.call_soon_threadsafe(_end, end, f"{renderer} ended with code {code}"),
        )
        self._ends[renderer], self.renderers[renderer] = end, process
        working = asyncio.create_task(process.work())
        try:
            await asyncio.wait((working, end), return_when=asyncio.FIRST_COMPLETED)
            if end.done():
                end.result()
            await working
        finally:
            del self.renderers[renderer]
            _end(end, f"{renderer} was retired")
            process.retire()
            await asyncio.wait((working,), timeout=STOP_S)

    def drop(self, renderer: str, token: str) -> Any:
        """Both a pool's and a link's: tells at once, and may be awaited."""
        self.dropped.append((renderer, token))
        process = self.renderers.get(renderer)
        if process is not None:
            process.drop(token)
        done = asyncio.get_running_loop().create_future()
        done.set_result(None)
        return done

    def revoke(self, renderer: str, token: str) -> None:
        process = self.renderers.get(renderer)
        if process is not None:
            process.revoke(token)

    def retire(self, renderer: str) -> None:
        process = self.renderers.get(renderer)
        if process is not None:
            process.retire()

    def end(self, renderer: str) -> None:
        self.kill(renderer)

    def warm(self, renderer: str, model: str) -> None:
        process = self.renderers.get(renderer)
        if process is not None:
            warming = asyncio.ensure_future(self._warm(process, model))
            self._told.add(warming)
            warming.add_done_callback(self._told.discard)

    async def _warm(self, process: Renderer, model: str) -> None:
        ready = await self.services.cards.ready(model, self.device, len(self.names))
        process.warm(ready.card, ready.numerics)

    # The live farm as the endpoint sees it

    async def enter(self, entry: Entry) -> Placing:
        return await self._at_desk(self.desk.enter(entry))

    async def draw(self, renderer: str, portion: Portion) -> Answer:
        self.drawn.append((renderer, portion))
        process, end = self.renderers.get(renderer), self._ends.get(renderer)
        if process is None or end is None:
            raise RendererDiedError(f"{renderer} is not there")
        drawing = asyncio.ensure_future(process.draw(portion))
        try:
            await asyncio.wait((drawing, end), return_when=asyncio.FIRST_COMPLETED)
            if not drawing.done():
                raise RendererDiedError(f"{renderer} ended while it drew")
            return drawing.result()
        finally:
            # Ray does not end an actor's call with its caller: only `drop` does.
            drawing.add_done_callback(_seen)

    async def leave(self, token: str, *, seconds: float, end: SeatEnd = "done") -> None:
        await self._at_desk(self.desk.leave(token, seconds=seconds, end=end))

    async def hold(self, gateway: str, tokens: Sequence[str], snapshot: Snapshot) -> None:
        await self._at_desk(self.desk.hold(gateway, tokens, snapshot))

    async def charge(self, key: str, allowance: Allowance, images: int) -> Refusal | None:
        return await self._at_desk(self.desk.charge(key, allowance, images))

    async def submit(self, job: str) -> None:
        await self._at_desk(self.desk.submit(job))

    async def progress(self, job: str) -> tuple[JobProgress | None, str | None]:
        return await self._at_desk(self.desk.progress(job))

    async def pool(self) -> PoolView:
        return await self._at_desk(self.desk.pool())

    async def drain(self, renderer: str, drained: bool) -> None:
        await self._at_desk(self.desk.drain(renderer, drained))

    async def metrics(self) -> Sequence[Snapshot]:
        return await self._at_desk(self.desk.metrics())

    async def _at_desk(self, call: Coroutine[Any, Any, T]) -> T:
        if self.away:
            call.close()
            raise FarmUnavailableError("the dispatcher is away")
        return await call


class _RendererLink:
    """The desk, as renderers see it: whatever they call there is passed on."""

    def __init__(self, farm: FarmInProcess, end: "asyncio.Future[None]"):
        self._farm = farm
        self._end = end

    def __getattr__(self, method: str) -> Callable[..., Coroutine[Any, Any, Any]]:
        async def call(*arguments: Any) -> Any:
            if self._end.done():
                raise FarmUnavailableError("a process that has ended says nothing")
            return await self._farm._at_desk(getattr(self._farm.desk, method)(*arguments))

        return call


def _end(end: "asyncio.Future[None]", why: str) -> None:
    """End a process's life, if it has not ended; where nobody watches any more, that is no error."""
    if not end.done():
        end.set_exception(RendererDiedError(why))
        end.exception()


def _seen(task: "asyncio.Future[Any]") -> None:
    if not task.cancelled():
        task.exception()


_LOADING = threading.Lock()


def _alone(load: Callable[[Engine], float]) -> Callable[[Engine], float]:
    """Loads of two renderers in one process must not meet: diffusers swaps torch's own methods while it loads."""

    def alone(engine: Engine) -> float:
        with _LOADING:
            return load(engine)

    return alone
