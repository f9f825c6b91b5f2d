"""A device's errors in the farm's words."""

import weakref
from contextlib import suppress

import pytest
import torch

from farm.errors import DeviceLostError, OutOfMemoryError, RenderError
from farm.models.device import Device


def cuda_error(message: str, code: int) -> torch.AcceleratorError:
    error = torch.AcceleratorError(f"CUDA error: {message}")
    error.error_code = code
    return error


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ("an illegal memory access was encountered", 700),
        ("device-side assert triggered", 710),
        ("uncorrectable ECC error encountered", 214),
        ("unspecified launch failure", 719),
    ],
)
def test_a_broken_device_is_lost_and_no_failure_of_an_image(message: str, code: int) -> None:
    device, told = Device("cpu", vram_gib=16.0), f"^cpu failed and could not draw: CUDA error: {message}; "
    with pytest.raises(DeviceLostError, match=told) as caught, device.errors("draw"):
        raise cuda_error(message, code)
    assert not isinstance(caught.value, RenderError)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (cuda_error("out of memory", 2), OutOfMemoryError),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), OutOfMemoryError),
        (cuda_error("invalid configuration argument", 9), torch.AcceleratorError),
    ],
)
def test_a_device_that_goes_on_is_not_lost(error: RuntimeError, kind: type[Exception]) -> None:
    with pytest.raises(kind), Device("cpu", vram_gib=16.0).errors("draw"):
        raise error


def test_what_ran_out_of_memory_is_freed_with_its_error() -> None:
    held: list[weakref.ref[torch.Tensor]] = []

    def draw() -> None:
        tensor = torch.zeros(4)
        held.append(weakref.ref(tensor))
        raise torch.OutOfMemoryError("CUDA out of memory")

    device = Device("cpu", vram_gib=16.0)
    with suppress(OutOfMemoryError), device.errors("draw"):
        draw()
    assert held[0]() is None
