"""One torch device: its limits, its memory, moving parts on and off it, and its errors in the farm's words.

Host copies of a part's weights never change, so taking it off the device copies nothing back.
"""

import gc
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.hooks import apply_group_offloading
from torch import nn

from farm.devices import host_memory, local_device
from farm.errors import DeviceLostError, NumericsError, OutOfMemoryError
from farm.models.hostcopy import packed
from farm.placement import PINNED_SHARE, DeviceLimits

GIB = 2**30

_NO_MEMORY = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
_HARMLESS = frozenset({1, 9, 98, 209, 701})
"""CUDA errors of a call that was asked amiss (value, configuration, no such kernel, too many resources): the device
goes on. After all others every call fails until the process ends."""


class Device:
    """A torch device by name: cpu, cuda:N, or cuda, which is the one that torch uses by default.

    `renderers`: how many share the node's memory; one for each of its GPUs where nobody says. `working`: bytes that each phase
    took at most, measured where it is a dict.
    """

    def __init__(self, name: str, *, vram_gib: float, renderers: int | None = None):
        self.torch = torch.device(name)
        self.is_cuda = self.torch.type == "cuda"
        self._vram_gib = vram_gib
        self._renderers = renderers
        self.working: dict[str, int] | None = None
        if self.is_cuda and not torch.cuda.is_available():
            raise NumericsError(
                f"device {name} was asked for and torch {torch.__version__} finds no CUDA; install a CUDA build of "
                f"torch and a driver, or plan the job for the CPU"
            )
        if self.is_cuda and self.torch.index is None:
            # Tensors say cuda:0 where cuda was asked for, and the two names are not equal.
            self.torch = torch.device("cuda", torch.cuda.current_device())

    def limits(self) -> DeviceLimits:
        """Return what the device offers."""
        host_gib = host_memory().total_bytes / GIB
        if not self.is_cuda:
            return DeviceLimits("cpu", "the CPU", self._vram_gib, host_gib=host_gib, renderers=self._renderers or 1)
        found = torch.cuda.get_device_properties(self.torch)
        return DeviceLimits(
            "cuda",
            found.name,
            self._vram_gib,
            found.total_memory / GIB,
            torch.cuda.get_device_capability(self.torch),
            host_gib,
            renderers=self._renderers or max(1, len(local_device().gpus)),
        )

    def hold_to_budget(self) -> None:
        """Keep torch's allocator within the budget, so that what runs on a large card runs on a small one."""
        if self.is_cuda:
            limits = self.limits()
            share = limits.usable_gib / (limits.total_gib or limits.usable_gib)
            torch.cuda.set_per_process_memory_fraction(min(1.0, share), self.torch)

    def synchronize(self) -> None:
        """Wait until the device has done what was asked of it."""
        if self.is_cuda:
            with self.errors("finish its work"):
                torch.cuda.synchronize(self.torch)

    @contextmanager
    def watching(self, phase: str) -> Iterator[None]:
        """Measure what is allocated within beside what was there before; torch's peaks begin anew."""
        if self.working is None or not self.is_cuda:
            yield
            return
        before = torch.cuda.memory_allocated(self.torch)
        torch.cuda.reset_peak_memory_stats(self.torch)
        try:
            yield
        finally:
            taken = torch.cuda.max_memory_allocated(self.torch) - before
            self.working[phase] = max(taken, self.working.get(phase, 0))

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """Have a copy in host memory once the device is synchronised; the host goes on meanwhile."""
        if not self.is_cuda:
            return tensor
        return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)

    def empty_cache(self) -> None:
        """Give memory that holds nothing back to the device."""
        if self.is_cuda:
            with self._lost_told("free memory"):
                torch.cuda.empty_cache()

    def recover(self) -> None:
        """Free what only a failed batch held, also what hangs in reference cycles."""
        gc.collect()
        self.empty_cache()

    def let_go(self) -> None:
        """Free what a model held that is unloaded: on the device, in reference cycles, and pinned in host memory."""
        self.recover()
        if self.is_cuda:
            with self._lost_told("free pinned memory"):
                torch.accelerator.memory.empty_host_cache()

    @contextmanager
    def errors(self, doing: str) -> Iterator[None]:
        """Raise OutOfMemoryError where the device, or the machine, has no memory left, DeviceLostError where it broke."""
        try:
            with self._lost_told(doing):
                yield
        except (torch.OutOfMemoryError, MemoryError) as exc:
            failed = exc
        except RuntimeError as exc:
            if not any(words in str(exc) for words in _NO_MEMORY):
                raise
            failed = exc
        else:
            return
        # Tracebacks hold the tensors of the frames that failed; without them the memory can be given back.
        failed.__traceback__ = None
        raise OutOfMemoryError(f"no memory left on {self.torch} to {doing}: {_line(failed)}") from failed

    @contextmanager
    def _lost_told(self, doing: str) -> Iterator[None]:
        try:
            yield
        except torch.AcceleratorError as exc:
            if getattr(exc, "error_code", None) in _HARMLESS or any(words in str(exc) for words in _NO_MEMORY):
                raise
            raise DeviceLostError(
                f"{self.torch} failed and could not {doing}: {_line(exc)}; this process cannot use it any more, another "
                f"one may: see nvidia-smi -q and the kernel's log (Xid) where it happens again"
            ) from exc


