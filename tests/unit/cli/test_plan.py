import json
import re
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from farm.devices import local_device
from farm.placement import ALL, DRAWING, ENCODER, Placement
from farm.records import ShapeSpeed
from tests.unit.cli.conftest import FakeFarm, Place
from tests.unit.profiles import make_profile, make_stages


def test_plan_counts_and_writes_nothing(farm: Place) -> None:
    ended = farm("plan", farm.manifest(sweep={"num_inference_steps": [2, 4]}))
    assert ended.code == 0
    assert ended.out.startswith("shapes: 20 images in ")
    assert "  state      a new job\n" in ended.out
    assert "  images     5 prompts × 2 sweep points × 2 seeds\n" in ended.out
    assert "  sizes      64×64: 20\n" in ended.out
    assert "  time       unknown: nothing of the kind was rendered on this device yet\n" in ended.out
    assert ", num_inference_steps 2\n" in ended.out
    assert not farm.store.exists()


def test_plan_as_json_has_the_first_images(farm: Place) -> None:
    record = json.loads(farm("plan", farm.manifest(), "--json").out)
    assert (record["images"], record["prompts"], record["seeds"], record["state"]) == (10, 5, 2, "new")
    assert record["first"][0]["prompt"] == "shape number 0"
    assert record["speed_source"] == "unknown"


def test_plan_of_a_job_that_is_there_says_what_a_render_would_do(farm: Place, fake_farm: FakeFarm) -> None:
    farm("render", farm.manifest())
    assert "planned from just this" in farm("plan", farm.manifest()).out
    ended = farm("plan", farm.manifest(seeds={"count": 3}))
    assert "planned from something else" in ended.out
    assert "seeds.count: 2 -> 3" in ended.out
    assert ended.code == 0


def measured(farm: Place, seconds_per_image: float) -> None:
    """A speed of this device, as an earlier job left it."""
    shape = {"width": 64, "height": 64, "num_inference_steps": 4}
    farm.ledger.put_profile(make_profile(device=local_device().name, seconds_per_image=seconds_per_image, **shape))


def in_hours(number: float) -> str:
    return (datetime.now(UTC) + timedelta(hours=number)).isoformat(timespec="seconds")


def test_plan_of_a_pilot_says_how_many_images_wait(farm: Place) -> None:
    ended = farm("plan", farm.manifest(pilot=3))
    assert "  pilot      3 images first, spread over the job; 7 wait for farm approve\n" in ended.out
    assert json.loads(farm("plan", farm.manifest(pilot=3), "--json").out)["pilot"] == 3
    assert "pilot" not in farm("plan", farm.manifest(pilot=10)).out


def test_limits_without_a_known_speed_are_said_to_be_unknown(farm: Place) -> None:
    ended = farm("plan", farm.manifest(finish_by=in_hours(5), budget={"gpu_hours": 1, "images": 8}))
    assert re.search(r"  finish by  \S+, in [45] h \d+ min: unknown whether it is met\n", ended.out)
    assert "  budget     1 GPU-hour: unknown how many are needed\n" in ended.out
    assert "  budget     8 images: 10 needed, so it stops before its end\n" in ended.out


def test_a_finish_by_that_is_met_says_with_what(farm: Place) -> None:
    measured(farm, 360.0)
    manifest = farm.manifest(finish_by=in_hours(2), budget={"gpu_hours": 2})
    ended = farm("plan", manifest, "--renderers", "1")
    assert re.search(r"  finish by  \S+, in (2 h 00|1 h 59) min: met, with 1 h 00 min on 1 renderer\n", ended.out)
    assert "  budget     2 GPU-hours: about 1 needed\n" in ended.out
    limits = json.loads(farm("plan", manifest, "--renderers", "1", "--json").out)["limits"]
    assert (limits["in_time"], limits["within_budget"], limits["renderers_needed"]) == (True, True, 1)


