"""The three large families on a real GPU, tiny and with random weights; skipped where there is none."""

import importlib.util
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version

import numpy as np
import pytest
import torch
from torch._inductor.utils import fresh_cache

from farm.bench.giants import prompts, write_giant
from farm.cardparts import PLAIN, Acceleration
from farm.engine import Engine, Picture
from farm.modelcard import ModelCard, find_card
from farm.models.diffusion import DiffusionFamily
from farm.models.family import open_family
from farm.placement import DECODER, DENOISER, DRAWING, ENCODER, Placement
from farm.plan import ImageSpec, Numerics
from farm.settings import load_settings
from farm.versions import PACKAGES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")

MODELS = ["z-image-turbo", "newbie-image-exp0.1"]
if importlib.util.find_spec("gguf"):
    MODELS.append("qwen-image-2512")  # its denoiser is a GGUF file of Q4_K and Q6_K


@pytest.fixture(scope="module", params=MODELS)
def card(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelCard:
    real = find_card(request.param, load_settings())
    return write_giant(real, tmp_path_factory.mktemp("giants"), tiny=True, device="cpu", say=lambda text: None).card


def specs(card: ModelCard, *, first: int = 0, width: int = 64) -> list[ImageSpec]:
    params = card.defaults.model_copy(update={"width": width, "height": 64, "num_inference_steps": 3})
    return [ImageSpec(i, i, None, text, 1000 + i, params, {}) for i, text in enumerate(prompts(2, first=first))]


def opened(card: ModelCard, device: str, placement: Placement | None = None, *, batch: int = 2) -> Engine:
    """A loaded engine; `placement`: in place of the one that was chosen."""
    kind = "cuda" if device.startswith("cuda") else "cpu"
    versions = {package: version(package) for package in PACKAGES}
    numerics = Numerics(device=kind, dtype="float32", batch=batch, threads=1, versions=versions)
    family = open_family(card, numerics, device=device, vram_gib=16.0)
    engine = Engine(card, numerics, device, 16.0, family=family)
    engine.load()
    if placement is not None:
        assert isinstance(family, DiffusionFamily)
        family.placement = placement
        family.encodes_ahead = placement.encodes_ahead
    return engine


def draw(engine: Engine, some: Sequence[ImageSpec]) -> list[Picture]:
    pictures: list[Picture] = []
    engine.render(some, on_picture=pictures.append)
    assert not any(picture.nan for picture in pictures)
    return pictures


def same(ours: Sequence[Picture], theirs: Sequence[Picture]) -> bool:
    return all(np.array_equal(a.pixels, b.pixels) for a, b in zip(ours, theirs, strict=True))


def test_the_gpu_draws_what_the_cpu_draws(card: ModelCard) -> None:
    on_gpu, on_cpu = draw(opened(card, "cuda:0"), specs(card)), draw(opened(card, "cpu"), specs(card))
    for one, other in zip(on_gpu, on_cpu, strict=True):
        apart = np.abs(one.pixels.astype(int) - other.pixels.astype(int))
        assert apart.mean() <= 1.0


@pytest.mark.parametrize(
    "stages",
    [(ENCODER, DRAWING, DRAWING), (ENCODER, DENOISER, DECODER)],
    ids=["the encoder leaves", "one part at a time"],
)
def test_phases_change_no_pixel_and_take_what_left_off_the_device(
    card: ModelCard, stages: tuple[frozenset[str], ...]
) -> None:
    engine = opened(card, "cuda:0")
    resident = draw(engine, specs(card))
    engine.unload()
    encode, denoise, decode = stages
    phased = opened(card, "cuda:0", Placement("phased", encode, denoise, decode, 1.0, "a test", host_gib=1.0))
    assert same(draw(phased, specs(card)), resident)
    family = phased._family
    assert isinstance(family, DiffusionFamily)
    assert {tensor.device.type for tensor in family._modules.encoder.parameters()} == {"cpu"}
    assert {tensor.device.type for tensor in family._modules.decoder.parameters()} == {"cuda"}


@pytest.mark.parametrize("how", [PLAIN, Acceleration(first_block_cache=1e6)], ids=["all blocks", "blocks left out"])
def test_a_batch_drawn_within_each_step_changes_no_pixel(card: ModelCard, how: Acceleration) -> None:
    cached = how.first_block_cache is not None
    if cached and card.family == "newbie":
        pytest.skip("the family has no such cache")
    accelerated = card.model_copy(update={"acceleration": {"cuda": how}})
    engine = opened(accelerated, "cuda:0", batch=1 if cached else 2)
    inner = engine.inside()
    assert inner is not None
    urgent_specs = specs(card, first=7, width=96)[:1]
    undisturbed, alone = draw(engine, specs(card)), draw(engine, urgent_specs)
    urgent = engine.batches(urgent_specs)[0]
    within, disturbed = list[Picture](), list[Picture]()

    def between_steps() -> float:
        inner.render_batch(urgent, on_picture=within.append, on_step=lambda step: None, cancelled=lambda: False)
        return 0.001

    for batch in engine.batches(specs(card)):
        engine.render_batch(
            batch,
            on_picture=disturbed.append,
            on_step=lambda step: None,
            cancelled=lambda: False,
            between_steps=between_steps,
        )
    assert same(disturbed, undisturbed)
    assert same(within, alone * len(within))


def test_what_was_parked_comes_back_and_draws_the_same(card: ModelCard) -> None:
    engine = opened(card, "cuda:0")
    before = draw(engine, specs(card))
    assert engine.park()
    family = engine._family
    assert isinstance(family, DiffusionFamily)
    modules = family._modules
    left = {tensor.device.type for part in (modules.encoder, modules.denoiser) for tensor in part.parameters()}
    assert left == {"cpu"}
    engine.load()
    assert same(draw(engine, specs(card)), before)


def test_what_each_phase_takes_beside_the_weights_is_measured(card: ModelCard) -> None:
    engine = opened(card, "cuda:0")
    draw(engine, specs(card))
    assert dict(engine.working_bytes) == {}
    engine.watch_memory()
    draw(engine, specs(card, first=5))
    small = dict(engine.working_bytes)
    engine.watch_memory()
    draw(engine, specs(card, first=9, width=128))
    assert small.keys() == {"encode", "denoise", "decode"}
    assert all(engine.working_bytes[phase] > small[phase] > 0 for phase in ("denoise", "decode"))


def test_compiled_blocks_take_every_shape_and_draw_the_same_whenever_they_were_compiled(card: ModelCard) -> None:
    accelerated = card.model_copy(update={"acceleration": {"cuda": Acceleration(compile=True)}})
    plain, compiled = opened(card, "cuda:0"), opened(accelerated, "cuda:0")
    shapes = [
        [replace(one, prompt=one.prompt[:length]) for one in specs(card, first=20, width=width)]
        for width in (64, 96, 128)
        for length in (30, 400)
    ]
    with torch.compiler.set_stance("fail_on_recompile"):
        found = [draw(compiled, some) for some in shapes]
        again = [draw(compiled, some) for some in reversed(shapes)]
    for one, other, stock in zip(found, reversed(again), (draw(plain, some) for some in shapes), strict=True):
        assert same(one, other)
        apart = [np.abs(a.pixels.astype(int) - b.pixels.astype(int)).mean() for a, b in zip(one, stock, strict=True)]
        assert max(apart) <= 1.0
    torch._dynamo.reset()
    with fresh_cache():  # nothing of the first time is found again
        anew = opened(accelerated, "cuda:0")
        assert all(same(draw(anew, some), one) for some, one in zip(shapes, found, strict=True))
