"""A device's errors in the farm's words."""

import importlib
import os
import weakref
from contextlib import suppress
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from diffusers.hooks.group_offloading import ModuleGroup

import farm.models
from farm.errors import DeviceLostError, OutOfMemoryError, RenderError
from farm.models.device import Device, Part, Streamed

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


@dataclass(frozen=True, eq=False)
class Data:
    """Weights that lie somewhere; a copy elsewhere takes one of `room`."""

    value: int
    room: list[None]
    device: torch.device = CPU
    dtype: str = "bfloat16"
    nbytes: int = 10

    def to(self, device: torch.device, *, non_blocking: bool = False) -> "Data":
        device = torch.device(device)
        if not self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.room.pop()
        return Data(self.value, self.room, device)

    def untyped_storage(self) -> SimpleNamespace:
        return SimpleNamespace(_cdata=id(self))

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return (5,)

    def is_pinned(self) -> bool:
        return False


class Weights:
    """A module of five tensors, on a machine whose GPU has room for `room` more."""

    def __init__(self, room: int):
        self.room = [None] * room
        self.tensors = [SimpleNamespace(data=Data(value, self.room)) for value in range(5)]

    def parameters(self) -> list[SimpleNamespace]:
        return self.tensors[:2]

    def buffers(self) -> list[SimpleNamespace]:
        return self.tensors[2:]

    def modules(self) -> list["Weights"]:
        return [self]

    @property
    def places(self) -> list[str]:
        return [tensor.data.device.type for tensor in self.tensors]


def test_a_part_comes_and_goes_and_copies_nothing_back() -> None:
    module = Weights(room=5)
    before = [tensor.data for tensor in module.tensors]
    part = Part(module)
    part.move(CUDA)
    part.move(CUDA)
    assert (module.places, module.room, part.nbytes) == (["cuda"] * 5, [], 50)
    part.move(CPU)
    assert all(tensor.data is data for tensor, data in zip(module.tensors, before, strict=True))


@pytest.mark.parametrize("then", [CUDA, CPU])
def test_a_move_that_failed_half_way_is_finished_or_undone(then: torch.device) -> None:
    module = Weights(room=2)
    before = [tensor.data for tensor in module.tensors]
    part = Part(module)
    with pytest.raises(torch.OutOfMemoryError):
        part.move(CUDA)
    assert module.places == ["cuda", "cuda", "cpu", "cpu", "cpu"]
    module.room += [None] * 3
    part.move(then)
    assert module.places == [then.type] * 5
    assert [tensor.data.value for tensor in module.tensors] == [0, 1, 2, 3, 4]
    part.move(CPU)
    assert all(tensor.data is data for tensor, data in zip(module.tensors, before, strict=True))


def test_tied_weights_are_copied_once() -> None:
    module = Weights(room=4)
    module.tensors[4].data = module.tensors[0].data
    Part(module).move(CUDA)
    assert module.tensors[4].data is module.tensors[0].data
    assert module.places == ["cuda"] * 5


def test_what_a_quantised_layer_keeps_beside_its_weights_moves_with_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farm.models.device.torch.Tensor", Data)
    module = Weights(room=8)
    inner = SimpleNamespace(absmax=Data(7, module.room), state2=None)
    module.tensors[0].quant_state = SimpleNamespace(
        absmax=Data(5, module.room), code=Data(6, module.room), state2=inner
    )
    states = module.tensors[0].quant_state
    part = Part(module)
    part.move(CUDA)
    assert [each.device for each in (states.absmax, states.code, inner.absmax)] == [CUDA] * 3
    part.move(CPU)
    assert [each.device for each in (states.absmax, states.code, inner.absmax)] == [CPU] * 3
    assert (states.absmax.value, inner.absmax.value, module.room) == (5, 7, [])


def test_weights_that_were_made_on_the_device_are_copied_off_it_once() -> None:
    module = Weights(room=0)
    for tensor in module.tensors:
        tensor.data = Data(tensor.data.value, module.room, CUDA)
    part = Part(module)
    part.move(CUDA)
    module.room += [None] * 10
    part.move(CPU)
    assert (module.places, len(module.room)) == (["cpu"] * 5, 5)
    host = [tensor.data for tensor in module.tensors]
    part.move(CUDA)
    part.move(CPU)
    assert ([tensor.data for tensor in module.tensors], module.room) == (host, [])


