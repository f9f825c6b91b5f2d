"""What a request for images asks to be drawn."""

from itertools import count
from typing import Any

import pytest
from pydantic import ValidationError

from farm.errors import RequestError
from farm.manifest import MAX_SEED, Output
from farm.modelcard import find_card
from farm.server.generation import MAX_IMAGES, Drawing, ImagesRequest, drawing_of
from farm.settings import Settings

SKETCH = find_card("sketch", Settings())
TURBO = find_card("z-image-turbo", Settings())


def asked(**fields: Any) -> ImagesRequest:
    return ImagesRequest(**{"prompt": "a red circle"} | fields)


def drawn(card: Any = SKETCH, **fields: Any) -> Drawing:
    numbers = count(7)
    return drawing_of(asked(**fields), card, bits=lambda _: next(numbers))


def refusal(card: Any = SKETCH, **fields: Any) -> tuple[str, str | None]:
    with pytest.raises(RequestError) as error:
        drawn(card, **fields)
    return error.value.message, error.value.param


def test_a_prompt_alone_is_one_image_with_the_cards_defaults_and_a_random_seed():
    drawing = drawn()
    assert drawing.params == SKETCH.defaults
    assert [(spec.index, spec.row, spec.prompt, spec.seed) for spec in drawing.specs] == [(0, 0, "a red circle", 7)]
    assert asked().output == Output(format="png", quality=None, thumbnails=False)


def test_each_image_without_a_seed_draws_its_own():
    assert [spec.seed for spec in drawn(n=3).specs] == [7, 8, 9]


def test_a_seed_goes_up_within_a_prompt_and_begins_again_with_the_next():
    drawing = drawn(prompt=None, prompts=["a", "b"], n=2, seed=MAX_SEED)
    assert [(spec.index, spec.row, spec.prompt, spec.seed) for spec in drawing.specs] == [
        (0, 0, "a", MAX_SEED),
        (1, 0, "a", 0),
        (2, 1, "b", MAX_SEED),
        (3, 1, "b", 0),
    ]


@pytest.mark.parametrize(
    ("quality", "steps"),
    [
        ("draft", 4),
        ("low", 4),
        ("standard", 8),
        ("medium", 8),
        ("auto", 8),
        (None, 8),
        ("high", 20),
        ("hd", 20),
        ("final", 20),
    ],
)
def test_quality_is_a_preset_of_the_card_or_openais_word_for_one(quality, steps):
    assert drawn(quality=quality).params.num_inference_steps == steps


def test_what_is_said_by_name_wins_over_the_preset():
    params = drawn(quality="draft", num_inference_steps=5, negative_prompt="blue").params
    assert (params.num_inference_steps, params.guidance_scale, params.negative_prompt) == (5, 1.0, "blue")


def test_a_card_without_presets_knows_openais_middle_words_and_no_others():
    bare = SKETCH.model_copy(update={"presets": {}})
    assert drawn(bare, quality="standard").params == SKETCH.defaults
    assert refusal(bare, quality="hd") == ("sketch has no preset 'hd'; it has none", "quality")


def test_a_preset_nearly_right_is_suggested():
    assert refusal(quality="finale") == ("sketch has no preset 'finale'; did you mean final?", "quality")


def test_size_and_width_and_height_say_the_same():
    assert drawn(TURBO, size="1024x512").params == drawn(TURBO, width=1024, height=512).params
    assert drawn(TURBO, size="auto").params == TURBO.defaults
    assert refusal(size="64x64", width=64) == ("size stands beside width or height; keep one of them", "size")


def test_a_size_that_the_model_cannot_draw_names_the_field_and_the_nearest():
    text = "1024x1024 is not a size of sketch, which draws 64x64; nearest is 64x64"
    assert refusal(size="1024x1024") == (text, "size")
    assert refusal(width=1024, height=1024) == (text, "width")
    assert refusal(num_inference_steps=500) == ("500 is more than sketch's 200; lower it", "num_inference_steps")


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("background", "background is not a field of this endpoint: pictures have no transparency here"),
        (
            "stream",
            "stream is not a field of this endpoint: pictures come whole; GET /v1/jobs/{id}/events streams a job's",
        ),
        ("steps", "steps is not a field of this endpoint: it is called num_inference_steps"),
        ("promt", "promt is not a field of this endpoint; did you mean prompt?"),
        ("zzz", "zzz is not a field of this endpoint; leave it out"),
    ],
)
def test_a_field_that_is_not_known_is_refused_by_name(field, text):
    assert refusal(**{field: 1}) == (text, field)


def test_a_request_without_anything_to_draw_is_refused():
    assert refusal(prompt=" ") == ("prompt is empty; say what to draw", "prompt")
    assert refusal(prompt=None) == ("prompt is empty; say what to draw", "prompt")
    assert refusal(prompt=None, prompts=["a", ""]) == ("prompts.1 is empty; say what to draw", "prompts.1")
    assert refusal(prompts=["a"]) == ("prompt and prompts are both given; keep one of them", "prompts")


def test_prompts_go_with_an_empty_prompt_which_openais_client_insists_on():
    assert [spec.prompt for spec in drawn(prompt="", prompts=["a", "b"]).specs] == ["a", "b"]


def test_more_images_than_an_answer_holds_are_refused():
    message, param = refusal(prompt=None, prompts=["a"] * 33, n=2)
    assert (message, param) == (
        f"33 prompts with 2 images each are more than {MAX_IMAGES}; send less, or submit a job",
        "n",
    )


def test_compression_is_the_quality_of_lossy_files_alone():
    assert asked(output_format="webp", output_compression=0).output.quality == 1
    assert asked(output_format="jpeg", output_compression=80).output == Output(
        format="jpeg", quality=80, thumbnails=False
    )
    assert refusal(output_compression=80) == (
        "output_compression has no effect on png, which is lossless; leave it out, or use output_format: webp",
        "output_compression",
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 0},
        {"n": MAX_IMAGES + 1},
        {"n": True},
        {"n": "2"},
        {"n": 2.0},
        {"seed": "1"},
        {"guidance_scale": "1"},
        {"guidance_scale": True},
        {"prompt": None, "prompts": "ab"},
        {"prompt": None, "prompts": [1]},
        {"seed": -1},
        {"seed": 2**32},
        {"guidance_scale": float("nan")},
        {"guidance_scale": -1},
        {"prompt": "x" * 32_001},
        {"prompt": "\ud800"},
        {"response_format": "bytes"},
    ],
)
def test_values_out_of_bounds_are_refused(fields):
    with pytest.raises(ValidationError):
        asked(**fields)


@pytest.mark.parametrize("size", ["0x64", "64", "64X64", "64x64\n", ""])
def test_a_size_that_is_none_says_how_to_write_one(size):
    assert refusal(size=size) == (f"size: write WIDTHxHEIGHT such as 1024x1024, or auto, got {size!r}", "size")


def test_a_whole_number_is_a_scale_too():
    assert asked(guidance_scale=2).guidance_scale == 2.0


def test_a_negative_prompt_goes_by_its_name_in_the_card():
    assert drawn(TURBO, negative_prompt="@article-photo").params.negative_prompt == "blurry, distorted"
    assert drawn(TURBO, quality="article-art").params.negative_prompt == "dull, low contrast"
    assert drawn(TURBO, negative_prompt="@@home").params.negative_prompt == "@home"
    message, param = refusal(TURBO, negative_prompt="@article-foto")
    assert param == "negative_prompt"
    assert "z-image-turbo has no negative prompt of that name; did you mean @article-photo?" in message
