"""Each family's parts, quantised as they load, against the same in full; on a CPU, where jobs have nothing quantised so."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.quantizers.gguf.utils import _dequantize_gguf_and_restore_linear
from safetensors.torch import save_file
from torch import nn

from farm.bench.gpufidelity import ENCODER_CHECK, KERNELS_CHECK, Fidelity
from farm.bench.gpufigures import Case as Shape
from farm.cardparts import Adapter
from farm.engine import Engine, Picture
from farm.errors import ModelCardError
from farm.models.device import GIB, Part
from farm.models.diffusion import DiffusionFamily
from farm.models.hostcopy import packed
from farm.models.quantising import in_full
from farm.needs import files_of, needs_of
from tests.drawing import numerics, spec
from tests.quantised import (
    CASES,
    LAYERS,
    LEAST_COSINE,
    Case,
    card_of,
    computed,
    cosine,
    loaded,
    module_of,
    quantised_layers,
    shuffle,
    write_models,
)

CPU = torch.device("cpu")
Whole = Callable[..., DiffusionFamily]
PARTS = ("encoder", "denoiser", "decoder")
BLOCK = {"nf4": 64, "int8": 1, "gguf": 32}
each_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def whole(models: dict[str, Path]) -> Whole:
    """The same models with nothing quantised, each loaded once."""

    @cache
    def of(family: str, dtype: str = "float32") -> DiffusionFamily:
        return loaded(card_of(models, Case(family, "", ""), whole=True), dtype=dtype)

    return of


@each_case
def test_all_linear_layers_of_whole_blocks_are_quantised_and_nothing_else(
    models: dict[str, Path], whole: Whole, case: Case
) -> None:
    family, plain = loaded(card_of(models, case)), whole(case.family, "bfloat16")  # in float32 a CPU has packed layers
    found = {part: quantised_layers(module_of(family, part)) for part in PARTS}
    assert [part for part in PARTS if found[part]] == [case.part]
    layers = found[case.part]
    assert {type(layer).__name__ for layer in layers.values()} == {LAYERS[case.how]}
    expected = {
        name: layer
        for name, layer in module_of(plain, case.part).named_modules()
        if isinstance(layer, nn.Linear) and layer.in_features % BLOCK[case.how] == 0
    }
    if case.family == "newbie":
        expected = {name: layer for name, layer in expected.items() if name.startswith("0.")}  # the second one is Jina
    assert layers.keys() == expected.keys()
    bits = {"nf4": 4, "int8": 8, "gguf": 4.5}[case.how]
    for name, layer in layers.items():
        assert layer.weight.nbytes == expected[name].weight.numel() * bits / 8
    others = {id(layer.weight) for layer in layers.values()}
    kept = [tensor for tensor in module_of(family, case.part).parameters() if id(tensor) not in others]
    assert {tensor.dtype for tensor in kept} == {torch.float32}


@each_case
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_quantised_part_computes_nearly_the_same_and_one_with_other_weights_does_not(
    models: dict[str, Path], whole: Whole, case: Case, dtype: str
) -> None:
    reference = computed(whole(case.family, dtype), case.part)
    family = loaded(card_of(models, case), dtype=dtype)
    ours = computed(family, case.part)
    assert LEAST_COSINE[case.how] <= cosine(ours, reference) < 1
    assert float((ours - reference).abs().max()) > 1e-4
    shuffle(quantised_layers(module_of(family, case.part)))
    assert cosine(computed(family, case.part), reference) < LEAST_COSINE[case.how] - 0.1


@pytest.mark.parametrize("case", [case for case in CASES if case.how != "int8"], ids=str)
def test_the_same_weights_dequantised_once_compute_the_same(models: dict[str, Path], case: Case) -> None:
    """What a quantised part is off by is its weights', and none of it is the kernels'."""
    family = loaded(card_of(models, case))
    ours = computed(family, case.part)
    module = module_of(family, case.part)
    _dequantize_gguf_and_restore_linear(module) if case.how == "gguf" else in_full(module, torch.float32)
    assert not quantised_layers(module)
    assert torch.allclose(computed(family, case.part), ours, rtol=1e-3, atol=1e-4)


@each_case
def test_whole_pictures_are_close_to_those_of_the_whole_model(
    models: dict[str, Path], whole: Whole, case: Case
) -> None:
    family, theirs = loaded(card_of(models, case)), drawn(whole(case.family))
    ours = drawn(family)
    shuffle(quantised_layers(module_of(family, case.part)))
    assert not any(picture.nan for picture in ours)
    assert 0 < apart(ours, theirs) < 0.3 * apart(drawn(family), theirs)


def apart(ours: list[Picture], theirs: list[Picture]) -> float:
    """Levels of 255 by which the picture that is furthest off differs in the mean."""
    pairs = zip(ours, theirs, strict=True)
    return max(float(np.abs(one.pixels.astype(int) - other.pixels).mean()) for one, other in pairs)


def drawn(family: DiffusionFamily) -> list[Picture]:
    engine = Engine(family._card, numerics(), "cpu", 16.0, family=family)
    pictures: list[Picture] = []
    engine.render([spec(0), spec(1, "a blue square")], on_picture=pictures.append)
    return pictures


class Elsewhere:
    """A place for weights in the stead of a GPU's memory: copies in host memory."""

    type = "elsewhere"


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Any:
    place, really = Elsewhere(), torch.Tensor.to

    def to(tensor: torch.Tensor, *given: Any, **named: Any) -> torch.Tensor:
        return tensor.clone() if given[:1] == (place,) else really(tensor, *given, **named)

    monkeypatch.setattr(torch.Tensor, "to", to)
    return place


