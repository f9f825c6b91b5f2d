"""The family z-image against the stock pipeline, on a tiny model with random weights."""

import shutil
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline
from diffusers.hooks.group_offloading import ModuleGroup

from farm.engine import Engine, Picture
from farm.errors import ModelCardError, NumericsError, OutOfMemoryError
from farm.models.device import Device, Streamed
from farm.models.family import Decoded
from farm.models.zimage import ZImageFamily
from farm.placement import DENOISER, DRAWING
from farm.plan import ImageSpec
from farm.weights import pinned
from tests.drawing import card, numerics, spec, write_tiny_zimage

LONG = "a red circle and " * 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_zimage(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def family(folder: Path) -> ZImageFamily:
    family = ZImageFamily(card(folder), numerics(), device="cpu", vram_gib=16.0)
    family.load()
    return family


@pytest.fixture(scope="module")
def stock(folder: Path) -> ZImagePipeline:
    pipeline = ZImagePipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(
    ("prompts", "negative", "size", "guidance"),
    [
        (("a red circle", "a blue star on the white background"), "", (64, 64), 2.0),
        (("a red circle", "a blue star"), "black", (64, 64), 0.0),
        (("a red circle", LONG), "", (64, 64), 2.0),
        (("a red circle", "a blue star"), LONG, (80, 48), 4.5),
    ],
    ids=["guided", "unguided", "captions of two lengths", "a long negative and padded picture tokens"],
)
def test_denoising_equals_the_stock_pipeline_but_for_rounding(
    family: ZImageFamily,
    stock: ZImagePipeline,
    prompts: tuple[str, ...],
    negative: str,
    size: tuple[int, int],
    guidance: float,
) -> None:
    specs = [
        spec(i, prompt, width=size[0], height=size[1], guidance_scale=guidance, negative_prompt=negative)
        for i, prompt in enumerate(prompts)
    ]
    positive = [family.encode(family.tokenize(prompt)) for prompt in prompts]
    negatives = [family.encode(family.tokenize(negative))] * len(prompts) if guidance else []
    steps = []
    latents = family.denoise(
        specs,
        family.noise(specs),
        positive=positive,
        negative=negatives,
        on_step=lambda step, of: steps.append((step, of)),
    )
    expected = stock(
        prompt_embeds=[embedding.states for embedding in positive],
        negative_prompt_embeds=[embedding.states for embedding in negatives],
        generator=[torch.Generator("cpu").manual_seed(image.seed) for image in specs],
        width=size[0],
        height=size[1],
        num_inference_steps=3,
        guidance_scale=guidance,
        output_type="latent",
    ).images
    assert torch.allclose(latents, expected, atol=2e-5, rtol=1e-5)
    assert steps == [(1, 3), (2, 3), (3, 3)]


def test_pictures_equal_those_of_the_stock_pipeline_given_the_same_prompts(folder: Path, stock: ZImagePipeline) -> None:
    prompts = ["a red circle", "a blue star on the white background", "", "green"]
    specs = [spec(i, prompt) for i, prompt in enumerate(prompts)]
    engine = Engine(card(folder), numerics(), "cpu", 16.0)
    engine.load()
    drawn: list[Picture] = []
    engine.render(specs, on_picture=drawn.append)
    expected = stock(
        prompt=list(prompts),
        negative_prompt=[""] * 4,
        generator=[torch.Generator("cpu").manual_seed(image.seed) for image in specs],
        width=64,
        height=64,
        num_inference_steps=3,
        guidance_scale=2.0,
        max_sequence_length=64,
        output_type="np",
    ).images
    for picture, floats in zip(drawn, expected, strict=True):
        levels = (floats * 255).round().astype(np.int16)
        assert np.abs(picture.pixels.astype(np.int16) - levels).max() <= 1
        assert (picture.pixels != levels).mean() < 0.001


def test_decoding_equals_the_stock_pipeline_exactly(family: ZImageFamily, stock: ZImagePipeline) -> None:
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        image = stock.vae.decode(latents / 0.9 + 0.05, return_dict=False)[0]
    expected = (stock.image_processor.postprocess(image, output_type="np") * 255).round().astype(np.uint8)
    decoded = family.decode(latents, spec(0))
    assert np.array_equal(np.stack(decoded.pixels), expected)
    assert decoded.finite == (True, True)
    assert decoded.pixels[0].flags["C_CONTIGUOUS"]


def test_an_embedding_is_in_host_memory_and_holds_no_more_than_itself(family: ZImageFamily) -> None:
    embedding = family.encode(family.tokenize("a red circle"))
    assert embedding.states.device == torch.device("cpu")
    assert embedding.states.untyped_storage().nbytes() == embedding.nbytes


def test_an_embedding_does_not_depend_on_padding(family: ZImageFamily, stock: ZImagePipeline) -> None:
    ours = family.encode(family.tokenize("a red circle on the black background")).states
    padded, _ = stock.encode_prompt(
        ["a red circle on the black background"], do_classifier_free_guidance=False, max_sequence_length=64
    )
    assert ours.shape == padded[0].shape
    assert torch.allclose(ours, padded[0], atol=1e-5)


def test_a_picture_hardly_depends_on_its_batch(folder: Path) -> None:
    specs = [spec(i, f"a {word} circle") for i, word in enumerate(["red", "blue", "green", "white"])]
    engine = Engine(card(folder), numerics(), "cpu", 16.0)
    engine.load()
    together: list[Picture] = []
    engine.render(specs, on_picture=together.append)
    for picture in together:
        alone: list[Picture] = []
        engine.render([picture.spec], on_picture=alone.append)
        assert np.abs(alone[0].pixels.astype(np.int16) - picture.pixels.astype(np.int16)).max() <= 1


def test_floats_that_are_none_are_told_before_they_become_pixels(family: ZImageFamily) -> None:
    latents = torch.randn(3, 4, 16, 16)
    latents[1] = float("nan")
    decoded = family.decode(latents, spec(0))
    assert decoded.finite == (True, False, True)
    assert [picture.dtype for picture in decoded.pixels] == [np.uint8] * 3


def test_cancelling_after_a_step_leaves_the_family_as_it_was(family: ZImageFamily) -> None:
    specs = [spec(0)]
    embedding = [family.encode(family.tokenize("a red circle"))]

    def draw(on_step: object) -> torch.Tensor:
        return family.denoise(specs, family.noise(specs), positive=embedding, negative=embedding, on_step=on_step)

    before = draw(lambda step, of: None)
    seen = []

    def stop(step: int, of: int) -> None:
        seen.append(step)
        raise KeyError("stop")

    with pytest.raises(KeyError):
        draw(stop)
    assert seen == [1]
    assert torch.equal(draw(lambda step, of: None), before)


@pytest.mark.parametrize("guidance", [2.0, 0.0], ids=["guided", "unguided"])
def test_a_batch_drawn_within_each_step_leaves_the_outer_one_as_it_was(family: ZImageFamily, guidance: float) -> None:
    outer = [spec(i, prompt, guidance_scale=guidance) for i, prompt in enumerate(("a red circle", LONG))]
    inner = [spec(7, "green", width=96, guidance_scale=4.0, num_inference_steps=5)]
    inside = family.inside()

    def draw(
        which: ZImageFamily, specs: list[ImageSpec], on_step: Callable[[int, int], None] = lambda step, of: None
    ) -> Decoded:
        positive = [which.encode(which.tokenize(one.prompt)) for one in specs]
        guided = specs[0].params.guidance_scale > 0
        negative = [which.encode(which.tokenize(""))] * len(specs) if guided else []
        latents = which.denoise(specs, which.noise(specs), positive=positive, negative=negative, on_step=on_step)
        return which.decode(latents, specs[0])

    undisturbed, alone = draw(family, outer), draw(family, inner)
    within: list[Decoded] = []
    disturbed = draw(family, outer, lambda step, of: within.append(draw(inside, inner)))
    assert len(within) == 3
    for ours, theirs in ((disturbed, undisturbed), *((each, alone) for each in within)):
        assert all(np.array_equal(a, b) for a, b in zip(ours.pixels, theirs.pixels, strict=True))


def test_what_may_be_drawn_within_a_step_follows_from_where_the_parts_lie(folder: Path) -> None:
    family = ZImageFamily(card(folder), numerics(), device="cpu", vram_gib=16.0)
    family.load()
    assert family.placement is not None
    assert family.within == "anything"
    family.placement = replace(family.placement, layout="phased", denoise=DRAWING, decode=DRAWING)
    assert family.within == "encoded"
    family.placement = replace(
        family.placement, denoise=frozenset({"denoiser"}), decode=frozenset({"decoder"}), encode=frozenset({"encoder"})
    )
    assert family.within == "nothing"


def test_prompts_are_cut_at_the_cards_length_and_odd_ones_taken(family: ZImageFamily) -> None:
    assert len(family.tokenize("red " * 5000).ids) == 64
    assert len(family.tokenize("").ids) == 2
    assert len(family.tokenize("\ud83d broken \x00 emoji 🎨").ids) > 2


def test_captions_share_a_batch_by_their_padded_length(family: ZImageFamily) -> None:
    short, middling, long = (family.tokenize("red " * n) for n in (3, 29, 31))
    assert family.bucket(short, None) == family.bucket(middling, None) == (1, 0)
    assert family.bucket(short, long) == (1, 2)


def test_missing_and_broken_weights_are_named(folder: Path, tmp_path: Path) -> None:
    def load(copy: Path) -> None:
        ZImageFamily(card(copy), numerics(), device="cpu", vram_gib=16.0).load()

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    weights = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(ModelCardError, match=r"diffusion_pytorch_model\.safetensors is cut off or not a safetensors"):
        load(copy)
    weights.write_bytes(struct.pack("<Q", 2**60))
    with pytest.raises(ModelCardError, match="is cut off or not a safetensors file"):
        load(copy)
    weights.unlink()
    with pytest.raises(ModelCardError, match=r"transformer has no \.safetensors file"):
        load(copy)
    weights.write_bytes(whole)
    (copy / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(ModelCardError, match="tokenizer cannot be loaded"):
        load(copy)
    (copy / "vae" / "config.json").write_text("[1]")
    with pytest.raises(ModelCardError, match=r"vae/config\.json is not a JSON object"):
        load(copy)
    with pytest.raises(ModelCardError, match="is not a folder"):
        load(tmp_path / "nowhere")


def test_other_weights_than_the_plans_are_not_loaded(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    planned = pinned(card(copy))
    ZImageFamily(planned, numerics(), device="cpu", vram_gib=16.0).load()
    (copy / "scheduler" / "scheduler_config.json").write_text("{}")
    with pytest.raises(NumericsError) as caught:
        ZImageFamily(planned, numerics(), device="cpu", vram_gib=16.0).load()
    assert caught.value.message.startswith(
        f"model sketch: the plan was made with weights {planned.source.revision}, {copy} holds "
        f"{pinned(planned).source.revision}; put the old weights back"
    )


def test_every_thread_that_renders_has_the_plans_count_of_threads(folder: Path) -> None:
    before = torch.get_num_threads()
    counts: list[int] = []

    def render(family: ZImageFamily) -> None:
        torch.set_num_threads(1)
        embedding = family.encode(family.tokenize("a red circle"))
        torch.set_num_threads(1)
        latents = family.denoise(
            [spec(0)],
            family.noise([spec(0)]),
            positive=[embedding],
            negative=[embedding],
            on_step=lambda step, of: counts.append(torch.get_num_threads()),
        )
        torch.set_num_threads(1)
        family.decode(latents, spec(0))
        counts.append(torch.get_num_threads())

    try:
        family = ZImageFamily(card(folder), numerics(threads=2), device="cpu", vram_gib=16.0)
        family.load()
        with ThreadPoolExecutor(1) as other:
            other.submit(render, family).result()
    finally:
        torch.set_num_threads(before)
    assert counts == [2] * 4


def test_no_memory_left_is_told_as_such() -> None:
    device = Device("cpu", vram_gib=16.0)
    with (
        pytest.raises(OutOfMemoryError, match="no memory left on cpu to draw: out of it"),
        device.errors("draw"),
    ):
        raise torch.OutOfMemoryError("out of it")
    with pytest.raises(OutOfMemoryError), device.errors("draw"):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
    with pytest.raises(RuntimeError, match="shapes"), device.errors("draw"):
        raise RuntimeError("shapes")


def test_parts_come_and_go_by_phase_and_give_the_same_picture(folder: Path, family: ZImageFamily) -> None:
    phased = ZImageFamily(card(folder), numerics(), device="cpu", vram_gib=16.0)
    phased.load()
    phased.encodes_ahead = True
    engine = Engine(card(folder), numerics(), "cpu", 16.0, family=phased)
    resident = Engine(card(folder), numerics(), "cpu", 16.0, family=family)
    specs = [spec(i, "a red circle" if i % 2 else LONG) for i in range(4)]
    ours: list[Picture] = []
    theirs: list[Picture] = []
    engine.render(specs, on_picture=ours.append)
    resident.render(specs, on_picture=theirs.append)
    assert [p.spec.index for p in ours] == [p.spec.index for p in theirs]
    assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(ours, theirs, strict=True))


def test_unloading_lets_go_of_everything(folder: Path) -> None:
    family = ZImageFamily(card(folder), numerics(), device="cpu", vram_gib=16.0)
    family.load()
    family.unload()
    assert not [value for value in vars(family).values() if isinstance(value, torch.nn.Module)]
    family.load()
    assert family.tokenize("a red circle").ids


def test_a_load_that_fails_half_way_leaves_nothing_behind_and_can_be_tried_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = ZImageFamily(card(folder), numerics(), device="cpu", vram_gib=16.0)
    bare = dict(vars(family))

    def fail(self: ZImageFamily) -> None:
        raise ModelCardError("half way")

    with monkeypatch.context() as patched:
        patched.setattr(ZImageFamily, "_open", fail)
        with pytest.raises(ModelCardError, match="half way"):
            family.load()
    assert vars(family) == bare
    family.recover()
    family.load()
    assert family.tokenize("a red circle").ids


@pytest.mark.parametrize("guidance", [0.0, 2.0], ids=["unguided", "guided"])
def test_a_streamed_denoiser_has_all_its_weights_copied_and_gives_the_same_latents(
    folder: Path, family: ZImageFamily, guidance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("farm.models.zimage.packs", lambda device, dtype: False)  # as on a GPU
    streamed = ZImageFamily(card(folder), numerics(), device="cpu", vram_gib=16.0)
    streamed.load()
    assert streamed.placement is not None
    streamed.placement = replace(streamed.placement, streamed=DENOISER)
    streamed._open()
    denoiser = streamed._modules.denoiser
    copied: set[int] = set()

    def copy(self: ModuleGroup, tensor: torch.Tensor, source: torch.Tensor, _: object) -> None:
        copied.add(id(tensor))
        tensor.data = source.clone()

    monkeypatch.setattr(ModuleGroup, "_transfer_tensor_to_device", copy)
    Streamed(denoiser).stream_to(torch.device("cpu"))
    specs = [spec(0, guidance_scale=guidance), spec(1, LONG, guidance_scale=guidance)]

    def drawn(which: ZImageFamily) -> torch.Tensor:
        positive = [which.encode(which.tokenize(one.prompt)) for one in specs]
        negative = [which.encode(which.tokenize(""))] * 2 if guidance else []
        return which.denoise(
            specs, which.noise(specs), positive=positive, negative=negative, on_step=lambda step, of: None
        )

    assert torch.allclose(drawn(streamed), drawn(family), atol=2e-5, rtol=1e-5)
    assert [name for name, weights in denoiser.named_parameters() if id(weights) not in copied] == []
    streamed.recover()


def test_a_model_that_was_parked_comes_back_without_its_files(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    engine = Engine(card(copy), numerics(), "cpu", 16.0)
    engine.load()
    before: list[Picture] = []
    after: list[Picture] = []
    engine.render([spec(0)], on_picture=before.append)
    assert engine.park()
    shutil.rmtree(copy)
    engine.load()
    engine.render([spec(0)], on_picture=after.append)
    assert np.array_equal(before[0].pixels, after[0].pixels)


def test_what_came_back_half_way_leaves_the_device_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = ZImageFamily(card(folder), numerics(), device="cpu:0", vram_gib=16.0)
    family.load()
    moves: list[str] = []

    class Full:
        nbytes = 0

        def __init__(self, name: str):
            self.name = name

        def move(self, device: torch.device) -> None:
            moves.append(f"{self.name} to {device}")
            if (self.name, device.index) == ("decoder", 0):
                raise torch.OutOfMemoryError("no room")

    family._parts = {name: Full(name) for name in ("encoder", "denoiser", "decoder")}  # type: ignore[misc]
    assert family.park()
    with pytest.raises(OutOfMemoryError):
        family.load()
    assert moves[-3:] == ["encoder to cpu", "denoiser to cpu", "decoder to cpu"]


@pytest.mark.parametrize("steps", [1, 8])
def test_a_step_is_one_pass_of_the_denoiser_and_the_last_one_comes_from_the_lowest_level(
    family: ZImageFamily, steps: int
) -> None:
    levels: list[float] = []
    assert family._steps is not None
    hook = family._steps.register_forward_pre_hook(lambda _, inputs: levels.append(1 - float(inputs[1][0])))
    specs = [spec(0, num_inference_steps=steps, guidance_scale=0.0)]
    positive = [family.encode(family.tokenize("a red circle"))]
    family.denoise(specs, family.noise(specs), positive=positive, negative=[], on_step=lambda step, of: None)
    hook.remove()
    shift = 3.0
    even = [1 - number / steps for number in range(steps)]
    assert levels == pytest.approx([shift * level / (1 + (shift - 1) * level) for level in even], abs=1e-5)