class Part:
    """A module that comes onto a device and leaves it. Its weights stay in host memory all the while, and never change.

    `pin`: have them pinned before they first leave for a GPU, where there is memory for that: copies are two to three times as
    quick. `without`: modules in it that others move. What a quantised layer keeps beside its weights moves with them.
    """

    def __init__(self, module: nn.Module, *, pin: bool = False, without: Sequence[nn.Module] = ()):
        self.module = module
        self._pin = pin
        self._without = {id(tensor) for other in without for tensor in (*other.parameters(), *other.buffers())}
        self._copies: dict[Hashable, tuple[torch.Tensor, torch.Tensor]] = {}
        places = {tensor.device for tensor in self._tensors()} or {torch.device("cpu")}
        self._on = places.pop() if len(places) == 1 else None

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""
        return sum(tensor.nbytes for tensor in {_key(tensor): tensor for tensor in self._tensors()}.values())

    def move(self, device: torch.device) -> None:
        """Bring the weights to `device`; nothing happens where they are there already.

        A move that fails half way, for want of memory, is finished or undone by the next one.
        """
        if device == self._on:
            return
        self._on = None
        if device.type == "cpu":
            self._leave()
        else:
            if device.type == "cuda":
                self.pin()
            self._enter(device)
        self._on = device

    def _enter(self, device: torch.device) -> None:
        arrived = {_key(host): copy for copy, host in self._copies.values()}
        for owner, name in self._slots():
            host = getattr(owner, name)
            if host.device == device:
                continue
            copy = arrived.get(_key(host))
            if copy is None:
                copy = arrived[_key(host)] = host.to(device, non_blocking=True)
                self._copies[_key(copy)] = copy, host
            setattr(owner, name, copy)

    def _leave(self) -> None:
        """Point back at the host copies; what was made on the device, as quantised weights are, is copied off it once."""
        hosts = {key: host for key, (_, host) in self._copies.items()}
        for owner, name in self._slots():
            tensor = getattr(owner, name)
            host = hosts.get(_key(tensor))
            if host is None and tensor.device.type != "cpu":
                host = hosts[_key(tensor)] = tensor.to("cpu")
                self._copies[_key(tensor)] = tensor, host  # alive until the end: keys are addresses
            if host is not None:
                setattr(owner, name, host)
        self._copies = {}

    def pin(self) -> bool:
        """Have the weights pinned where that was asked for and memory allows; returns whether they are."""
        tensors = {_key(tensor): tensor for tensor in self._tensors() if tensor.device.type == "cpu"}
        if self._pin and sum(tensor.nbytes for tensor in tensors.values()) <= PINNED_SHARE * host_memory().free_bytes:
            self._have_pinned(tensors)
        self._pin = False
        return all(tensor.is_pinned() for tensor in self._tensors())

    def _have_pinned(self, tensors: dict[Hashable, torch.Tensor]) -> None:
        pinned = dict(zip(tensors, packed(list(tensors.values()), pin=True), strict=True))
        for owner, name in self._slots():
            tensor = getattr(owner, name)
            if tensor.device.type == "cpu":
                setattr(owner, name, pinned[_key(tensor)])

    def _tensors(self) -> Iterator[torch.Tensor]:
        for owner, name in self._slots():
            yield getattr(owner, name)

    def _slots(self) -> Iterator[tuple[Any, str]]:
        """Where the module keeps tensors: object and attribute."""
        for tensor in (*self.module.parameters(), *self.module.buffers()):
            if id(tensor) in self._without:
                continue
            yield tensor, "data"
            for owner in _quantised_states(tensor):
                for name in _STATE_TENSORS:
                    if isinstance(getattr(owner, name, None), torch.Tensor):
                        yield owner, name
        for module in self.module.modules():
            owner = getattr(module, "state", None)  # of bitsandbytes' int8 layers, once they were used
            for name in ("CB", "SCB"):
                if isinstance(getattr(owner, name, None), torch.Tensor):
                    yield owner, name


