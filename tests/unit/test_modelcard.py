"""Cards: found, read, resolved, and what they allow."""

import math
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farm.cardparts import Acceleration, SizeLimits, Source
from farm.errors import ManifestError, ModelCardError, UnknownModelError
from farm.modelcard import (
    ModelCard,
    ParamOverrides,
    find_card,
    load_card,
    look_through,
    merged,
    nearest_size,
    negative_of,
    param_fault,
    resolved,
    size_fault,
)
from farm.settings import Settings
from farm.weights import pinned, source_folder
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


def bundled() -> dict[str, ModelCard]:
    return {name: card for name, card in look_through(Settings()).items() if isinstance(card, ModelCard)}


def test_bundled_cards_are_sound() -> None:
    cards = bundled()
    assert list(cards) == [
        "newbie-image-exp0.1",
        "qwen-image-2512",
        "qwen-image-2512-lightning-4",
        "qwen-image-2512-lightning-8",
        "sketch",
        "z-image-turbo",
    ]
    assert cards["sketch"].limits.sizes == ((64, 64),)
    assert cards["z-image-turbo"].defaults.guidance_scale == 0
    assert cards["z-image-turbo"].seconds_per_image == {}
    for card in cards.values():
        assert list(card.presets)[:3] == ["draft", "standard", "final"]
        for preset in card.presets.values():
            assert param_fault(card, merged(card.defaults, preset)) is None
            assert not resolved(card, merged(card.defaults, preset)).negative_prompt.startswith("@")


def test_bundled_cards_say_what_their_models_authors_say() -> None:
    cards = bundled()
    qwen, newbie, turbo = (cards[name] for name in ("qwen-image-2512", "newbie-image-exp0.1", "z-image-turbo"))
    assert (qwen.defaults.num_inference_steps, qwen.defaults.guidance_scale) == (50, 4.0)
    assert qwen.defaults.negative_prompt == " "  # without one its guidance is off
    assert [qwen.presets[name].num_inference_steps for name in ("draft", "standard", "final")] == [20, 40, 60]
    assert qwen.denoiser is not None
    assert (qwen.denoiser.hub, qwen.denoiser.format) == ("unsloth/Qwen-Image-2512-GGUF", "gguf")
    for steps in (4, 8):
        lightning = cards[f"qwen-image-2512-lightning-{steps}"]
        assert (lightning.defaults.num_inference_steps, lightning.defaults.guidance_scale) == (steps, 1.0)
        assert lightning.scheduler is not None
        assert lightning.scheduler.options["base_shift"] == lightning.scheduler.options["max_shift"] == math.log(3)
        assert f"-{steps}steps-" in lightning.adapters[0].file
    assert (newbie.defaults.num_inference_steps, newbie.defaults.guidance_scale) == (28, 5.0)
    assert newbie.licence_warning == "for non-commercial use only"
    guided = {name for name, preset in turbo.presets.items() if preset.guidance_scale}
    assert guided == {name for name, preset in turbo.presets.items() if preset.warning}
    assert guided == {"article-anime", "article-photo", "article-art", "article-concept"}
    warned = {name: preset.warning for name, preset in newbie.presets.items() if preset.warning}
    assert warned == {"article": "50 steps are the article's; the model's authors give 28"}


