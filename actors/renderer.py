"""The Ray actor that owns one GPU (or the CPU): a shell around `farm.renderer.Renderer`."""

import asyncio
import os
import time
import uuid
from collections.abc import Awaitable
from typing import Any, TypeVar

import ray
from filelock import FileLock, Timeout
from ray.exceptions import RayError, RayTaskError

from actors.logs import log_to_stderr
from actors.names import DISPATCHER, NAMESPACE
from farm import __version__
from farm.devices import local_device
from farm.errors import FarmUnavailableError
from farm.lease import Ask, Beat, Completion, GiveBack, Hello, Renewal, Reply
from farm.ledger import Ledger
from farm.renderer import Renderer
from farm.settings import Settings
from farm.storage.opening import open_store

T = TypeVar("T")

CALL_S = 30.0
"""How long a call to the dispatcher may take before it counts as not answered; longer than a parked question."""


class DispatcherLink:
    """The dispatcher by its name, looked up again after every failure, since it restarts under that name."""

    def __init__(self) -> None:
        self._handle: Any = None

    async def meet(self, hello: Hello) -> tuple[str, ...]:
        dropped: tuple[str, ...] = await self._call("meet", hello)
        return dropped

    async def ask(self, question: Ask) -> Reply:
        reply: Reply = await self._call("ask", question)
        return reply

    async def renew(self, beat: Beat) -> Renewal:
        renewal: Renewal = await self._call("renew", beat)
        return renewal

    async def complete(self, completion: Completion) -> None:
        await self._call("complete", completion)

    async def give_back(self, end: GiveBack) -> None:
        await self._call("give_back", end)

    async def _call(self, method: str, *arguments: object) -> Any:
        try:
            if self._handle is None:
                self._handle = await asyncio.to_thread(ray.get_actor, DISPATCHER, NAMESPACE)
            call: Awaitable[Any] = getattr(self._handle, method).remote(*arguments)
            return await asyncio.wait_for(call, CALL_S)
        except RayTaskError:
            raise  # it answered, with an error of its own: asking again would bring the same
        except (RayError, TimeoutError, ValueError) as exc:
            self._handle = None
            raise FarmUnavailableError(f"the dispatcher does not answer {method}: {exc}") from exc


@ray.remote
class RendererActor:
    """One renderer, one process, one device.

    After a crash nothing of it is left but what it stored: the dispatcher notices at once, leases its shards again and
    starts another in its slot. It never restarts by itself. `drop`, `revoke` and `retire` are safe to repeat.
    """

    def __init__(self, name: str, settings: Settings, cores: int):
        log_to_stderr()
        self._lock = _own_device(settings)
        self._renderer = Renderer(
            name=name,
            incarnation=f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}",
            device="cuda:0" if self._lock else "cpu",
            device_name=local_device().name,
            cores=cores,
            vram_gib=settings.vram_gib,
            ledger=Ledger(open_store(settings.store, settings)),
            link=DispatcherLink(),
        )
        self._work: asyncio.Task[None] | None = None

    async def work(self, version: str) -> None:
        """Work until retired; whoever waits for this learns of the process's death at once. Safe to call again.

        Raises FarmUnavailableError where the dispatcher is of another version than this process.
        """
        if version != __version__:
            node = os.uname().nodename
            raise FarmUnavailableError(
                f"the farm on {node} has version {__version__}, its dispatcher {version}; install {version} on {node}"
            )
        if self._work is None:
            self._work = asyncio.create_task(self._renderer.work())
        await asyncio.shield(self._work)

    async def drop(self, token: str) -> None:
        """Stop working on one lease."""
        self._renderer.drop(token)

    async def revoke(self, token: str) -> None:
        """Give one lease back if it has not begun."""
        self._renderer.revoke(token)

    async def retire(self) -> None:
        """End `work` within a denoising step."""
        self._renderer.retire()


def _own_device(settings: Settings) -> FileLock | None:
    """Lock the GPU that Ray assigned, so that no second farm on this machine uses it; None where there is no GPU."""
    gpus = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
    if not gpus:
        return None
    lock = FileLock(f"/tmp/farm-gpu-{gpus[0]}.lock", mode=0o666)
    try:
        lock.acquire(timeout=0)
    except Timeout as exc:
        raise FarmUnavailableError(
            f"GPU {gpus[0]} of {os.uname().nodename} is held by another farm ({lock.lock_file}); stop that one first"
        ) from exc
    return lock
