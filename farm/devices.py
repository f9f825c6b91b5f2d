"""What this machine can render on, found without importing torch, and the numerics that follow for a new plan.

Knows nothing of Ray: whether a cluster has GPUs elsewhere is asked in `actors/cluster.py`.
"""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from farm.errors import PlacementError
from farm.modelcard import ModelCard
from farm.plan import Numerics
from farm.versions import versions_for

BFLOAT16_CAPABILITY = (8, 0)
"""Compute capability from which bfloat16 is native; torch's own check counts emulation as support."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU of this machine as NVML names it."""

    uuid: str
    name: str
    memory_bytes: int
    capability: tuple[int, int]


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """What renderers on this machine use: its GPUs, or its CPU cores where there is none."""

    kind: Literal["cuda", "cpu"]
    name: str
    gpus: tuple[Gpu, ...]
    cores: int


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Main memory of this machine, or of the container that this process is in. `free_bytes`: what can be had now; files that
    the system keeps in memory only to save reading them count as free."""

    total_bytes: int
    free_bytes: int


CGROUP = Path("/sys/fs/cgroup")


def host_memory(cgroup: Path = CGROUP) -> HostMemory:
    """Measure main memory, and the limit that a container (cgroup version 2) has of it."""
    import psutil

    found = psutil.virtual_memory()
    total, free = int(found.total), int(found.available)
    with suppress(OSError, ValueError):
        limit = int((cgroup / "memory.max").read_text())  # "max", where there is no limit, is no number
        used = int((cgroup / "memory.current").read_text())
        stat = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        total = min(total, limit)
        free = min(free, max(0, limit - used + int(stat.get("inactive_file", 0))))
    return HostMemory(total, free)


def local_device() -> DeviceInfo:
    """Look at this machine. A machine without an NVIDIA driver is a CPU machine, never an error."""
    gpus = _gpus()
    cores = len(os.sched_getaffinity(0))
    if gpus:
        return DeviceInfo("cuda", gpus[0].name, gpus, cores)
    return DeviceInfo("cpu", f"CPU, {cores} cores", (), cores)


def number_as_nvml() -> None:
    """Have CUDA number GPUs as NVML and Ray do, by their places on the bus; before torch starts, in processes that render."""
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")


def gpu_of(device: DeviceInfo, assigned: str | None) -> Gpu | None:
    """Return the GPU that somebody names by its number on this machine or its UUID; None where it has no such GPU."""
    if assigned is None:
        return None
    if assigned.isdecimal():
        return device.gpus[int(assigned)] if int(assigned) < len(device.gpus) else None
    return next((gpu for gpu in device.gpus if gpu.uuid.startswith(assigned)), None)


def numerics_for(card: ModelCard, *, device: DeviceInfo, renderers: int) -> Numerics:
    """Fix how a new plan's pixels are computed. Raises PlacementError where the card is sound on none of these devices.

    Of several GPUs that are not alike it is a dtype that all can do; where there is none, those that cannot refuse the model when
    their turn comes, and leave it to the others.

    CPU renderers share the cores; the count of threads is frozen, since sums split among threads round differently.
    """
    dtypes = card.dtypes.get(device.kind, ())
    old = [gpu.capability < BFLOAT16_CAPABILITY for gpu in device.gpus]
    for_all = tuple(dtype for dtype in dtypes if dtype != "bfloat16")
    if old and (all(old) or (any(old) and for_all)):
        dtypes = for_all
    if not dtypes:
        raise PlacementError(
            f"model {card.name} cannot be rendered on {device.name}: its sound dtypes are "
            f"{ {kind: list(names) for kind, names in card.dtypes.items()} }; use a GPU of compute capability 8.0 or newer"
        )
    return Numerics(
        device=device.kind,
        dtype=dtypes[0],
        batch=card.batch.get(device.kind, 1),
        threads=(card.cpu_threads or cores_each(device, renderers)) if device.kind == "cpu" else 1,
        versions=versions_for(card, device.kind),
    )


def cores_each(device: DeviceInfo, renderers: int) -> int:
    """How many places a renderer has to render in: its share of the cores, or one on a GPU."""
    return max(1, device.cores // renderers) if device.kind == "cpu" else 1


def renderers_on(device: DeviceInfo, cores: int, *, most: int | None = None) -> int:
    """How many renderers, each with so many cores, there may be on a machine: one a GPU, else as many as share its cores.

    `most`: all that the farm has, where somebody set their number.
    """
    there = len(device.gpus) or max(1, device.cores // max(1, cores))
    return min(there, most or there)


def default_renderers(device: DeviceInfo, *, stays: bool = False) -> int:
    """One renderer a GPU. Where there is none, one for every two cores, and one for each in a farm that `stays`: processes draw
    single images faster than threads do, and it is worth their start. Four at most: each holds a model in memory."""
    return len(device.gpus) or min(max(1, device.cores if stays else device.cores // 2), 4)


def _gpus() -> tuple[Gpu, ...]:
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return ()
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return tuple(
            Gpu(
                uuid=str(pynvml.nvmlDeviceGetUUID(handle)),
                name=str(pynvml.nvmlDeviceGetName(handle)),
                memory_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
                capability=tuple(pynvml.nvmlDeviceGetCudaComputeCapability(handle)),
            )
            for handle in handles
        )
    finally:
        pynvml.nvmlShutdown()
