"""A real farm in one process behind a UNIX socket, for clients that block and clients that await alike."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from farm.client import AsyncClient, Client
from tests.unit.server.farm_in_process import FarmInProcess

URL = "http://127.0.0.1:8000"


class Endpoint:
    """A farm that runs in a thread of its own. `path`: of its socket."""

    def __init__(self, farm: FarmInProcess, path: Path, loop: asyncio.AbstractEventLoop):
        self.farm = farm
        self.path = path
        self.loop = loop

    def client(self, key: str = "", **options: Any) -> Client:
        return Client(URL, key, transport=httpx2.HTTPTransport(uds=str(self.path)), **options)

    def async_client(self, key: str = "", **options: Any) -> AsyncClient:
        return AsyncClient(URL, key, transport=httpx2.AsyncHTTPTransport(uds=str(self.path)), **options)


@contextlib.contextmanager
def live(folder: Path, **settings: Any) -> Iterator[Endpoint]:
    """Run a farm for the length of the block."""
    ready: list[Endpoint] = []
    failed: list[BaseException] = []
    up, leave = threading.Event(), asyncio.Event()

    async def run() -> None:
        async with FarmInProcess(folder, **settings) as farm, farm.listening() as path:
            ready.append(Endpoint(farm, path, asyncio.get_running_loop()))
            up.set()
            await leave.wait()

    def main() -> None:
        try:
            asyncio.run(run())
        except BaseException as exc:  # noqa: BLE001  (raised again below, in the test's thread)
            failed.append(exc)
        finally:
            up.set()

    thread = threading.Thread(target=main)
    thread.start()
    up.wait(120)
    try:
        if ready:
            yield ready[0]
    finally:
        if ready and thread.is_alive():
            ready[0].loop.call_soon_threadsafe(leave.set)
        thread.join(120)
        if failed:
            raise failed[0]


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    with live(tmp_path_factory.mktemp("farm")) as found:
        yield found
