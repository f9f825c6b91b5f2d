"""Parts that are quantised as they load, on a real GPU, with tiny models; skipped where there is none."""

from pathlib import Path

import pytest
import torch

from farm.models.device import Part
from farm.models.quantising import in_full
from tests.quantised import (
    CASES,
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

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")

GPU = "cuda:0"
each_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_models(tmp_path_factory.mktemp("models"))


@each_case
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_quantised_part_computes_nearly_what_the_whole_one_does(
    models: dict[str, Path], case: Case, dtype: str
) -> None:
    whole = computed(loaded(card_of(models, case, whole=True), device=GPU, dtype=dtype), case.part)
    family = loaded(card_of(models, case), device=GPU, dtype=dtype)
    ours = computed(family, case.part)
    assert quantised_layers(module_of(family, case.part))
    assert LEAST_COSINE[case.how] <= cosine(ours, whole) < 1
    shuffle(quantised_layers(module_of(family, case.part)))
    assert cosine(computed(family, case.part), whole) < LEAST_COSINE[case.how] - 0.1


@each_case
def test_the_gpu_computes_what_a_cpu_does_with_the_same_weights(models: dict[str, Path], case: Case) -> None:
    on_gpu, on_cpu = (computed(loaded(card_of(models, case), device=each), case.part) for each in (GPU, "cpu"))
    assert cosine(on_gpu, on_cpu) > 0.999


@pytest.mark.parametrize("case", [case for case in CASES if case.how == "nf4"], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_weights_dequantised_once_compute_the_same(models: dict[str, Path], case: Case, dtype: str) -> None:
    family = loaded(card_of(models, case), device=GPU, dtype=dtype)
    ours = computed(family, case.part)
    in_full(module_of(family, case.part), getattr(torch, dtype))
    assert cosine(computed(family, case.part), ours) > 0.999


@each_case
def test_what_left_the_gpu_comes_back_and_computes_the_same(models: dict[str, Path], case: Case) -> None:
    family = loaded(card_of(models, case), device=GPU)
    before = computed(family, case.part)
    for _ in range(2):
        assert family.park()
        assert {tensor.device.type for tensor in Part(module_of(family, case.part))._tensors()} == {"cpu"}
        family.load()
        assert {tensor.device.type for tensor in Part(module_of(family, case.part))._tensors()} == {"cuda"}
        assert torch.equal(computed(family, case.part), before)


@pytest.mark.parametrize("family", ["newbie", "qwen-image", "z-image"])
def test_a_quantised_encoder_on_the_cpu_encodes_as_on_the_gpu(models: dict[str, Path], family: str) -> None:
    case = Case(family, "encoder", "nf4")
    on_cpu = loaded(card_of(models, case, options={"encoder_on": "cpu"}), device=GPU)
    states = computed(on_cpu, "encoder")
    assert {tensor.device.type for tensor in Part(module_of(on_cpu, "encoder"))._tensors()} == {"cpu"}
    assert cosine(states, computed(loaded(card_of(models, case), device=GPU), "encoder")) > 0.999
