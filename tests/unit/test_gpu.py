"""A GPU is read where there is one; everywhere else there is nothing to show, and no error."""

import logging

import pynvml
import pytest

from farm.devices import local_device
from farm.gpu import DeviceMeter, GpuReader
from farm.meters import Meters


def test_a_gpu_that_is_not_there_is_read_as_nothing_and_complained_of_once(caplog: pytest.LogCaptureFixture):
    meter = GpuReader("GPU-00000000-0000-0000-0000-000000000000")
    with caplog.at_level(logging.WARNING):
        assert (meter.read(), meter.read()) == (None, None)
    assert [record.message for record in caplog.records] == ["the GPU cannot be read"]


@pytest.mark.skipif(not local_device().gpus, reason="no GPU on this machine")
def test_a_gpu_tells_its_memory_and_how_busy_it_is():
    gpu = local_device().gpus[0]
    for name in ("0", gpu.uuid):
        reading = GpuReader(name).read()
        assert reading is not None
        assert reading.memory_total_bytes == gpu.memory_bytes
        assert 0 <= reading.memory_used_bytes <= reading.memory_total_bytes
        assert reading.utilisation is None or 0 <= reading.utilisation <= 1


class Driver:
    """NVML's answers for one GPU of 16 GiB, by index and UUID. `utilisation` None: a MIG slice, which does not say."""

    def __init__(self, utilisation: int | None):
        self._utilisation = utilisation
        self.opened = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("nvmlInit", "nvmlDeviceGetHandleByIndex", "nvmlDeviceGetHandleByUUID"):
            monkeypatch.setattr(pynvml, name, getattr(self, name))
        monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", self.memory)
        monkeypatch.setattr(pynvml, "nvmlDeviceGetUtilizationRates", self.utilisation)

    def nvmlInit(self) -> None:  # noqa: N802
        self.opened += 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:  # noqa: N802
        return {0: "GPU-1"}[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        return {"GPU-1": "GPU-1"}[uuid]

    def memory(self, handle: str) -> pynvml.c_nvmlMemory_t:
        return pynvml.c_nvmlMemory_t(total=16 * 2**30, free=6 * 2**30, used=10 * 2**30)

    def utilisation(self, handle: str) -> pynvml.c_nvmlUtilization_t:
        if self._utilisation is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return pynvml.c_nvmlUtilization_t(gpu=self._utilisation, memory=3)


@pytest.mark.parametrize("gpu", ["0", "GPU-1"])
@pytest.mark.parametrize(("says", "utilisation"), [(87, 0.87), (0, 0.0), (None, None)])
def test_a_reading_is_in_base_units(
    monkeypatch: pytest.MonkeyPatch, gpu: str, says: int | None, utilisation: float | None
):
    driver = Driver(says)
    driver.install(monkeypatch)
    meter = GpuReader(gpu)
    for _ in range(2):
        reading = meter.read()
        assert reading is not None
        assert (reading.memory_used_bytes, reading.memory_total_bytes) == (10 * 2**30, 16 * 2**30)
        assert reading.utilisation == utilisation
    assert driver.opened == 1


def test_a_renderers_device_is_measured_into_its_meters(monkeypatch: pytest.MonkeyPatch):
    Driver(87).install(monkeypatch)
    meters, idle = Meters("renderer-1", "a"), iter((2.5, 4.0))
    device = DeviceMeter("renderer-1", meters, idle_s=lambda: next(idle), gpu="0")
    device.measure()
    device.measure()
    assert {(s.name, s.labels): s.value for s in meters.snapshot().samples} == {
        (name, (("renderer", "renderer-1"),)): value
        for name, value in {
            "farm_idle_seconds_total": 4.0,
            "farm_gpu_memory_used_bytes": 10.0 * 2**30,
            "farm_gpu_memory_total_bytes": 16.0 * 2**30,
            "farm_gpu_utilisation_ratio": 0.87,
        }.items()
    }


def test_a_cpu_has_idle_seconds_alone():
    meters = Meters("renderer-1", "a")
    DeviceMeter("renderer-1", meters, idle_s=lambda: 1.0).measure()
    assert [(s.name, s.value) for s in meters.snapshot().samples] == [("farm_idle_seconds_total", 1.0)]


def test_a_mig_slice_has_memory_and_no_utilisation(monkeypatch: pytest.MonkeyPatch):
    Driver(None).install(monkeypatch)
    meters = Meters("renderer-1", "a")
    DeviceMeter("renderer-1", meters, idle_s=lambda: 0.0, gpu="GPU-1").measure()
    assert [s.name for s in meters.snapshot().samples] == [
        "farm_idle_seconds_total",
        "farm_gpu_memory_used_bytes",
        "farm_gpu_memory_total_bytes",
    ]