@pytest.mark.parametrize(
    ("case", "used"),
    [*((case, False) for case in CASES), *((case, True) for case in CASES if case.how == "int8")],
    ids=str,
)
def test_a_quantised_part_computes_from_where_it_was_moved_to_and_its_host_copies_never_change(
    models: dict[str, Path], case: Case, used: bool, elsewhere: Any
) -> None:
    expected = computed(loaded(card_of(models, case)), case.part)
    family = loaded(card_of(models, case))
    if used:  # int8 layers keep their weights in another place from then on
        computed(family, case.part)
    part = Part(module_of(family, case.part))
    hosts = tensors(part)
    before = [tensor.clone() for tensor in hosts]
    part.move(elsewhere)
    away = tensors(part)
    assert not {tensor.data_ptr() for tensor in away} & {tensor.data_ptr() for tensor in hosts}
    for tensor in hosts:
        tensor.zero_()
    assert torch.equal(computed(family, case.part), expected)
    for tensor, kept in zip(hosts, before, strict=True):
        tensor.copy_(kept)
    part.move(CPU)
    for tensor in away:
        tensor.zero_()
    assert torch.equal(computed(family, case.part), expected)
    assert {tensor.data_ptr() for tensor in tensors(part)} == {tensor.data_ptr() for tensor in hosts}
    assert all(torch.equal(tensor, kept) for tensor, kept in zip(hosts, before, strict=True))


def tensors(part: Part) -> list[torch.Tensor]:
    """A part's tensors, each once."""
    return list({tensor.data_ptr(): tensor for tensor in part._tensors()}.values())


@each_case
def test_a_part_moves_every_tensor_that_its_layers_hold(models: dict[str, Path], case: Case) -> None:
    family = loaded(card_of(models, case))
    computed(family, case.part)
    module = module_of(family, case.part)
    moved = {tensor.data_ptr() for tensor in Part(module)._tensors()}
    held = [(name, tensor) for name, layer in quantised_layers(module).items() for tensor in held_by(layer)]
    kinds = {"nf4": 3, "int8": 2, "gguf": 1}[case.how]  # weights; their scales; what the 16 values of nf4 are
    assert len({tensor.data_ptr() for _, tensor in held}) >= kinds * len(quantised_layers(module))
    assert [name for name, tensor in held if tensor.data_ptr() not in moved] == []


def held_by(value: Any) -> Iterator[torch.Tensor]:
    """Tensors within a layer: its own, those of its states, and what hangs on its parameters."""
    if isinstance(value, torch.Tensor):
        yield value.data
    if isinstance(value, dict):
        for each in value.values():
            yield from held_by(each)
    elif type(value).__module__.startswith(("bitsandbytes", "diffusers.quantizers")):
        inner = {name: each for name, each in vars(value).items() if name not in ("module", "idx")}  # idx: of a call
        yield from held_by(inner)


@pytest.mark.parametrize(
    "case", [case for case in CASES if (case.family, case.part) == ("z-image", "denoiser")], ids=str
)
def test_a_quantised_part_in_blocks_of_pinned_memory_computes_the_same(
    models: dict[str, Path], case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("farm.models.device.packed", lambda tensors, pin: packed(tensors, pin=False))
    family = loaded(card_of(models, case))
    expected = computed(family, case.part)
    part = Part(module_of(family, case.part), pin=True)
    before = {tensor.data_ptr() for tensor in tensors(part)}
    part.pin()
    assert not {tensor.data_ptr() for tensor in tensors(part)} & before
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors(part)}) < len(before)
    assert torch.equal(computed(family, case.part), expected)


