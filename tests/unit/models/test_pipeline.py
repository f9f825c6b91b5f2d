"""The family diffusers: pipelines that the farm knows nothing of, on tiny models with random weights."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

from farm.cardparts import Scheduler
from farm.engine import Engine, Picture
from farm.errors import ModelCardError, PlacementError, RenderError
from farm.models.pipeline import PipelineFamily
from farm.plan import ImageSpec
from tests.drawing import card, numerics, spec
from tests.tiny_pipelines import write_tiny_lumina, write_tiny_stable_diffusion
from tests.tiny_qwen import write_tiny_qwen


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_stable_diffusion(tmp_path_factory.mktemp("unet"))


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_lumina(tmp_path_factory.mktemp("transformer"))


@pytest.fixture(params=["unet", "transformer"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def loaded(folder: Path, **changes: Any) -> PipelineFamily:
    family = PipelineFamily(card(folder, family="diffusers", **changes), numerics(), device="cpu", vram_gib=16.0)
    family.load()
    return family


def rendered(
    family: PipelineFamily, specs: Sequence[ImageSpec], on_step: Callable[[int], None] = lambda step: None
) -> dict[int, Picture]:
    engine = Engine(family._card, numerics(), "cpu", 16.0, family=family)
    pictures: list[Picture] = []
    engine.render(
        specs, on_picture=pictures.append, on_step=lambda at: on_step(at.step) if at.stage == "denoise" else None
    )
    return {picture.spec.index: picture for picture in pictures}


@pytest.mark.parametrize("guidance", [4.0, 0.0], ids=["guided", "unguided"])
def test_pictures_are_those_of_the_stock_pipeline(folder: Path, guidance: float) -> None:
    specs = [
        spec(i, prompt, guidance_scale=guidance, negative_prompt="black")
        for i, prompt in enumerate(["a red circle", "a blue star on the white background", "a green square"])
    ]
    drawn = rendered(loaded(folder), specs)
    stock = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    stock.set_progress_bar_config(disable=True)
    for one in specs:
        floats = stock(
            prompt=one.prompt,
            negative_prompt="black" if guidance else None,
            guidance_scale=guidance,
            generator=torch.Generator("cpu").manual_seed(one.seed),
            width=64,
            height=64,
            num_inference_steps=3,
            output_type="np",
            **({"max_sequence_length": 64} if "Lumina" in type(stock).__name__ else {}),
        ).images[0]
        levels = (floats * 255).round().astype(np.int16)
        assert drawn[one.index].pixels.shape == (64, 64, 3)
        assert np.abs(drawn[one.index].pixels.astype(np.int16) - levels).max() <= 1


def test_a_picture_hardly_depends_on_its_batch(folder: Path) -> None:
    family = loaded(folder)
    specs = [spec(i, f"a {word} circle", guidance_scale=4.0) for i, word in enumerate(["red", "blue", "green"])]
    together = rendered(family, specs)
    for one in specs:
        alone = rendered(family, [one])[one.index]
        assert np.abs(alone.pixels.astype(int) - together[one.index].pixels.astype(int)).max() <= 1


def test_prompts_of_one_length_share_a_batch(folder: Path) -> None:
    family = loaded(folder)
    engine = Engine(family._card, numerics(), "cpu", 16.0, family=family)
    specs = [spec(i, prompt) for i, prompt in enumerate(["a red circle", "a star", "a blue \ud83d"])]
    assert [batch.indexes for batch in engine.batches(specs)] == [(0, 2), (1,)]


def test_steps_are_told_and_cancelling_leaves_the_pipeline_as_it_was(folder: Path) -> None:
    family, steps = loaded(folder), list[int]()
    before = rendered(family, [spec(0)], steps.append)[0]
    assert [step for step in steps if step] == [1, 2, 3]

    def stop(step: int) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rendered(family, [spec(0)], stop)
    assert np.array_equal(rendered(family, [spec(0)])[0].pixels, before.pixels)


def test_nothing_is_drawn_within_its_steps(unet: Path) -> None:
    family = loaded(unet)
    assert family.within == "nothing"
    assert Engine(family._card, numerics(), "cpu", 16.0, family=family).inside() is None


def test_floats_that_are_none_are_told(unet: Path) -> None:
    images = torch.rand(2, 3, 64, 64)
    images[1, 0, 0, 0] = float("nan")
    decoded = loaded(unet).decode(images, spec(0))
    assert decoded.finite == (True, False)
    assert decoded.pixels[0].dtype == np.uint8


def test_a_scheduler_by_name_needs_a_flow_matching_model(unet: Path, transformer: Path) -> None:
    heun = Scheduler(name="flow-heun")
    steps: list[int] = []
    rendered(loaded(transformer, scheduler=heun), [spec(0)], steps.append)
    assert max(steps) == 5
    with pytest.raises(ModelCardError, match="has a DDIMScheduler, and schedulers by name go by the noise levels"):
        loaded(unet, scheduler=heun)


def test_options_go_to_the_pipelines_call_and_others_are_refused(unet: Path) -> None:
    plain = rendered(loaded(unet), [spec(0, guidance_scale=4.0)])[0]
    rescaled = rendered(loaded(unet, options={"guidance_rescale": 0.9}), [spec(0, guidance_scale=4.0)])[0]
    assert not np.array_equal(plain.pixels, rescaled.pixels)
    with pytest.raises(ModelCardError, match="StableDiffusionPipeline has no option width; it has callback"):
        loaded(unet, options={"width": 64})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("_class_name", ["pipeline", "Mine"], r"names the pipeline \['pipeline', 'Mine'\], which diffusers .* has not"),
        (
            "_class_name",
            "Unheard",
            r"names the pipeline Unheard, which diffusers [0-9.]+ has not; code that comes with",
        ),
        ("unet", ["my_code", "Net"], "names Net of my_code as its unet; code that comes with weights is not run"),
    ],
)
def test_code_that_comes_with_weights_is_not_run(
    unet: Path, tmp_path: Path, key: str, value: object, message: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(unet, copy)
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps(index | {key: value}))
    with pytest.raises(ModelCardError, match=message):
        loaded(copy)


def test_a_model_that_does_not_fit_whole_is_refused(unet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from farm.placement import DRAWING, ENCODER, Placement

    phased = Placement("phased", ENCODER, DRAWING, DRAWING, 1.0, "a test")
    monkeypatch.setattr("farm.models.diffusion.place", lambda *args, **options: phased)
    with pytest.raises(PlacementError) as caught:
        loaded(unet)
    assert caught.value.message == (
        "model sketch: family diffusers keeps a whole model on the device, and here it would be phased; choose a quantised "
        "card, smaller sizes, or a larger GPU"
    )


def test_a_pipeline_without_steps_to_follow_is_refused(unet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Deaf(StableDiffusionPipeline):
        def __call__(
            self, prompt: str, width: int, height: int, num_inference_steps: int, generator: object, output_type: str
        ) -> None:
            """Nothing can be told while this draws."""

    monkeypatch.setattr("diffusers.StableDiffusionPipeline", Deaf)
    with pytest.raises(ModelCardError) as caught:
        loaded(unet)
    assert caught.value.message == (
        "model sketch: Deaf takes no callback_on_step_end, so it cannot be rendered with; choose another model"
    )


def test_guidance_is_the_true_cfg_of_a_pipeline_that_passes_over_any_other(tmp_path: Path) -> None:
    folder = write_tiny_qwen(tmp_path)

    def drawn(guidance: float, negative: str = "black", **options: Any) -> np.ndarray:
        family = loaded(folder, options=options)
        return rendered(family, [spec(0, guidance_scale=guidance, negative_prompt=negative)])[0].pixels

    four = drawn(4.0)
    assert not np.array_equal(four, drawn(9.0))
    assert not np.array_equal(four, drawn(4.0, "white fog"))
    assert np.array_equal(drawn(1.0), drawn(1.0, "white fog"))
    assert np.array_equal(drawn(9.0, true_cfg_scale=4.0), drawn(1.0, true_cfg_scale=4.0))  # the card's word


def test_guidance_that_a_pipeline_does_not_take_is_refused(unet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def call(
        self: Any,
        prompt: Any,
        width: int,
        height: int,
        num_inference_steps: int,
        generator: Any,
        output_type: str,
        callback_on_step_end: Any = None,
        return_dict: bool = True,
    ) -> None:
        raise AssertionError("it is not called")

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", call)
    plain = card(unet).defaults.model_copy(update={"guidance_scale": 0.0})
    family = loaded(unet, defaults=plain)
    with pytest.raises(RenderError, match="StableDiffusionPipeline takes no guidance, got guidance_scale 4; give 0"):
        rendered(family, [spec(0, guidance_scale=4.0)])
    with pytest.raises(
        ModelCardError, match="takes no guidance, and the card's defaults have some; give them a guidance_scale of 0"
    ):
        loaded(unet, defaults=plain.model_copy(update={"guidance_scale": 4.0}))
