"""The family qwen-image against the stock pipeline, on a tiny model with random weights."""

import gc
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline

from farm.engine import Engine, Picture
from farm.models.device import Part
from farm.models.family import Decoded
from farm.models.qwen import QwenFamily
from farm.placement import DRAWING, ENCODER, Placement
from farm.plan import ImageSpec
from tests.drawing import card, numerics, spec
from tests.tiny_qwen import write_tiny_qwen

LONG = "a red circle and " * 12
CARD = {"family": "qwen-image", "max_sequence_length": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_qwen(tmp_path_factory.mktemp("tiny"))


def loaded(folder: Path) -> QwenFamily:
    family = QwenFamily(card(folder, **CARD), numerics(), device="cpu", vram_gib=16.0)
    family.load()
    return family


@pytest.fixture(scope="module")
def family(folder: Path) -> QwenFamily:
    return loaded(folder)


@pytest.fixture(scope="module")
def stock(folder: Path) -> QwenImagePipeline:
    pipeline = QwenImagePipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(
    family: QwenFamily, specs: Sequence[ImageSpec], on_step: Callable[[int, int], None] = lambda step, of: None
) -> torch.Tensor:
    guided = family.guided(specs[0].params)
    return family.denoise(
        specs,
        family.noise(specs),
        positive=[family.encode(family.tokenize(one.prompt)) for one in specs],
        negative=[family.encode(family.tokenize(one.params.negative_prompt)) for one in specs] if guided else [],
        on_step=on_step,
    )


def rendered(engine: Engine, specs: Sequence[ImageSpec]) -> dict[int, Picture]:
    pictures: list[Picture] = []
    engine.render(specs, on_picture=pictures.append)
    return {picture.spec.index: picture for picture in pictures}


def engine_of(folder: Path, family: QwenFamily) -> Engine:
    return Engine(card(folder, **CARD), numerics(), "cpu", 16.0, family=family)


@pytest.mark.parametrize(
    ("negative", "size", "guidance"),
    [("black", (64, 64), 4.0), ("", (64, 64), 4.0), ("black", (64, 64), 1.0), (LONG, (96, 48), 2.5)],
    ids=["guided", "guided by nothing", "unguided", "a long negative and a wide picture"],
)
def test_denoising_equals_the_stock_pipeline_but_for_rounding(
    family: QwenFamily, stock: QwenImagePipeline, negative: str, size: tuple[int, int], guidance: float
) -> None:
    specs = [
        spec(i, prompt, width=size[0], height=size[1], guidance_scale=guidance, negative_prompt=negative)
        for i, prompt in enumerate(("a red circle", "a blue star"))
    ]
    steps = []
    latents = draw(family, specs, lambda step, of: steps.append((step, of)))
    expected = stock(
        prompt=[one.prompt for one in specs],
        negative_prompt=[negative or " "] * 2,
        true_cfg_scale=guidance,
        generator=[torch.Generator("cpu").manual_seed(one.seed) for one in specs],
        width=size[0],
        height=size[1],
        num_inference_steps=3,
        max_sequence_length=32,
        output_type="latent",
    ).images
    unpacked = stock._unpack_latents(expected, size[1], size[0], 8)[:, :, 0]
    assert latents.shape == (2, 4, size[1] // 8, size[0] // 8)
    assert torch.allclose(latents, unpacked, atol=2e-5, rtol=1e-5)
    assert steps == [(1, 3), (2, 3), (3, 3)]


def test_pictures_equal_those_of_the_stock_pipeline_for_prompts_of_all_lengths(
    folder: Path, family: QwenFamily, stock: QwenImagePipeline
) -> None:
    prompts = ["a red circle", "a blue star on white", "a green circle", "", LONG]
    specs = [spec(i, prompt, guidance_scale=4.0) for i, prompt in enumerate(prompts)]
    drawn = rendered(engine_of(folder, family), specs)
    for one in specs:
        floats = stock(
            prompt=one.prompt or " ",
            negative_prompt=" ",
            true_cfg_scale=4.0,
            generator=torch.Generator("cpu").manual_seed(one.seed),
            width=64,
            height=64,
            num_inference_steps=3,
            max_sequence_length=32,
            output_type="np",
        ).images[0]
        levels = (floats * 255).round().astype(np.int16)
        assert np.abs(drawn[one.index].pixels.astype(np.int16) - levels).max() <= 1


@pytest.mark.parametrize("prompt", ["a red circle", "a", LONG])
def test_an_embedding_equals_that_of_the_whole_encoder(
    family: QwenFamily, stock: QwenImagePipeline, prompt: str
) -> None:
    ours = family.encode(family.tokenize(prompt))
    expected, mask = stock.encode_prompt(prompt, max_sequence_length=32)
    assert mask is None
    assert torch.allclose(ours.states, expected[0], atol=1e-5)
    assert ours.states.untyped_storage().nbytes() == ours.nbytes


def test_the_encoder_has_neither_eyes_nor_a_next_word(family: QwenFamily) -> None:
    names = [name for name, _ in family._modules.encoder.named_modules()]
    assert not [name for name in names if "visual" in name or "lm_head" in name]


def test_prompts_are_cut_as_the_stock_pipeline_cuts_them_and_odd_ones_taken(family: QwenFamily) -> None:
    assert len(family.tokenize("red " * 500).ids) == 34 + 32
    assert family.tokenize("") == family.tokenize(" ")
    assert len(family.tokenize("\ud83d broken \x00 emoji 🎨").ids) > 34


def test_only_prompts_of_one_length_share_a_batch(folder: Path, family: QwenFamily) -> None:
    engine = engine_of(folder, family)
    specs = [spec(i, prompt, guidance_scale=4.0) for i, prompt in enumerate(["red", "blue", "a star", "green"])]
    assert [batch.indexes for batch in engine.batches(specs)] == [(0, 1, 3), (2,)]


def test_guidance_is_on_above_one_with_an_empty_negative_prompt_too(folder: Path, family: QwenFamily) -> None:
    engine = engine_of(folder, family)
    at_one, above = engine.batches([spec(0, guidance_scale=1.0), spec(1, guidance_scale=1.5)])
    assert at_one.negative == ()
    assert above.negative == (family.tokenize(" "),)


def test_a_picture_hardly_depends_on_its_batch(folder: Path, family: QwenFamily) -> None:
    engine = engine_of(folder, family)
    specs = [spec(i, f"a {word} circle", guidance_scale=4.0) for i, word in enumerate(["red", "blue", "green"])]
    together = rendered(engine, specs)
    for one in specs:
        alone = rendered(engine, [one])[one.index]
        assert np.abs(alone.pixels.astype(np.int16) - together[one.index].pixels.astype(np.int16)).max() <= 1


def test_parts_that_come_and_go_give_the_same_picture(folder: Path, family: QwenFamily) -> None:
    phased = loaded(folder)
    phased.placement = Placement("phased", ENCODER, DRAWING, DRAWING, 1.0, "a test")
    phased.encodes_ahead = True
    modules = phased._modules
    phased._parts = {name: Part(getattr(modules, name)) for name in ("encoder", "denoiser", "decoder")}
    specs = [spec(i, prompt, guidance_scale=4.0) for i, prompt in enumerate(["a red circle", LONG])]
    ours, theirs = (rendered(engine_of(folder, each), specs) for each in (phased, family))
    assert phased.within == "encoded"
    assert all(np.array_equal(ours[index].pixels, theirs[index].pixels) for index in (0, 1))


def test_cancelling_after_a_step_leaves_the_family_as_it_was(family: QwenFamily) -> None:
    specs = [spec(0, guidance_scale=4.0)]
    before, seen = draw(family, specs), []

    def stop(step: int, of: int) -> None:
        seen.append(step)
        raise KeyError("stop")

    with pytest.raises(KeyError):
        draw(family, specs, stop)
    assert seen == [1]
    assert torch.equal(draw(family, specs), before)


@pytest.mark.parametrize("guidance", [4.0, 1.0], ids=["guided", "unguided"])
def test_a_batch_drawn_within_each_step_leaves_the_outer_one_as_it_was(family: QwenFamily, guidance: float) -> None:
    outer = [spec(i, prompt, guidance_scale=guidance) for i, prompt in enumerate(("a red circle", "a blue star"))]
    inner = [spec(7, "green", width=96, guidance_scale=3.0, num_inference_steps=5)]
    inside = family.inside()
    undisturbed, alone = draw(family, outer), family.decode(draw(family, inner), inner[0])
    within: list[Decoded] = []
    disturbed = draw(family, outer, lambda step, of: within.append(inside.decode(draw(inside, inner), inner[0])))
    assert len(within) == 3
    assert torch.equal(disturbed, undisturbed)
    assert all(np.array_equal(each.pixels[0], alone.pixels[0]) for each in within)


def test_floats_that_are_none_are_told_and_slices_follow_the_pictures_size(
    family: QwenFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = torch.randn(3, 4, 8, 8)
    latents[1] = float("nan")
    whole = family.decode(latents, spec(0))
    assert whole.finite == (True, False, True)
    monkeypatch.setattr("farm.models.latent.DECODE_PIXELS", 64 * 64)
    sliced = family.decode(latents, spec(0))
    for place in (0, 2):
        assert np.abs(sliced.pixels[place].astype(int) - whole.pixels[place].astype(int)).max() <= 1


def test_unloading_after_a_drawing_frees_the_modules_at_once(folder: Path) -> None:
    family = loaded(folder)
    draw(family, [spec(0, guidance_scale=4.0)])
    modules = family._modules
    kept = [weakref.ref(module) for module in (modules.encoder, modules.denoiser, modules.decoder)]
    del modules
    gc.collect()
    gc.disable()
    try:
        family.unload()
        assert [one() for one in kept] == [None] * 3
    finally:
        gc.enable()


def test_unloading_lets_go_of_everything(folder: Path) -> None:
    family = loaded(folder)
    bare = set(vars(QwenFamily(card(folder, **CARD), numerics(), device="cpu", vram_gib=16.0)))
    family.unload()
    assert set(vars(family)) == bare
    family.load()
    assert family.tokenize("a red circle").ids
