"""A device's errors in the farm's words."""

import weakref
from contextlib import suppress
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from farm.errors import DeviceLostError, OutOfMemoryError, RenderError
from farm.models.device import Device, Part

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


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


@dataclass(frozen=True)
class Data:
    """Weights that lie somewhere; a copy elsewhere takes one of `room`."""

    value: int
    room: list[None]
    where: str = "cpu"

    def to(self, device: torch.device) -> "Data":
        if not self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.room.pop()
        return Data(self.value, self.room, device.type)


class Weights:
    """A module of five tensors, on a machine whose GPU has room for `room` more."""

    def __init__(self, room: int):
        self.room = [None] * room
        self.tensors = [SimpleNamespace(data=Data(value, self.room)) for value in range(5)]

    def parameters(self) -> list[SimpleNamespace]:
        return self.tensors[:2]

    def buffers(self) -> list[SimpleNamespace]:
        return self.tensors[2:]

    @property
    def places(self) -> list[str]:
        return [tensor.data.where for tensor in self.tensors]


def test_a_part_comes_and_goes_and_copies_nothing_back() -> None:
    module = Weights(room=5)
    before = [tensor.data for tensor in module.tensors]
    part = Part(module)
    part.move(CUDA)
    part.move(CUDA)
    assert (module.places, module.room) == (["cuda"] * 5, [])
    part.move(CPU)
    assert all(tensor.data is data for tensor, data in zip(module.tensors, before, strict=True))


@pytest.mark.parametrize("then", [CUDA, CPU])
def test_a_move_that_failed_half_way_is_finished_or_undone(then: torch.device) -> None:
    module = Weights(room=2)
    part = Part(module)
    with pytest.raises(torch.OutOfMemoryError):
        part.move(CUDA)
    assert module.places == ["cuda", "cuda", "cpu", "cpu", "cpu"]
    module.room += [None] * 5
    part.move(then)
    assert module.places == [then.type] * 5
    assert [tensor.data.value for tensor in module.tensors] == [0, 1, 2, 3, 4]


def test_a_part_of_real_weights_stays_where_it_is_on_a_cpu() -> None:
    module = torch.nn.Linear(2, 2)
    before = module.weight.data_ptr()
    Part(module).move(CPU)
    assert module.weight.data_ptr() == before


def test_cuda_without_a_number_is_the_device_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert Device("cuda", vram_gib=16.0).torch == torch.device("cuda:3")
    assert Device("cuda:1", vram_gib=16.0).torch == torch.device("cuda:1")
