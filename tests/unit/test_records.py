"""The ledger's small records: what is worked out from them."""

from typing import Any

import pytest
from pydantic import ValidationError

from farm.modelcard import RenderParams
from farm.records import DEVICE_STAGES, Profile, ShapeSpeed, Stages, device_seconds
from tests.unit.finished_jobs import make_totals


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


def stages(**changes: Any) -> Stages:
    fields: dict[str, Any] = {
        "load_s": 2.0,
        "encode_s": 0.5,
        "guidance_scale": 0.0,
        "guided_above": 0.0,
        "shapes": (
            ShapeSpeed(width=1024, height=1024, step_s=4.0, decode_s=2.0),
            ShapeSpeed(width=512, height=512, step_s=1.0, decode_s=0.5),
        ),
        "batch": 1,
        "peak_gib": {"denoise": 9.5},
        "dtype": "bfloat16",
        "versions": {"torch": "2.13.0"},
        "measured_at": "2026-11-22T10:00:00+00:00",
    }
    return Stages(**fields | changes)


def params(side: int, steps: int, guidance_scale: float = 0.0) -> RenderParams:
    return RenderParams(width=side, height=side, num_inference_steps=steps, guidance_scale=guidance_scale)


def profile(**changes: Any) -> Profile:
    fields: dict[str, Any] = {
        "model": "shapes",
        "device": "a GPU",
        "seconds_per_image": 10.0,
        "width": 512,
        "height": 512,
        "num_inference_steps": 9,
        "batch": 1,
        "images": 2,
        "measured_at": "2026-11-22T10:00:00+00:00",
    }
    return Profile(**fields | changes)


def test_seconds_are_encoding_steps_and_decoding_of_the_size() -> None:
    assert stages().seconds_of(params(512, 9)) == 0.5 + 9 * 1.0 + 0.5
    assert stages().seconds_of(params(1024, 20)) == 0.5 + 20 * 4.0 + 2.0


def test_sizes_between_lie_on_the_line_and_others_follow_their_pixels() -> None:
    between = (768 * 768 - 512 * 512) / (1024 * 1024 - 512 * 512)
    assert stages().seconds_of(params(768, 10)) == pytest.approx(0.5 + 10 * (1 + 3 * between) + 0.5 + 1.5 * between)
    assert stages().seconds_of(params(256, 10)) == pytest.approx(0.5 + 10 * 0.25 + 0.125)
    assert stages().seconds_of(params(2048, 10)) == pytest.approx(0.5 + 10 * 16 + 8)


def test_guidance_doubles_the_steps_where_the_family_begins_to_guide() -> None:
    assert stages().seconds_of(params(512, 8, 2.0)) == 0.5 + 8 * 2.0 + 0.5
    assert stages(guidance_scale=4.0).seconds_of(params(512, 8)) == 0.5 + 8 * 0.5 + 0.5
    assert stages(guided_above=1.0).seconds_of(params(512, 8, 1.0)) == 0.5 + 8 * 1.0 + 0.5
    assert stages(guided_above=None).seconds_of(params(512, 8, 7.0)) == 0.5 + 8 * 1.0 + 0.5


def test_the_encoder_is_in_until_a_shards_prompts_and_the_negative_one_are_encoded() -> None:
    phased = stages(encoder_in_s=2.0)
    assert phased.encoder_s(params(512, 9), 4) == 2.0 + 4 * 0.5
    assert phased.encoder_s(params(512, 9, 5.0), 4) == 2.0 + 5 * 0.5
    assert stages().encoder_s(params(512, 9), 1) == 0.5
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
        profile(**changes)
    text = profile().model_dump_json().replace('"seconds_per_image":10.0', '"seconds_per_image":Infinity')
    with pytest.raises(ValidationError):
        Profile.model_validate_json(text)


def test_a_profile_scales_what_a_job_took_by_pixels_and_steps_or_by_known_stages() -> None:
    assert profile().seconds_of(params(512, 18)) == pytest.approx(20.0)
    assert profile(stages=stages()).seconds_of(params(512, 9)) == pytest.approx(10.0)
    assert profile(stages=stages()).seconds_of(params(512, 18)) == pytest.approx(10.0 * 19 / 10)