@each_case
def test_what_a_quantised_part_needs_is_what_it_takes(models: dict[str, Path], case: Case) -> None:
    card = card_of(models, case)
    family = loaded(card)
    needs = needs_of(card, models[case.family], dtype="float32", batch=1, files=files_of(card))
    estimated = getattr(needs, f"{case.part}_gib") * GIB
    assert estimated == pytest.approx(Part(module_of(family, case.part)).nbytes, rel=0.03)
    whole = needs_of(card_of(models, case, whole=True), models[case.family], dtype="float32", batch=1)
    assert estimated < 0.55 * getattr(whole, f"{case.part}_gib") * GIB


def test_an_adapter_over_layers_in_nf4_adds_its_weights(models: dict[str, Path], tmp_path: Path) -> None:
    layer = "transformer_blocks.0.attn.to_q"
    torch.manual_seed(0)
    down, up = torch.randn(2, 64), torch.randn(64, 2)
    weights = {f"transformer.{layer}.lora_A.weight": down, f"transformer.{layer}.lora_B.weight": up}
    save_file(weights, tmp_path / "one.safetensors")
    one = Adapter(path=str(tmp_path), file="one.safetensors", name="one", weight=0.5)
    case = Case("qwen-image", "denoiser", "nf4")
    adapted, plain = loaded(card_of(models, case, adapters=(one,))), loaded(card_of(models, case))
    without = computed(plain, "denoiser")
    assert layer + ".base_layer" in quantised_layers(adapted._modules.denoiser)
    in_full(plain._modules.denoiser, torch.float32)
    with torch.no_grad():
        plain._modules.denoiser.get_submodule(layer).weight += 0.5 * (up @ down)
    ours = computed(adapted, "denoiser")
    assert torch.allclose(ours, computed(plain, "denoiser"), atol=1e-3)
    assert not torch.allclose(ours, without, atol=1e-2)


def test_a_part_with_wrong_settings_is_named(models: dict[str, Path], tmp_path: Path) -> None:
    for each in models["z-image"].iterdir():
        (tmp_path / each.name).symlink_to(each)
    (tmp_path / "text_encoder").unlink()
    (tmp_path / "text_encoder").mkdir()
    source = models["z-image"] / "text_encoder" / "model.safetensors"
    (tmp_path / "text_encoder" / "model.safetensors").symlink_to(source)
    (tmp_path / "text_encoder" / "config.json").write_text('{"model_type": "qwen3", "hidden_size": "wide"}')
    with pytest.raises(ModelCardError, match=r"^model sketch: .*/text_encoder cannot be loaded: .*; fetch the weights"):
        loaded(card_of({"z-image": tmp_path}, Case("z-image", "encoder", "nf4")))


def test_the_check_on_a_gpu_tells_what_quantising_costs_and_what_kernels_do(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    card = card_of(models, Case("z-image", "encoder", "nf4"))

    def checks(*, broken: bool) -> dict[str, tuple[str, bool | None]]:
        family = loaded(card)
        if broken:
            shuffle(quantised_layers(family._modules.encoder))
        check = Fidelity(card, Shape(64, 64, 2), "cpu", "float32")
        check.quantised(Engine(card, numerics(), "cpu", 16.0, family=family), family)
        return {each.name: (each.found, each.held) for each in check.checks}

    found = checks(broken=False)
    assert list(found) == [KERNELS_CHECK, ENCODER_CHECK]
    assert [held for _, held in found.values()] == [True, True]
    assert "allowed 0.99" in found[KERNELS_CHECK][0]
    broken = checks(broken=True)
    assert [held for _, held in broken.values()] == [True, False]
    monkeypatch.setattr("bitsandbytes.functional.dequantize_4bit", lambda weight, state: torch.randn(state.shape))
    assert checks(broken=False)[KERNELS_CHECK][1] is False


def test_no_kernel_is_fetched_from_a_hub_and_nobody_is_told_to_install_what_does(tmp_path: Path) -> None:
    """As bitsandbytes does with diffusers, on a processor with AVX512-BF16, where the package `kernels` is there."""
    (tmp_path / "kernels.py").write_text("raise SystemExit('a kernel would be fetched')")
    code = "import farm.models.zimage, bitsandbytes, importlib.util as u; print(u.find_spec('kernels'))"
    around = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=around, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("None\n", "")


def test_inputs_that_int8_layers_cast_are_not_told_one_by_one(
    models: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    computed(loaded(card_of(models, Case("z-image", "denoiser", "int8"))), "denoiser")
    assert [record.message for record in caplog.records if record.name.startswith("bitsandbytes")] == []