def test_a_part_of_real_weights_stays_where_it_is_on_a_cpu() -> None:
    module = torch.nn.Linear(2, 2)
    before = module.weight.data_ptr()
    part = Part(module)
    part.move(CPU)
    assert (module.weight.data_ptr(), part.nbytes) == (before, 24)


class Blocks(torch.nn.Module):
    """Three blocks between a way in and a way out, as denoisers and text encoders are built."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(4, 8)
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))
        self.norm = torch.nn.LayerNorm(8)

    def forward(self, given: torch.Tensor) -> torch.Tensor:
        hidden = self.first(given)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return self.norm(hidden)


class Nested(torch.nn.Module):
    """A model whose blocks lie one level down, beside an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(10, 4)
        self.inner = Blocks()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.inner(self.embed(ids))


@pytest.mark.parametrize("kind", ["blocks", "nested"])
def test_a_streamed_module_computes_the_same_with_its_blocks_copied_as_they_are_needed(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    module: torch.nn.Module = Blocks() if kind == "blocks" else Nested()
    given = torch.randn(2, 4) if kind == "blocks" else torch.tensor([[1, 2, 3]])
    copied: list[torch.Size] = []

    def copy(self: ModuleGroup, tensor: torch.Tensor, source: torch.Tensor, _: object) -> None:
        copied.append(source.shape)
        tensor.data = source.clone()

    monkeypatch.setattr(ModuleGroup, "_transfer_tensor_to_device", copy)
    streamed = Streamed(module)
    assert streamed.nbytes == sum(weights.nbytes for weights in module.parameters())
    streamed.move(CPU)
    with torch.inference_mode():
        expected = module(given)
        assert not copied
        streamed.stream_to(CPU)
        for _ in range(2):
            copied.clear()
            assert torch.equal(module(given), expected)
            assert copied.count(torch.Size([8, 8])) == 3
            assert torch.Size([10, 4]) not in copied  # the embedding lies outside of what owns the blocks
    streamed.move(CPU)
    assert torch.equal(module(given), expected)


def test_a_list_of_two_encoders_is_streamed_each_by_itself() -> None:
    streamed = Streamed(torch.nn.ModuleList([Blocks(), Nested()]))
    assert [type(owner).__name__ for owner in streamed._owners] == ["Blocks", "Blocks"]


def test_a_node_is_shared_by_the_renderers_told_and_else_by_one_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name="A4000", total_memory=2**34)
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    monkeypatch.setattr("farm.models.device.local_device", lambda: SimpleNamespace(gpus=(1, 2, 3)))
    assert Device("cuda:0", vram_gib=16.0).limits().renderers == 3
    assert Device("cuda:0", vram_gib=16.0, renderers=2).limits().renderers == 2
    assert Device("cpu", vram_gib=16.0, renderers=2).limits().renderers == 2


def test_a_model_let_go_of_leaves_its_cycles_and_then_its_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    freed: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("farm.models.device.gc.collect", lambda: freed.append("cycles"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: freed.append("device"))
    monkeypatch.setattr(torch.accelerator.memory, "empty_host_cache", lambda: freed.append("pinned"))
    Device("cuda:0", vram_gib=16.0).let_go()
    assert freed == ["cycles", "device", "pinned"]
    freed.clear()
    Device("cpu", vram_gib=16.0).let_go()
    assert freed == ["cycles"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "expandable_segments:True"), ({"PYTORCH_CUDA_ALLOC_CONF": "x"}, "x"), ({"PYTORCH_ALLOC_CONF": "x"}, None)],
)
def test_the_allocator_keeps_few_fragments_unless_somebody_configured_it(
    given: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    importlib.reload(farm.models)
    assert os.environ.get("PYTORCH_CUDA_ALLOC_CONF") == expected
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "")  # so that it is put back as it was


def test_cuda_without_a_number_is_the_device_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert Device("cuda", vram_gib=16.0).torch == torch.device("cuda:3")
    assert Device("cuda:1", vram_gib=16.0).torch == torch.device("cuda:1")