def test_a_finish_by_that_is_not_met_says_how_many_renderers_would_do(farm: Place) -> None:
    measured(farm, 1800.0)
    manifest = farm.manifest(finish_by=in_hours(2), budget={"gpu_hours": 2})
    ended = farm("plan", manifest, "--renderers", "1")
    assert "not met, with 5 h 00 min on 1 renderer; 3 are enough\n" in ended.out
    assert "  budget     2 GPU-hours: about 5 needed, so it stops when they are spent\n" in ended.out
    limits = json.loads(farm("plan", manifest, "--renderers", "1", "--json").out)["limits"]
    assert (limits["in_time"], limits["within_budget"], limits["renderers_needed"]) == (False, False, 3)
    ended = farm("plan", farm.manifest(finish_by=in_hours(0.5)), "--renderers", "1")
    assert "not met, with 5 h 00 min on 1 renderer; no number of them is enough\n" in ended.out


def test_plan_says_where_the_models_parts_lie(farm: Place) -> None:
    ended = farm("plan", farm.manifest(model="sketch"))
    assert re.search(
        r"  placement  CPU, \d+ cores: resident: 0\.0 GiB in main memory, batch \d+; urgent images: ", ended.out
    )
    asked = farm("plan", farm.manifest(model="sketch"), "--device", "RTX 3060:12", "--device", "RTX 4090:24").out
    assert (
        "  placement  1 × RTX 3060: resident: all parts stay (text encoder 0.0 GiB, denoiser 0.0, decoder 0.0)" in asked
    )
    assert "11.0 GiB; urgent images: within a step\n  placement  1 × RTX 4090: resident: " in asked
    assert "15.0 GiB; urgent images: within a step\n" in asked
    record = json.loads(farm("plan", farm.manifest(model="sketch"), "--vram", "12", "--json").out)
    assert [(one["device"], one["layout"]) for one in record["placements"]] == [("GPU of 12 GiB", "resident")]


@pytest.mark.parametrize(("vram", "said"), [("100000", "100000"), ("0.5", "0.5"), ("nan", "nan")])
def test_a_budget_out_of_bounds_names_its_flag_and_its_limit(farm: Place, vram: str, said: str) -> None:
    ended = farm("plan", farm.manifest(model="sketch"), "--vram", vram)
    assert (ended.code, ended.error) == (2, f"--vram {said}: must be 1 GiB or more, and less than 10,000")