_STATE_TENSORS = ("absmax", "code", "offset", "CB", "SCB")


def _quantised_states(tensor: torch.Tensor) -> Iterator[Any]:
    """What bitsandbytes keeps beside a quantised weight: its own attributes (int8), its states (nf4), one in the other."""
    if hasattr(tensor, "SCB"):
        yield tensor
    state = getattr(tensor, "quant_state", None)
    while state is not None:
        yield state
        state = getattr(state, "state2", None)


def _key(tensor: torch.Tensor) -> Hashable:
    """Equal for tensors that are the same weights, as tied ones are; for as long as one of them lives."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.size(), tensor.dtype


class Streamed:
    """A module of which a block at a time is on the device, the next one on its way: diffusers' group offload.

    The last resort: every step copies all weights. `pin` as for a Part. What lies outside of the modules that own blocks stays on
    the device between `move` there and back.
    """

    def __init__(self, module: nn.Module, *, pin: bool = False):
        self.module = module
        self._owners = tuple(_block_owners(module))
        self._rest = Part(module, without=self._owners, pin=pin)
        self._blocks = [Part(owner, pin=pin) for owner in self._owners]
        self._on: torch.device | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of its weights."""
        return self._rest.nbytes + sum(part.nbytes for part in self._blocks)

    def move(self, device: torch.device) -> None:
        """Be ready to compute on `device`, or take all that is there off it, also what a failed step left."""
        if device.type != "cpu":
            self.stream_to(device)
        elif self._on is not None:
            for module in self.module.modules():
                registry = getattr(module, "_diffusers_hook", None)
                hook = registry and registry.get_hook("group_offloading")
                if hook:
                    hook.group.offload_()
        self._rest.move(device)

    def stream_to(self, device: torch.device) -> None:
        """Have blocks copied to `device` as they are needed, beside the computation where it is a GPU; once and for all."""
        if self._on is not None:
            return
        self._on = device
        for part, owner in zip(self._blocks, self._owners, strict=True):
            pinned = device.type == "cuda" and part.pin()
            apply_group_offloading(
                owner,
                onload_device=device,
                offload_device=torch.device("cpu"),
                offload_type="block_level",
                num_blocks_per_group=1,
                non_blocking=device.type == "cuda",
                use_stream=device.type == "cuda",
                low_cpu_mem_usage=not pinned,
            )


def _block_owners(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules with a list of blocks of their own; a list itself owns nothing, as it has no forward."""
    if not isinstance(module, nn.ModuleList) and any(isinstance(child, nn.ModuleList) for child in module.children()):
        yield module
        return
    for child in module.children():
        yield from _block_owners(child)


def _line(exc: BaseException) -> str:
    return " ".join(str(exc).split())[:300]
