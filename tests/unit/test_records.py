"""The ledger's small records: what is worked out from them."""

import pytest
from pydantic import ValidationError

from farm.modelcard import RenderParams
from farm.records import DEVICE_STAGES, Profile, device_seconds
from tests.unit.finished_jobs import make_totals
from tests.unit.profiles import make_profile, make_stages


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ({}, 0.0),
        ({"write": 9.0, "fetch": 2.0}, 0.0),
        ({"load": 1.0, "encode": 2.0, "denoise": 3.0, "decode": 4.0, "write": 50.0}, 10.0),
    ],
)
def test_seconds_of_stages_beside_the_device_are_not_the_devices(seconds: dict[str, float], expected: float) -> None:
    assert device_seconds(seconds) == expected
    assert make_totals(seconds=seconds).gpu_seconds == expected


def test_each_stage_on_the_device_counts_once() -> None:
    assert device_seconds(dict.fromkeys(DEVICE_STAGES, 1.0)) == len(DEVICE_STAGES)


def params(side: int, steps: int, guidance_scale: float = 0.0) -> RenderParams:
    return RenderParams(width=side, height=side, num_inference_steps=steps, guidance_scale=guidance_scale)


def test_seconds_are_encoding_steps_and_decoding_of_the_size() -> None:
    assert make_stages().seconds_of(params(512, 9)) == 0.5 + 9 * 1.0 + 0.5
    assert make_stages().seconds_of(params(1024, 20)) == 0.5 + 20 * 4.0 + 2.0


def test_sizes_between_lie_on_the_line_and_others_follow_their_pixels() -> None:
    between = (768 * 768 - 512 * 512) / (1024 * 1024 - 512 * 512)
    assert make_stages().seconds_of(params(768, 10)) == pytest.approx(
        0.5 + 10 * (1 + 3 * between) + 0.5 + 1.5 * between
    )
    assert make_stages().seconds_of(params(256, 10)) == pytest.approx(0.5 + 10 * 0.25 + 0.125)
    assert make_stages().seconds_of(params(2048, 10)) == pytest.approx(0.5 + 10 * 16 + 8)


def test_guidance_doubles_the_steps_where_the_family_begins_to_guide() -> None:
    assert make_stages().seconds_of(params(512, 8, 2.0)) == 0.5 + 8 * 2.0 + 0.5
    assert make_stages(guidance_scale=4.0).seconds_of(params(512, 8)) == 0.5 + 8 * 0.5 + 0.5
    assert make_stages(guided_above=1.0).seconds_of(params(512, 8, 1.0)) == 0.5 + 8 * 1.0 + 0.5
    assert make_stages(guided_above=None).seconds_of(params(512, 8, 7.0)) == 0.5 + 8 * 1.0 + 0.5


def test_the_encoder_is_in_until_a_shards_prompts_and_the_negative_one_are_encoded() -> None:
    phased = make_stages(encoder_in_s=2.0)
    assert phased.encoder_s(params(512, 9), 4) == 2.0 + 4 * 0.5
    assert phased.encoder_s(params(512, 9, 5.0), 4) == 2.0 + 5 * 0.5
    assert make_stages().encoder_s(params(512, 9), 1) == 0.5
    assert phased.drawing_s(params(1024, 20)) == (80.0, 2.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"seconds_per_image": float("inf")},
        {"seconds_per_image": 1e300},
        {"seconds_per_image": 5e-324},
        {"width": 10**400},
    ],
)
def test_no_profile_has_what_nobody_can_have_measured(changes: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        make_profile(**changes)
    text = make_profile().model_dump_json().replace('"seconds_per_image":10.0', '"seconds_per_image":Infinity')
    with pytest.raises(ValidationError):
        Profile.model_validate_json(text)


def test_a_profile_scales_what_a_job_took_by_pixels_and_steps_or_by_known_stages() -> None:
    assert make_profile().seconds_of(params(512, 18)) == pytest.approx(20.0)
    assert make_profile(stages=make_stages()).seconds_of(params(512, 9)) == pytest.approx(10.0)
    assert make_profile(stages=make_stages()).seconds_of(params(512, 18)) == pytest.approx(10.0 * 19 / 10)
