"""Cards: found, read, resolved, and what they allow."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farm.errors import ModelCardError, UnknownModelError
from farm.modelcard import (
    ModelCard,
    ParamOverrides,
    SizeLimits,
    find_card,
    list_cards,
    load_card,
    merged,
    nearest_size,
    param_fault,
    pinned,
    size_fault,
    source_folder,
)
from farm.settings import Settings
from tests.unit.finished_jobs import CARD

TEXT = """\
name: mine
title: Mine
family: z-image
source: {path: weights}
licence: Apache-2.0
dtypes: {cpu: [float32]}
batch: {cpu: 8}
defaults: {width: 64, height: 64, num_inference_steps: 8, guidance_scale: 2}
presets:
  draft: {num_inference_steps: 4}
"""


def write(folder: Path, text: str, name: str = "mine") -> Path:
    file = folder / f"{name}.yaml"
    file.write_text(text)
    return file


def test_bundled_cards_are_sound() -> None:
    cards = {card.name: card for card in list_cards(Settings())}
    assert list(cards) == ["sketch", "z-image-turbo"]
    assert cards["sketch"].limits.sizes == ((64, 64),)
    assert cards["z-image-turbo"].defaults.guidance_scale == 0
    assert cards["z-image-turbo"].seconds_per_image == {}
    for card in cards.values():
        assert list(card.presets) == ["draft", "standard", "final"]


def test_unknown_model_names_the_nearest_and_how_to_add_one(tmp_path: Path) -> None:
    write(tmp_path, TEXT)
    with pytest.raises(UnknownModelError) as caught:
        find_card("mien", Settings(models=tmp_path))
    assert caught.value.message == (
        "no model card is called 'mien'; did you mean mine? (FARM_MODELS names a folder of more)"
    )
    with pytest.raises(UnknownModelError, match="known here: mine, sketch, z-image-turbo") as caught:
        find_card("qqqq", Settings(models=tmp_path))


def test_own_card_comes_before_the_bundled_one(tmp_path: Path) -> None:
    write(tmp_path, TEXT.replace("mine", "sketch"), "sketch")
    assert find_card("sketch", Settings(models=tmp_path)).title == "Mine"


def test_models_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelCardError, match=r"FARM_MODELS: .*absent is not a folder; make it, or unset it"):
        find_card("sketch", Settings(models=tmp_path / "absent"))


def test_relative_path_is_resolved_against_the_card(tmp_path: Path) -> None:
    card = load_card(write(tmp_path, TEXT))
    assert card.source.path == str(tmp_path / "weights")
    with pytest.raises(ModelCardError, match="is not a folder; put the weights there, or mend the card"):
        source_folder(card.source)
    (tmp_path / "weights").mkdir()
    assert source_folder(card.source) == tmp_path / "weights"


def test_package_path_is_found_wherever_the_package_lies(tmp_path: Path) -> None:
    card = load_card(write(tmp_path, TEXT.replace("path: weights", "path: package:farm.storage/")))
    assert card.source.path == "package:farm.storage/"
    folder = source_folder(card.source)
    assert folder is not None
    assert (folder / "base.py").is_file()
    absent = card.source.model_copy(update={"path": "package:nowhere/weights"})
    with pytest.raises(ModelCardError, match="there is no package nowhere; install it, or mend the card"):
        source_folder(absent)


def test_pinned_revision_follows_the_weights(tmp_path: Path) -> None:
    weights = tmp_path / "weights" / "vae"
    weights.mkdir(parents=True)
    (weights / "model.safetensors").write_bytes(b"one")
    card = load_card(write(tmp_path, TEXT))
    before = pinned(card).source.revision
    assert before is not None
    assert before.startswith("sha256:")
    assert pinned(card).source.revision == before
    (weights / "model.safetensors").write_bytes(b"two")
    assert pinned(card).source.revision != before
    assert pinned(CARD) == CARD


def test_dot_files_and_dot_folders_are_no_part_of_the_revision(tmp_path: Path) -> None:
    (tmp_path / ".models" / "weights").mkdir(parents=True)
    (tmp_path / ".models" / "weights" / "model.safetensors").write_bytes(b"one")
    card = load_card(write(tmp_path, TEXT.replace("path: weights", "path: .models/weights")))
    before = pinned(card).source.revision
    (tmp_path / ".models" / "weights" / ".cache" / "huggingface").mkdir(parents=True)
    (tmp_path / ".models" / "weights" / ".cache" / "huggingface" / "model.lock").write_bytes(b"")
    (tmp_path / ".models" / "weights" / ".DS_Store").write_bytes(b"")
    assert pinned(card).source.revision == before
    (tmp_path / ".models" / "weights" / "model.safetensors").write_bytes(b"two")
    assert pinned(card).source.revision != before


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("licence: Apache-2.0\n", "", ":1: `licence` is missing; add it"),
        ("title: Mine", "titel: Mine", ":2: unknown key `titel`; did you mean title? (and 1 more)"),
        ("{path: weights}", "{}", ":4: source: needs one of path, hub and s3; name where the weights are"),
        (
            "{path: weights}",
            "{path: a, hub: b}",
            ":4: source: needs one of path, hub and s3; name where the weights are",
        ),
        (
            "{cpu: [float32]}",
            "{cpu: [fp16]}",
            ":6: dtypes.cpu.0: must be one of float32, bfloat16, float16, got 'fp16'",
        ),
        ("{cpu: [float32]}", "{}", ":6: dtypes: names no device; write one for cpu or cuda"),
        ("{cpu: 8}", "{cuda: 8}", ":7: batch: says nothing of cpu, which dtypes names; add it"),
        ("{cpu: 8}", "{cpu: 0}", ":7: batch.cpu: must be at least one, got 0; change it"),
        (
            "width: 64",
            "width: 70",
            ":8: defaults.width: 70 in 70x64 is not a multiple of 16, as mine needs; nearest is 64x64",
        ),
        ("draft: {num", "draft: {steps: 1, num", ":10: unknown key `steps` in presets.draft"),
        (
            "{num_inference_steps: 4}",
            "{num_inference_steps: 400}",
            ":10: presets.draft.num_inference_steps: 400 is more than",
        ),
        (
            "name: mine",
            "name: other",
            ":1: the card is called 'other' and its file mine.yaml; call the file other.yaml",
        ),
    ],
)
def test_bad_card_is_refused_with_its_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    file = write(tmp_path, TEXT.replace(old, new))
    with pytest.raises(ModelCardError) as caught:
        load_card(file)
    assert caught.value.message.removeprefix(str(file)).startswith(message)


def test_merged_lets_the_later_win() -> None:
    params = merged(CARD.defaults, ParamOverrides(width=128, guidance_scale=1), ParamOverrides(guidance_scale=0))
    assert (params.width, params.height, params.guidance_scale) == (128, 64, 0)


@pytest.mark.parametrize(
    ("width", "height", "text"),
    [
        (1000, 1024, "1000 in 1000x1024 is not a multiple of 16, as big needs; nearest is 992x1024"),
        (1024, 256, "256 in 1024x256 is below big's shortest side, 512; nearest is 1024x512"),
        (4096, 512, "4096 in 4096x512 is above big's longest side, 2048; nearest is 2048x512"),
        (2048, 1024, "2048x1024 has 2097152 pixels, more than big's 1048576; nearest is 1456x720"),
    ],
)
def test_size_out_of_limits_names_the_nearest(width: int, height: int, text: str) -> None:
    limits = SizeLimits(multiple_of=16, min_px=512, max_px=2048, max_pixels=1024 * 1024)
    fault = size_fault(CARD.model_copy(update={"name": "big", "limits": limits}), width, height)
    assert fault is not None
    assert fault.text == text


def test_size_not_in_the_list_names_the_list() -> None:
    card = find_card("sketch", Settings())
    fault = size_fault(card, 128, 64)
    assert fault is not None
    assert fault.text == "128x64 is not a size of sketch, which draws 64x64; nearest is 64x64"


def test_too_many_steps_are_refused() -> None:
    fault = param_fault(CARD, CARD.defaults.model_copy(update={"num_inference_steps": 201}))
    assert fault is not None
    assert (fault.name, fault.text) == ("num_inference_steps", "201 is more than shapes's 200; lower it")


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.sampled_from([8, 16, 64]), st.integers(256 * 256, 2048 * 2048))
def test_nearest_size_is_always_allowed(width: int, height: int, multiple: int, pixels: int) -> None:
    limits = SizeLimits(multiple_of=multiple, min_px=200, max_px=2000, max_pixels=pixels)
    card = ModelCard.model_validate({**CARD.model_dump(), "defaults": CARD.defaults}).model_copy(
        update={"limits": limits}
    )
    assert size_fault(card, *nearest_size(limits, width, height)) is None
