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
from farm.devices import gpu_of, local_device, number_as_nvml, numerics_for
from farm.errors import FarmUnavailableError
from farm.lease import Ask, Beat, Completion, GiveBack, Hello, Renewal, Reply
from farm.ledger import Ledger
from farm.modelcard import ModelCard, find_card
from farm.plan import Numerics
from farm.portion import Answer, Portion
from farm.renderer import Renderer
from farm.settings import Settings
from farm.storage.opening import open_store
from farm.tally import Snapshot
from farm.weights import export, pinned

T = TypeVar("T")

CALL_S = 30.0
"""How long a call to the dispatcher may take before it counts as not answered; longer than a parked question."""


MAX_CALLS = 10_000
"""Calls that may be waiting in one renderer at once: every urgent portion is one."""


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

    async def report(self, snapshot: Snapshot) -> None:
        await self._call("report", snapshot)

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


@ray.remote(max_concurrency=MAX_CALLS, enable_task_events=False)
class RendererActor:
    """One renderer, one process, one device.

    After a crash nothing of it is left but what it stored: the dispatcher notices at once, leases its shards again and
    starts another in its slot. It never restarts by itself. `draw`, `warm`, `drop`, `revoke` and `retire` are safe to repeat; a
    `draw` that is cancelled drops its portion.
    """

    def __init__(self, name: str, settings: Settings, cores: int):
        log_to_stderr()
        self._lock = _own_device(settings)
        self._settings = settings
        export(settings)
        number_as_nvml()
        machine = local_device()
        own = gpu_of(machine, _gpu())
        self._renderer = Renderer(
            name=name,
            incarnation=f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}",
            device="cuda:0" if self._lock else "cpu",
            device_name=own.name if own else machine.name,
            cores=cores,
            vram_gib=settings.vram_gib,
            host_gib=settings.host_gib,
            ledger=Ledger(open_store(settings.store, settings)),
            link=DispatcherLink(),
            machine=machine,
            renderers=settings.renderers,
            gpu=_gpu(),
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

    async def draw(self, portion: Portion) -> Answer:
        """Draw urgent images; see `farm.renderer.Renderer.draw`."""
        return await self._renderer.draw(portion)

    async def warm(self, model: str, renderers: int) -> None:
        """Load a model once nothing else wants the device, as it is planned where there are so many renderers.

        Raises UnknownModelError, ModelCardError or PlacementError.
        """
        self._renderer.warm(*await asyncio.to_thread(_planned, model, self._settings, renderers))

    async def drop(self, token: str) -> None:
        """Stop working on one lease or portion."""
        self._renderer.drop(token)

    async def revoke(self, token: str) -> None:
        """Give one lease back if it has not begun."""
        self._renderer.revoke(token)

    async def retire(self) -> None:
        """End `work` within a denoising step."""
        self._renderer.retire()


def _planned(model: str, settings: Settings, renderers: int) -> tuple[ModelCard, Numerics]:
    card = pinned(find_card(model, settings), settings=settings)
    return card, numerics_for(card, device=local_device(), renderers=renderers)


def _gpu() -> str | None:
    """The GPU that Ray assigned, None where there is none."""
    gpus = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
    return str(gpus[0]) if gpus else None


def _own_device(settings: Settings) -> FileLock | None:
    """Lock the GPU that Ray assigned, so that no second farm on this machine uses it; None where there is no GPU."""
    gpu = _gpu()
    if gpu is None:
        return None
    lock = FileLock(f"/tmp/farm-gpu-{gpu}.lock", mode=0o666)
    try:
        lock.acquire(timeout=0)
    except Timeout as exc:
        raise FarmUnavailableError(
            f"GPU {gpu} of {os.uname().nodename} is held by another farm ({lock.lock_file}); stop that one first"
        ) from exc
    return lock