def test_unknown_model_names_the_nearest_and_how_to_add_one(tmp_path: Path) -> None:
    write(tmp_path, TEXT)
    with pytest.raises(UnknownModelError) as caught:
        find_card("mien", Settings(models=tmp_path))
    assert caught.value.message == (
        "no model card is called 'mien'; did you mean mine? (FARM_MODELS names a folder of more)"
    )
    with pytest.raises(UnknownModelError, match=r"known here: mine, newbie-image-exp0\.1, .*, sketch, z-image-turbo"):
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
            ":4: source: names path and hub, and weights are in one place; keep one of them",
        ),
        ("{path: weights}", "{hub: ''}", ":4: source.hub: "),
        ("{path: weights}", "{path: ''}", ":4: source.path: "),
        ("{path: weights}", "{s3: ''}", ":4: source.s3: "),
        ("{path: weights}", '{path: "a\\0b"}', r":4: source.path: 'a\x00b' has a NUL, which no name has; take it out"),
        (
            "{path: weights}",
            "{path: ~nobody-at-all/w}",
            ":4: source.path: '~nobody-at-all/w' names no folder (has no home or goes in a circle); write the path out",
        ),
        (
            "{path: weights}",
            "{path: package:farm/../../etc}",
            ":4: source.path: must lie inside of its package, got 'package:farm/../../etc'; mend it",
        ),
        ("{path: weights}", "{path: package:../etc}", ":4: source.path: must be package:NAME/FOLDER, got 'package:../"),
        (
            "{path: weights}",
            "{path: package:farm//etc}",
            ":4: source.path: must lie inside of its package, got 'package:farm//etc'; mend it",
        ),
        (
            "presets:",
            "limits: {multiple_of: 4096}\npresets:",
            ":9: limits.multiple_of: 4096 is more than max_px, 2048; lower it",
        ),
        (
            "presets:",
            "limits: {min_px: 128, max_px: 64}\npresets:",
            ":9: limits.min_px: 128 is more than max_px, 64; lower it",
        ),
        (
            "presets:",
            "limits: {multiple_of: 64, min_px: 65, max_px: 127}\npresets:",
            ":9: limits.multiple_of: no multiple of 64 lies between min_px 65 and max_px 127; change one",
        ),
        ("presets:", "limits: {sizes: [[64, 64], [0, 0]]}\npresets:", ":9: limits.sizes.1.0: must be above 0, got 0"),
        ("presets:", "seconds_per_image: {cpu: -1}\npresets:", ":9: seconds_per_image.cpu: must be "),
        ("presets:", "negative_prompts: {'': x}\npresets:", ":9: negative_prompts.: '' cannot be asked for as @NAME;"),
        ("presets:", "negative_prompts: {a b: x}\npresets:", ":9: negative_prompts.a b: 'a b' cannot be asked for as"),
        ("presets:", "negative_prompts: {'@x': x}\npresets:", ":9: negative_prompts.@x: '@x' cannot be asked for as"),
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


def test_a_pipe_among_the_cards_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "mine.yaml")
    with pytest.raises(ModelCardError, match=r"mine\.yaml: is no regular file; name one$"):
        load_card(tmp_path / "mine.yaml")


def test_a_bad_card_among_others_stands_in_its_own_place(tmp_path: Path) -> None:
    write(tmp_path, TEXT)
    write(tmp_path, "name: [", "bad")
    found = look_through(Settings(models=tmp_path))
    assert isinstance(found["mine"], ModelCard)
    assert isinstance(found["sketch"], ModelCard)
    assert isinstance(found["bad"], ModelCardError)


PARTS = """\
denoiser: {path: q, file: m.gguf, format: gguf}
decoder: {path: ../vae}
adapters:
  - {name: a, hub: some/lora, file: a.safetensors}
  - {name: b, path: loras, file: b.safetensors, weight: 0.5}
scheduler: {name: flow-euler, options: {base_shift: 1.1, shift_terminal: null}}
quantise: {encoder: nf4}
options: {encoder_on: cpu}
negative_prompts: {plain: "blurry, ugly"}
"""


