"""What a renderer's device does: seconds without work, and what its GPU says of itself by NVML, where it has one."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from farm.meters import Meters

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class GpuReading:
    """One moment of one GPU. `utilisation`: share of the last sample period in which a kernel ran, 0 to 1; None where the
    GPU does not say (a MIG slice)."""

    memory_used_bytes: int
    memory_total_bytes: int
    utilisation: float | None


class DeviceMeter:
    """Measures one renderer's device into its meters. `idle_s`: seconds so far in which it had no work; `gpu`: as GpuReader's."""

    def __init__(self, renderer: str, meters: Meters, *, idle_s: Callable[[], float], gpu: str | None = None):
        self._renderer = renderer
        self._meters = meters
        self._idle_s = idle_s
        self._counted_s = 0.0
        self._gpu = GpuReader(gpu) if gpu is not None else None

    def measure(self) -> None:
        """Count the idle seconds since the last call, and read the GPU. Takes milliseconds; from one thread at a time."""
        idle_s = self._idle_s()
        self._meters.count("farm_idle_seconds_total", max(idle_s - self._counted_s, 0.0), renderer=self._renderer)
        self._counted_s = idle_s
        reading = self._gpu.read() if self._gpu is not None else None
        if reading is None:
            return
        self._meters.gauge("farm_gpu_memory_used_bytes", reading.memory_used_bytes, renderer=self._renderer)
        self._meters.gauge("farm_gpu_memory_total_bytes", reading.memory_total_bytes, renderer=self._renderer)
        if reading.utilisation is not None:
            self._meters.gauge("farm_gpu_utilisation_ratio", reading.utilisation, renderer=self._renderer)


class GpuReader:
    """Reads one GPU. `gpu`: its index or UUID, as Ray and CUDA_VISIBLE_DEVICES name it.

    A driver that does not answer is logged once and read as nothing: rendering does not depend on it.
    """

    def __init__(self, gpu: str):
        self._gpu = gpu
        self._is_open = False
        self._has_complained = False

    def read(self) -> GpuReading | None:
        """Read the GPU now, or return None where it does not answer. Takes milliseconds; from one thread at a time."""
        import pynvml

        try:
            if not self._is_open:
                pynvml.nvmlInit()
                self._is_open = True
            handle = (
                pynvml.nvmlDeviceGetHandleByIndex(int(self._gpu))
                if self._gpu.isdecimal()
                else pynvml.nvmlDeviceGetHandleByUUID(self._gpu)
            )
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            try:
                utilisation = float(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu) / 100
            except pynvml.NVMLError_NotSupported:
                utilisation = None
        except pynvml.NVMLError as exc:
            if not self._has_complained:
                log.warning("the GPU cannot be read", extra={"gpu": self._gpu, "reason": str(exc)})
                self._has_complained = True
            return None
        return GpuReading(int(memory.used), int(memory.total), utilisation)
