"""What was measured of a model on a device, as `farm bench` or a job leaves it; each field may be another."""

from typing import Any

from farm.records import Profile, ShapeSpeed, Stages

MEASURED_AT = "2026-11-22T10:00:00+00:00"


def make_stages(**changes: Any) -> Stages:
    """Stages of pictures of 512x512 and 1024x1024, without guidance."""
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
        "measured_at": MEASURED_AT,
    }
    return Stages(**fields | changes)


def make_profile(**changes: Any) -> Profile:
    """A profile of pictures of 512x512 in 9 steps."""
    fields: dict[str, Any] = {
        "model": "shapes",
        "device": "a GPU",
        "seconds_per_image": 10.0,
        "width": 512,
        "height": 512,
        "num_inference_steps": 9,
        "batch": 1,
        "images": 2,
        "measured_at": MEASURED_AT,
    }
    return Profile(**fields | changes)
