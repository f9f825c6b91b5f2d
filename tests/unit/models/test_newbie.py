"""The family newbie on a tiny model: its loop against the published recipe written out, and what every family promises."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from farm.cardparts import Denoiser, Source
from farm.engine import Engine, Picture
from farm.errors import ModelCardError
from farm.models.device import Part, Streamed
from farm.models.family import Decoded, open_family
from farm.models.newbie import NewBieFamily
from farm.models.newbie_recipe import Recipe, recipe_of
from farm.models.newbie_text import SYSTEM_PROMPT
from farm.needs import needs_of
from farm.placement import DRAWING
from farm.plan import ImageSpec
from farm.settings import Settings
from farm.weightcheck import check_weights
from tests.drawing import numerics, spec
from tests.newbie import as_published, newbie_card, write, write_tiny_newbie

PROMPTS = ("a red circle", "a blue star on the white background and a green square")


def opened(folder: Path, **changes: Any) -> NewBieFamily:
    family = NewBieFamily(newbie_card(folder, **changes), numerics(), device="cpu", vram_gib=16.0)
    family.load()
    return family


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_newbie(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def family(folder: Path) -> NewBieFamily:
    return opened(folder)


def latents_of(
    family: NewBieFamily,
    specs: Sequence[ImageSpec],
    *,
    on_step: Callable[[int, int], None] = lambda step, of: None,
) -> torch.Tensor:
    def encoded(prompts: Sequence[str]) -> list[Any]:
        return [family.encode(family.tokenize(prompt)) for prompt in prompts]

    params = specs[0].params
    negative = encoded([params.negative_prompt] * len(specs)) if params.guidance_scale > 0 else []
    positive = encoded([one.prompt for one in specs])
    return family.denoise(specs, family.noise(specs), positive=positive, negative=negative, on_step=on_step)


def published(
    family: NewBieFamily, image: ImageSpec, *, shift: float, truncation: float, renormalised: float
) -> torch.Tensor:
    """The authors' sampler, for one image: Euler over bent times, both halves apart, one norm a sample, which only clips."""
    params = image.params
    positive, negative = (
        family.encode(family.tokenize(prompt)).states for prompt in (image.prompt, params.negative_prompt)
    )
    model: Any = family._modules.denoiser
    x = torch.randn(1, 4, params.height // 4, params.width // 4, generator=torch.Generator().manual_seed(image.seed))
    times = torch.linspace(0, 1, params.num_inference_steps + 1, dtype=torch.float64)
    times = times / (times + shift - shift * times)

    def velocity(caption: Any, time: float) -> torch.Tensor:
        conditions = model.prepare([caption], height=x.shape[2], width=x.shape[3])
        return model(x, torch.tensor([time], dtype=torch.float32), conditions)

    with torch.inference_mode():
        for time, following in zip(times.tolist(), times[1:].tolist(), strict=False):
            wanted = velocity(positive, time)
            step = wanted
            if time < truncation and params.guidance_scale > 0:
                unwanted = velocity(negative, time)
                step = unwanted + params.guidance_scale * (wanted - unwanted)
                most = wanted.norm().item() * renormalised
                if renormalised > 0 and step.norm().item() >= most:
                    step = step * (most / step.norm().item())
            x = x + step * (following - time)
    return x


@pytest.mark.parametrize(
    ("options", "guidance", "negative"),
    [
        ({}, 5.0, ""),
        ({"cfg_renormalisation": 0.0}, 5.0, "black"),
        ({"cfg_renormalisation": 2.0, "shift": 1.0}, 4.0, ""),
        ({"cfg_truncation": 0.25}, 5.0, ""),
        ({"cfg_truncation": 0.0}, 5.0, ""),
        ({}, 0.0, ""),
    ],
    ids=[
        "as published",
        "no renormalisation",
        "a loose norm, no shift",
        "truncated",
        "truncated from the start",
        "unguided",
    ],
)
def test_the_loop_is_the_published_recipe(
    folder: Path, options: dict[str, Any], guidance: float, negative: str
) -> None:
    family = opened(folder, options=options)
    changes = {"guidance_scale": guidance, "negative_prompt": negative, "num_inference_steps": 6, "width": 80}
    specs = [spec(i, prompt, **changes) for i, prompt in enumerate(PROMPTS)]
    recipe = {"shift": 6.0, "truncation": 1.0, "renormalised": 1.0}
    renamed = {"cfg_truncation": "truncation", "cfg_renormalisation": "renormalised", "shift": "shift"}
    recipe |= {renamed[name]: value for name, value in options.items()}
    steps: list[tuple[int, int]] = []
    ours = latents_of(family, specs, on_step=lambda step, of: steps.append((step, of)))
    expected = torch.cat([published(family, image, **recipe) for image in specs])
    assert torch.allclose(ours, expected, atol=2e-5, rtol=1e-4)
    assert steps == [(step, 6) for step in range(1, 7)]


def test_each_part_of_the_recipe_changes_the_picture(folder: Path, family: NewBieFamily) -> None:
    specs = [spec(0, guidance_scale=5.0, num_inference_steps=6)]
    plain = latents_of(family, specs)
    for options in ({"shift": 3.0}, {"cfg_truncation": 0.25}, {"cfg_renormalisation": 0.0}, {"system_prompt": "a"}):
        assert (latents_of(opened(folder, options=options), specs) - plain).abs().max() > 1e-3, options


def test_guidance_only_clips_a_norm_and_counts_it_over_the_whole_sample() -> None:
    torch.manual_seed(0)
    wanted, unwanted = torch.randn(2, 2, 4, 8, 8)
    unwanted[1] = wanted[1] * 1.5  # its guided prediction is the shorter one
    loose, tight = (Recipe(cfg_renormalisation=most).guided(wanted, unwanted, 3.0) for most in (0.0, 1.0))
    assert torch.equal(loose, unwanted + 3.0 * (wanted - unwanted))
    assert tight[0].norm() == pytest.approx(wanted[0].norm().item(), rel=1e-5)
    assert torch.allclose(tight[0] / tight[0].norm(), loose[0] / loose[0].norm(), atol=1e-6)
    assert torch.equal(tight[1], loose[1])
    still = torch.zeros(1, 4, 8, 8)
    assert torch.equal(Recipe().guided(still, still, 5.0), still)


def test_the_two_published_layouts_draw_the_same(folder: Path, tmp_path: Path) -> None:
    original = write_tiny_newbie(tmp_path, "original")
    assert (original / "clip_model").is_dir()
    assert not (original / "tokenizer").exists()
    specs = [spec(i, prompt) for i, prompt in enumerate(PROMPTS)]
    assert torch.equal(latents_of(opened(original), specs), latents_of(opened(folder), specs))


def test_a_denoiser_in_a_file_of_its_own_is_taken(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    tensors = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    renamed = {f"model.diffusion_model.{name}": tensor for name, tensor in as_published(tensors).items()}
    write(tmp_path, "newbie.safetensors", renamed, {})
    specs = [spec(0)]
    expected = latents_of(opened(folder), specs)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    other = {name: tensor * 0 for name, tensor in tensors.items()}
    write(copy / "transformer", "diffusion_pytorch_model.safetensors", other, {"axes_dim_rope": [4, 4, 4]})
    own = Denoiser(path=str(tmp_path), file="newbie.safetensors", format="safetensors")
    assert torch.equal(latents_of(opened(copy, denoiser=own), specs), expected)


def test_a_vae_in_a_folder_of_its_own_is_taken(folder: Path) -> None:
    family = opened(folder, decoder=Source(path=str(folder / "vae")))
    assert latents_of(family, [spec(0)]).shape == (1, 4, 16, 16)


def test_a_picture_hardly_depends_on_its_batch(folder: Path) -> None:
    specs = [spec(i, prompt) for i, prompt in enumerate((*PROMPTS, "", "green " * 40))]
    engine = Engine(newbie_card(folder), numerics(), "cpu", 16.0)
    engine.load()
    together: list[Picture] = []
    engine.render(specs, on_picture=together.append)
    assert len(together) == 4
    for picture in together:
        alone: list[Picture] = []
        engine.render([picture.spec], on_picture=alone.append)
        assert np.abs(alone[0].pixels.astype(np.int16) - picture.pixels.astype(np.int16)).max() <= 1


def test_in_bfloat16_the_latents_come_near_those_in_float32(folder: Path, family: NewBieFamily) -> None:
    half = NewBieFamily(newbie_card(folder), numerics(dtype="bfloat16"), device="cpu", vram_gib=16.0)
    half.load()
    specs = [spec(i, prompt) for i, prompt in enumerate(PROMPTS)]
    ours, exact = latents_of(half, specs), latents_of(family, specs)
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).norm() / exact.norm() < 0.05
    assert half.decode(ours, specs[0]).finite == (True, True)


def test_decoding_divides_by_the_scale_and_adds_the_shift_in_the_latents_dtype(family: NewBieFamily) -> None:
    latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
    vae: Any = family._modules.decoder
    with torch.inference_mode():
        image = vae.decode(latents / 0.3611 + 0.1159, return_dict=False)[0][0]
    levels = ((image * 0.5 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0).to(torch.uint8).numpy()
    assert np.array_equal(family.decode(latents, spec(0)).pixels[0], levels)


def test_part_by_part_or_streamed_it_draws_as_it_does_resident(folder: Path, family: NewBieFamily) -> None:
    specs = [spec(i, prompt) for i, prompt in enumerate(PROMPTS)]
    expected = latents_of(family, specs)
    phased = opened(folder)
    assert phased.placement is not None
    names = ("encoder", "denoiser", "decoder")
    phased._parts = {name: Part(getattr(phased._modules, name)) for name in names}
    phased.placement = replace(
        phased.placement, layout="phased", encode=frozenset({"encoder"}), denoise=DRAWING, decode=DRAWING
    )
    assert phased.within == "encoded"
    assert torch.equal(latents_of(phased, specs), expected)
    streamed = opened(folder)
    assert streamed.placement is not None
    Streamed(streamed._modules.denoiser).stream_to(torch.device("cpu"))
    streamed._parts = {}
    streamed.placement = replace(streamed.placement, streamed=frozenset({"denoiser"}))
    assert torch.equal(latents_of(streamed, specs), expected)


@pytest.mark.parametrize("guidance", [5.0, 0.0], ids=["guided", "unguided"])
def test_a_batch_drawn_within_each_step_leaves_the_outer_one_as_it_was(family: NewBieFamily, guidance: float) -> None:
    outer = [spec(i, prompt, guidance_scale=guidance) for i, prompt in enumerate(PROMPTS)]
    inner = [spec(7, "green", width=96, guidance_scale=4.0, num_inference_steps=5)]
    inside = family.inside()

    def draw(which: NewBieFamily, specs: list[ImageSpec], on_step: Any = lambda step, of: None) -> Decoded:
        return which.decode(latents_of(which, specs, on_step=on_step), specs[0])

    undisturbed, alone = draw(family, outer), draw(family, inner)
    within: list[Decoded] = []
    disturbed = draw(family, outer, lambda step, of: within.append(draw(inside, inner)))
    assert len(within) == 3
    for ours, theirs in ((disturbed, undisturbed), *((each, alone) for each in within)):
        assert all(np.array_equal(a, b) for a, b in zip(ours.pixels, theirs.pixels, strict=True))


def test_cancelling_after_a_step_leaves_the_family_as_it_was(family: NewBieFamily) -> None:
    specs = [spec(0)]
    before = latents_of(family, specs)
    seen: list[int] = []

    def stop(step: int, of: int) -> None:
        seen.append(step)
        raise KeyError("stop")

    with pytest.raises(KeyError):
        latents_of(family, specs, on_step=stop)
    assert seen == [1]
    assert torch.equal(latents_of(family, specs), before)


def test_gemma_reads_the_system_prompt_and_jina_the_prompt_alone(family: NewBieFamily) -> None:
    tokens, empty = family.tokenize("a red circle"), family.tokenize("")
    assert tokens.pooled == (2, 4, 5, 8)
    assert tokens.ids[-3:] == (4, 5, 8)
    assert len(tokens.ids) == 1 + len(SYSTEM_PROMPT.split()) + 2 + 3
    assert (empty.ids, empty.pooled) == ((2,), (2,))
    long = family.tokenize("red " * 5000)
    assert (len(long.ids), len(long.pooled)) == (64, 2048)
    assert len(family.tokenize("\ud83d broken \x00 emoji 🎨").pooled) > 2


def test_an_embedding_is_in_host_memory_and_holds_no_more_than_itself(family: NewBieFamily) -> None:
    embedding = family.encode(family.tokenize("a red circle"))
    tensors = [embedding.states.states, embedding.states.pooled]
    assert [tensor.device for tensor in tensors] == [torch.device("cpu")] * 2
    assert sum(tensor.untyped_storage().nbytes() for tensor in tensors) == embedding.nbytes


def test_the_family_is_opened_by_its_name_and_lets_go_of_all_it_loaded(folder: Path) -> None:
    family = open_family(newbie_card(folder), numerics(), device="cpu", vram_gib=16.0)
    assert isinstance(family, NewBieFamily)
    bare = set(vars(family))
    family.load()
    family.unload()
    assert set(vars(family)) == bare


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"shift": 0}, "shift must be above 0, got 0; mend the card"),
        ({"cfg_truncation": -1.0}, "cfg_truncation must be 0 or more, got -1.0; mend the card"),
        ({"cfg_renormalisation": -0.5}, "cfg_renormalisation must be 0 or more, got -0.5; mend the card"),
    ],
)
def test_an_option_out_of_bounds_is_refused(folder: Path, options: dict[str, Any], told: str) -> None:
    with pytest.raises(ModelCardError, match=f"^model newbie: options: {told}"):
        recipe_of(newbie_card(folder, options=options))