def test_plan_names_the_denoisers_file_and_what_is_quantised(farm: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    bundled = Path(__file__).parents[3] / "manifests" / "models" / "qwen-image-2512.yaml"
    shutil.copy(bundled, farm.folder / "cards")
    monkeypatch.setattr("farm.fitting.are_here", lambda card, settings: False)
    manifest = farm.manifest(model="qwen-image-2512")
    shown = farm("plan", manifest, "--device", "RTX 4060 Ti:16").out
    said = "denoiser from qwen-image-2512-Q4_K_M.gguf, text encoder as nf4"
    assert f"  model      qwen-image-2512: Qwen-Image-2512, 20 B parameters\n             {said}\n" in shown
    record = json.loads(farm("plan", manifest, "--device", "RTX 4060 Ti:16", "--json").out)
    assert (record["denoiser_file"], record["quantised"]) == ("qwen-image-2512-Q4_K_M.gguf", {"encoder": "nf4"})
    plain = json.loads(farm("plan", farm.manifest(), "--json").out)
    assert (plain["denoiser_file"], plain["quantised"]) == (None, {})


def test_plan_without_the_weights_says_how_to_get_them(farm: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farm.fitting.are_here", lambda card, settings: False)
    ended = farm("plan", farm.manifest(model="sketch"))
    assert "  placement  unknown: the weights are not here yet; farm models pull sketch brings them\n" in ended.out
    assert json.loads(farm("plan", farm.manifest(model="sketch"), "--json").out)["placements"] is None


def test_plan_names_the_device_that_cannot_draw_it(farm: Place) -> None:
    ended = farm("plan", farm.manifest(model="sketch"), "--device", "GT 1030:1")
    assert (ended.code, ended.out) == (4, "")
    assert ended.err.startswith("error: model sketch does not fit GT 1030: its largest phase needs")
    both = farm("plan", farm.manifest(model="sketch"), "--device", "GT 1030:1", "--device", "RTX 4060 Ti:16", "--json")
    found = json.loads(both.out)
    assert [one["layout"] for one in found["placements"]] == [None, "resident"]
    assert (found["renderers"], found["device"]) == (1, "RTX 4060 Ti")  # time is reckoned on those that can draw it
    wrong = farm("plan", farm.manifest(model="sketch"), "--device", "RTX 4060 Ti")
    assert wrong.error == "--device RTX 4060 Ti: write its name and its memory in GiB, as --device 'RTX 4060 Ti:16'"


def bench_of(farm: Place, device: str, **changes: float | None) -> None:
    """What `farm bench sketch` left of a device."""
    speed = ShapeSpeed(width=64, height=64, step_s=1.5, decode_s=0.5)
    stages = make_stages(encode_s=0.25, guidance_scale=2.0, shapes=(speed,), **changes)
    shape = {"width": 64, "height": 64, "num_inference_steps": 8}
    farm.ledger.put_profile(make_profile(model="sketch", device=device, **shape, stages=stages))


@pytest.mark.parametrize(
    ("stage", "measured_there", "said"),
    [
        (ALL, {}, "as measured: encoder 0.2 s a prompt, denoiser 12 s and decoder 0.5 s an image"),
        (
            ENCODER,
            {"encoder_in_s": 2.0, "denoiser_in_s": 1.5},
            "as measured: encoder in for 3.5 s a shard of 5 prompts, denoiser back after 1.5 s; denoiser 12 s and decoder 0.5 s "
            "an image",
        ),
        (ENCODER, {}, "for how long each is in: not measured there yet; farm bench sketch does"),
    ],
)
def test_plan_says_for_how_long_parts_are_in_where_it_was_measured(
    farm: Place,
    monkeypatch: pytest.MonkeyPatch,
    stage: frozenset[str],
    measured_there: dict[str, float | None],
    said: str,
) -> None:
    denoise = ALL if stage == ALL else DRAWING
    placed = Placement("resident" if stage == ALL else "phased", stage, denoise, denoise, 9.0, "as it is")
    monkeypatch.setattr("farm.fitting.place", lambda *args, **kwargs: placed)
    bench_of(farm, "RTX 4060 Ti", **measured_there)
    manifest = farm.manifest(model="sketch", params={"num_inference_steps": 8, "guidance_scale": 2})
    ended = farm("plan", manifest, "--device", "RTX 4060 Ti:16")
    assert f"\n             {said}\n" in ended.out
    record = json.loads(farm("plan", manifest, "--device", "RTX 4060 Ti:16", "--json").out)
    assert record["placements"][0]["stages"]["encoder_in_s"] == measured_there.get("encoder_in_s")


def test_what_was_measured_of_other_weights_is_not_said_to_be_of_these(farm: Place) -> None:
    bench_of(farm, "RTX 4060 Ti")
    known = farm.ledger.profile("sketch", "RTX 4060 Ti")
    assert known is not None
    farm.ledger.put_profile(known.model_copy(update={"identity": "of other weights"}))
    ended = farm("plan", farm.manifest(model="sketch"), "--device", "RTX 4060 Ti:16")
    assert "as measured" not in ended.out
    assert "(estimated for RTX 4060 Ti)" in ended.out


def test_plan_says_nothing_of_seconds_where_all_stays_and_nothing_was_measured(farm: Place) -> None:
    ended = farm("plan", farm.manifest(model="sketch"), "--device", "RTX 4060 Ti:16")
    assert "measured" not in ended.out
