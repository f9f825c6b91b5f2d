"""One torch device: its limits, its memory, moving parts on and off it, and its errors in the farm's words.

Host copies of a part's weights never change, so taking it off the device copies nothing back.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from farm.errors import DeviceLostError, NumericsError, OutOfMemoryError
from farm.placement import DeviceLimits

GIB = 2**30

_NO_MEMORY = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
_HARMLESS = frozenset({1, 9, 98, 209, 701})
"""CUDA errors of a call that was asked amiss (value, configuration, no such kernel, too many resources): the device
goes on. After all others every call fails until the process ends."""


class Device:
    """A torch device by name: cpu, cuda:N, or cuda, which is the one that torch uses by default."""

    def __init__(self, name: str, *, vram_gib: float):
        self.torch = torch.device(name)
        self.is_cuda = self.torch.type == "cuda"
        self._vram_gib = vram_gib
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
        if not self.is_cuda:
            return DeviceLimits("cpu", "the CPU", self._vram_gib)
        found = torch.cuda.get_device_properties(self.torch)
        return DeviceLimits(
            "cuda", found.name, self._vram_gib, found.total_memory / GIB, torch.cuda.get_device_capability(self.torch)
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

    def empty_cache(self) -> None:
        """Give memory that holds nothing back to the device."""
        if self.is_cuda:
            with self._lost_told("free memory"):
                torch.cuda.empty_cache()

    def recover(self) -> None:
        """Free what only a failed batch held, also what hangs in reference cycles."""
        gc.collect()
        self.empty_cache()

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
    """A module that comes onto a device and leaves it. Its weights stay in host memory all the while."""

    def __init__(self, module: torch.nn.Module):
        self.module = module
        self._host = [(tensor, tensor.data) for tensor in (*module.parameters(), *module.buffers())]
        self._on: torch.device | None = torch.device("cpu")

    def move(self, device: torch.device) -> None:
        """Bring the weights to `device`; nothing happens where they are there already.

        A move that fails half way, for want of memory, is finished or undone by the next one.
        """
        if device == self._on:
            return
        self._on = None
        for tensor, host in self._host:
            tensor.data = host if device.type == "cpu" else host.to(device)
        self._on = device


def _line(exc: BaseException) -> str:
    return " ".join(str(exc).split())[:300]