def test_without_options_the_recipe_is_the_published_one(folder: Path) -> None:
    assert recipe_of(newbie_card(folder, options={"encoder_on": "cpu"})) == Recipe(6.0, 1.0, 1.0, SYSTEM_PROMPT)


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside the usual names"])
def test_text_encoders_named_for_another_program_are_found_and_counted_once(
    folder: Path, family: NewBieFamily, tmp_path: Path, beside: bool
) -> None:
    """As the authors publish them: a file for each, in another program's names, with a tokenizer among the tensors."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    gemma, jina = copy / "text_encoder", copy / "text_encoder_2"
    read = load_file(gemma / "model.safetensors")
    words = {
        "model." + name.partition("language_model.")[2].removeprefix("model."): tensor
        for name, tensor in read.items()
        if "language_model." in name
    }
    save_file({**words, "spiece_model": torch.zeros(9, dtype=torch.uint8)}, gemma / "gemma3-4b-it.safetensors")
    shutil.copy(jina / "model.safetensors", jina / "jina-clip-v2.safetensors")
    if not beside:
        for part in (gemma, jina):
            (part / "model.safetensors").unlink()
    specs = [spec(0), spec(1, "a blue star")]
    assert torch.allclose(latents_of(opened(copy), specs), latents_of(family, specs), atol=1e-4)
    ours, usual = (needs_of(newbie_card(each), each, dtype="float32", batch=1).encoder_gib for each in (copy, folder))
    assert ours == pytest.approx(usual)
    assert [fault for report in check_weights(newbie_card(copy), Settings()) for fault in report.faults] == []


def test_missing_broken_and_pickled_weights_are_named(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    weights = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(ModelCardError, match=r"diffusion_pytorch_model\.safetensors is cut off or not a safetensors"):
        opened(copy)
    weights.unlink()
    torch.save({"x": torch.ones(1)}, weights.with_suffix(".bin"))
    with pytest.raises(ModelCardError, match=r"transformer has no \.safetensors file; .* \(pickles are not read\)"):
        opened(copy)
    shutil.copy(folder / "vae" / "diffusion_pytorch_model.safetensors", weights)
    with pytest.raises(ModelCardError, match=r"^model newbie: its denoiser is not NewBie's"):
        opened(copy)
    weights.write_bytes(whole)
    shutil.rmtree(copy / "tokenizer_2")
    with pytest.raises(ModelCardError, match=r"none of .*tokenizer_2.* has a tokenizer\.json; fetch the weights again"):
        opened(copy)