def test_every_path_of_a_card_is_resolved_against_it(tmp_path: Path) -> None:
    (tmp_path / "cards").mkdir()
    card = load_card(write(tmp_path / "cards", TEXT + PARTS))
    assert card.denoiser is not None
    assert card.decoder is not None
    assert (card.denoiser.path, card.decoder.path) == (str(tmp_path / "cards" / "q"), str(tmp_path / "vae"))
    assert [adapter.path for adapter in card.adapters] == [None, str(tmp_path / "cards" / "loras")]
    assert card.adapters[1].weight == 0.5


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{path: ../vae}", "{}", ":12: decoder: needs one of path, hub and s3; name where the weights are"),
        ("hub: some/lora, ", "", ":14: adapters.0: needs one of path, hub and s3; name where the weights are"),
        ("{path: ../vae}", "{s3: bucket/x}", ":12: decoder.s3: must be s3://bucket/prefix, got 'bucket/x'; mend it"),
        ("file: m.gguf", "file: m.bin", ":11: denoiser.file: must be a .gguf file, got 'm.bin'; name such a file"),
        ("file: b.s", "file: ../b.s", ":15: adapters.1.file: must be a name below its folder, got '../b.safetensors'"),
        ("file: a.safetensors", "file: a.pt", ":14: adapters.0.file: must be a .safetensors file, got 'a.pt'; name"),
        ("{name: b,", "{name: a,", ":15: adapters.1.name: two adapters are called a; rename one"),
        ("{name: b,", "{name: b, wieght: 2,", ":15: unknown key `wieght` in adapters.1; did you mean weight?"),
        (
            "flow-euler",
            "flow-eular",
            ":16: scheduler.name: must be one of flow-euler, flow-heun, flow-dpm++, flow-unipc",
        ),
        ("{base_shift: 1.1,", "{base_shift: [1],", ":16: scheduler.options.base_shift: "),
        (
            "{encoder: nf4}",
            "{denoiser: nf4}",
            ":17: quantise.denoiser: the denoiser is quantised already, in its GGUF file; leave it out",
        ),
        (
            "encoder_on: cpu",
            "encoder_at: cpu",
            ":18: options.encoder_at: is no option of the family z-image; did you mean enc",
        ),
        ("encoder_on: cpu", "encoder_on: disk", ":18: options.encoder_on: must be cpu, got 'disk'; change it"),
        (
            "{num_inference_steps: 4}",
            '{negative_prompt: "@plane"}',
            ":10: presets.draft.negative_prompt: '@plane': mine has",
        ),
        ("family: z-image", "family: newbie", ":13: adapters: the family newbie takes none; leave it out"),
    ],
)
def test_parts_that_cannot_be_are_refused_with_their_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    file = write(tmp_path, (TEXT + PARTS).replace(old, new))
    with pytest.raises(ModelCardError) as caught:
        load_card(file)
    assert caught.value.message.removeprefix(str(file)).startswith(message)


def test_a_denoiser_from_a_file_of_its_own_is_not_quantised_as_it_loads(tmp_path: Path) -> None:
    given = "denoiser: {path: q, file: m.safetensors, format: safetensors}\nquantise: {denoiser: nf4}\n"
    with pytest.raises(
        ModelCardError, match=r":12: quantise\.denoiser: the denoiser is read from its own file as it is; leave it out"
    ):
        load_card(write(tmp_path, TEXT + given))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("{shfit: 6}", "options.shfit: is no option of the family newbie; did you mean shift?"),
        ("{shift: true}", "options.shift: must be a number, got true; change it"),
        ("{system_prompt: 6}", "options.system_prompt: must be text, got 6; change it"),
    ],
)
def test_options_are_those_of_the_family(tmp_path: Path, options: str, message: str) -> None:
    newbie = TEXT.replace("family: z-image", "family: newbie")
    assert load_card(write(tmp_path, newbie + "options: {shift: 6}")).options == {"shift": 6}
    with pytest.raises(ModelCardError) as caught:
        load_card(write(tmp_path, f"{newbie}options: {options}"))
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("family", "given", "message"),
    [
        ("z-image", "{cuda: {attention: flash_hub}}", "acceleration.cuda.attention: must be"),
        (
            "newbie",
            "{cuda: {first_block_cache: 0.1}}",
            "acceleration.cuda.first_block_cache: the family newbie has no such",
        ),
        (
            "newbie",
            "{cpu: {attention: flash}}",
            "acceleration.cpu.attention: the family newbie has no such thing; leave it out",
        ),
        ("qwen-image", "{cpu: {first_block_cache: 0.1}}", "draw one at a time (batch: {cpu: 1})"),
        ("z-image", "{cpu: {first_block_cache: 0.1}}", "draw one at a time (batch: {cpu: 1})"),
        ("diffusers", "{cuda: {compile: true}}", "acceleration.cuda.compile: the family diffusers has no such thing"),
        ("z-image", "{cuda: {attention: flex}}", "acceleration.cuda.attention: must be"),
        ("qwen-image", "{cuda: {first_block_cache: 0}}", "acceleration.cuda.first_block_cache: must be"),
        ("qwen-image", "{cuda: {compiled: true}}", "did you mean compile?"),
    ],
)
def test_acceleration_is_of_the_family_and_downloads_no_code(
    tmp_path: Path, family: str, given: str, message: str
) -> None:
    text = TEXT.replace("family: z-image", f"family: {family}")
    if family != "diffusers":
        found = load_card(write(tmp_path, text + "acceleration: {cuda: {compile: true}}")).acceleration
        assert found == {"cuda": Acceleration(compile=True)}
    with pytest.raises(ModelCardError) as caught:
        load_card(write(tmp_path, f"{text}acceleration: {given}"))
    assert message in caught.value.message


HEX = "0a" * 32


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "../x.py: H",
            ":11: code.../x.py: '../x.py' cannot be imported: name Python files below the source's folder, ",
        ),
        ("/x.py: H", ":11: code./x.py: '/x.py' cannot be imported: name"),
        ("a//x.py: H", ":11: code.a//x.py: 'a//x.py' cannot be imported"),
        ("./x.py: H", ":11: code../x.py: './x.py' cannot be imported"),
        ("x.pyc: H", "'x.pyc' cannot be imported"),
        (".py: H", "'.py' cannot be imported"),
        (
            "my-code/x.py: H",
            "'my-code/x.py' cannot be imported: name Python files below the source's folder, folders and ",
        ),
        ("a.b/x.py: H", "'a.b/x.py' cannot be imported"),
        ("1/x.py: H", "'1/x.py' cannot be imported"),
        ("ﬁx.py: H", "'ﬁx.py' cannot be imported"),  # Python would take it for fix.py
        ('"x.py\\n": H', "'x.py\\n' cannot be imported"),
        ('"x\\0.py": H', "'x\\x00.py' cannot be imported"),
        ("'a\\b.py': H", "cannot be imported"),
        ("x.py: abc", ":11: code.x.py: must be a sha256 of 64 lower-case hex digits, got 'abc'; sha256sum tells it"),
        (f"x.py: {HEX.upper()}", "must be a sha256 of 64 lower-case hex digits"),
        (f'x.py: "{HEX}\\n"', "must be a sha256 of 64 lower-case hex digits"),
        ("x.py: 5", ":11: code.x.py: must be text, got 5; put quotes around it"),
        ("a.py: H, a/b.py: H", ":11: code.a/b.py: lies in a folder that is imported as a.py is; rename one of them"),
        ("a/__init__.py: H, a.py: H", "code.a/__init__.py: lies in a folder that is imported as a.py is"),
    ],
)
def test_code_is_of_files_that_can_be_imported_and_their_hashes(tmp_path: Path, code: str, message: str) -> None:
    own = TEXT.replace("family: z-image", "family: diffusers")
    with pytest.raises(ModelCardError) as caught:
        load_card(write(tmp_path, f"{own}code: {{{code.replace(': H', f': {HEX}')}}}"))
    assert message in caught.value.message


def test_code_is_for_pipelines_of_diffusers_alone(tmp_path: Path) -> None:
    code = f"code: {{pipeline.py: {HEX}, transformer/my_transformer.py: {HEX}, a/__init__.py: {HEX}}}"
    own = TEXT.replace("family: z-image", "family: diffusers")
    assert list(load_card(write(tmp_path, own + code)).code) == [
        "pipeline.py",
        "transformer/my_transformer.py",
        "a/__init__.py",
    ]
    with pytest.raises(ModelCardError, match=r":11: code: the family z-image takes none; leave it out"):
        load_card(write(tmp_path, TEXT + code))


def test_negative_prompts_go_by_name() -> None:
    card = CARD.model_copy(update={"negative_prompts": {"standard": "blurry", "anime": "extra fingers"}})
    assert negative_of(card, "@anime") == "extra fingers"
    assert negative_of(card, "plain @anime") == "plain @anime"
    assert negative_of(card, "@@anime") == "@anime"
    assert resolved(card, ParamOverrides(width=64)) == ParamOverrides(width=64)
    assert resolved(card, ParamOverrides(negative_prompt="@standard")).negative_prompt == "blurry"
    with pytest.raises(ManifestError) as caught:
        negative_of(card, "@animes")
    assert caught.value.message == (
        "negative_prompt '@animes': shapes has no negative prompt of that name; did you mean @anime? "
        "(@@ begins a text with an @)"
    )
    with pytest.raises(ManifestError, match="of that name; it has none "):
        negative_of(CARD, "@anime")


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


@pytest.mark.parametrize("path", ["/" + "a" * 5000, "/a\0b", "package:no.such.package/x", "package:__main__/x"])
def test_a_path_that_can_be_no_folder_is_refused(path: str) -> None:
    with pytest.raises(ModelCardError, match=r"put the weights there, or mend the card|install it, or mend the card"):
        source_folder(Source(path=path))
