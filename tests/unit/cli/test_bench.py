import json
from pathlib import Path

import pytest
from PIL import Image

from farm.cardparts import Acceleration
from farm.devices import local_device
from farm.engine import Engine
from farm.errors import RenderError, StoreFullError
from farm.ledger import Ledger
from farm.models import sleep
from farm.records import Profile
from tests.unit.cli.conftest import Place


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sleep, "STEP_S", 0.0)


def test_the_bundled_model_is_measured_for_real(farm: Place) -> None:
    ended = farm("bench", "sketch", "--images", "2", "--rounds", "2", "--steps", "2,4", "--out", "out")
    assert ended.code == 0, ended.err
    assert "  picture     64×64, 8 steps, guidance 2\n" in ended.out
    assert "  memory      " in ended.out
    assert ended.err.splitlines()[:3] == ["cold start", "round 1 of 2", "round 2 of 2"]
    record = json.loads((farm.folder / "out" / "bench.json").read_text())
    assert [one["part"] for one in record["drawn"]].count("round") == 4
    assert record["job"]["batch"] == 8
    assert record["memory"]["peak_gib"]["denoise"] > 0.1
    with Image.open(farm.folder / "out" / "sheet.png") as sheet:
        assert sheet.width > 2 * 224
    profile = farm.ledger.profile("sketch", local_device().name)
    assert profile is not None
    assert profile.stages is not None
    assert (profile.width, profile.num_inference_steps, profile.stages.guided_above) == (64, 8, 0.0)
    manifest = farm.manifest(model="sketch", params={"num_inference_steps": 16})
    plan = json.loads(farm("plan", manifest, "--json").out)
    assert plan["speed_source"] == "estimated"
    assert plan["seconds_per_image"] > profile.seconds_per_image


def test_json_has_all_of_it_and_no_profile_leaves_the_store_alone(farm: Place) -> None:
    ended = farm("bench", "shapes", "--images", "1", "--rounds", "1", "--no-profile", "--json", "--prompt", "x")
    record = json.loads(ended.out)
    assert (record["profile_stored"], record["prompts"], ended.err) == (False, ["x"], "")
    assert Path(record["out"]).parent == Path("farm-bench")
    assert (farm.folder / record["out"] / "report.md").read_text().startswith("# Shapes on ")
    assert not farm.store.exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--steps", "4,many"), "--steps 4,many: 'many' is no whole number above 0; write as 4,8,20"),
        (("--sizes", "512"), "--sizes 512: '512' is no size; write as 512x512,1024x1024"),
        (("--batch", "0"), "--batch 0: '0' is no whole number above 0; write as 4,8,20"),
        (("--sizes", "65x64"), "--sizes: 65 in 65x64 is not a multiple of 16, as shapes needs; nearest is 64x64"),
        (("--preset", "final"), "--preset: shapes has no preset 'final'; it has none"),
        (
            ("--batch", "4,1000000000"),
            "--batch 4,1000000000: '1000000000' is more than 256, the most allowed; lower it",
        ),
        (("--batch", "257"), "--batch 257: '257' is more than 256, the most allowed; lower it"),
        (("--images", "201"), "--images 201: must be 1 to 200"),
        (("--images", "0"), "--images 0: must be 1 to 200"),
        (("--rounds", "0"), "--rounds 0: must be 1 to 100"),
        (("--rounds", "101"), "--rounds 101: must be 1 to 100"),
        (("--seed", "-1"), "--seed -1: must be 0 to 4294967295"),
        (
            ("--steps", "9" * 5000),
            f"--steps {'9' * 59}…: '{'9' * 59}…' is more than 999,999, the most allowed; lower it",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_loads(
    farm: Place, flags: tuple[str, ...], said: str
) -> None:
    ended = farm("bench", "shapes", *flags)
    assert (ended.code, ended.error) == (2, said)
    assert not (farm.folder / "farm-bench").exists()


def test_an_unusable_store_is_refused_before_anything_is_measured(farm: Place) -> None:
    farm.write("store", "")
    ended = farm("bench", "shapes", "--out", "runs/out")
    assert ended.code == 3, ended.err
    assert "cold start" not in ended.err
    assert not (farm.folder / "runs").exists()


def test_a_store_that_fails_at_the_end_costs_the_profile_and_not_the_result(
    farm: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Ledger, profile: Profile) -> None:
        raise StoreFullError("no room in the store; make some")

    monkeypatch.setattr(Ledger, "put_profile", full)
    ended = farm("bench", "shapes", "--images", "1", "--rounds", "1", "--json", "--out", "out")
    record = json.loads(ended.out)
    assert (ended.code, record["profile_stored"], record["out"]) == (3, False, "out")
    assert ended.error == "no room in the store; make some"
    assert ended.err.endswith("its profile is not stored; the report lies in out\n")
    ended = farm("bench", "shapes", "--images", "1", "--rounds", "1", "--out", "again")
    assert (ended.code, "  profile  " in ended.out) == (3, False)
    assert "  report      again/report.md" in ended.out


def test_a_model_that_fails_leaves_no_empty_folder(farm: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Engine) -> float:
        raise RenderError("it does not load")

    monkeypatch.setattr(Engine, "load", fail)
    ended = farm("bench", "shapes", "--out", "out")
    assert (ended.code, ended.error) == (4, "it does not load")
    assert not (farm.folder / "out").exists()


def test_a_folder_in_use_is_refused(farm: Place) -> None:
    farm.write("job.yaml", "")
    ended = farm("bench", "shapes", "--out", ".")
    assert ended.code == 2
    assert ended.error.startswith("--out .: holds ")


def test_accelerated_ways_are_measured_beside_the_card_and_stored_apart(farm: Place) -> None:
    flags = ("--images", "1", "--rounds", "1", "--accelerate", "attention=_native_flash", "--accelerate", "none")
    ended = farm("bench", "sketch", *flags, "--out", "out")
    assert ended.code == 0, ended.err
    assert "  attention _native_flash: " in ended.out
    assert "  as it is, again: " in ended.out
    record = json.loads((farm.folder / "out" / "bench.json").read_text())["accelerated"]
    assert [one["name"] for one in record] == ["attention _native_flash", "as it is, again"]
    assert record[1]["psnr_db"] == [None]
    with Image.open(farm.folder / "out" / "acceleration.png") as sheet:
        assert sheet.width > 3 * 224
    how = Acceleration(attention="_native_flash")
    stored = farm.ledger.profile("sketch", local_device().name, how)
    assert stored is not None
    assert stored.seconds_per_image == record[0]["seconds_per_image"]
    plain = farm.ledger.profile("sketch", local_device().name)
    assert plain is not None
    assert (
        plain.seconds_per_image
        == json.loads((farm.folder / "out" / "bench.json").read_text())["job"]["seconds_per_image"]
    )
    compared = farm("compare", "out", "out", "--json")
    assert json.loads(compared.out)["paired"] == 1


def test_an_acceleration_that_no_card_can_have_is_refused_before_anything_loads(farm: Place) -> None:
    ended = farm("bench", "sketch", "--accelerate", "quick")
    said = "--accelerate 'quick': 'quick' is no way to accelerate; write compile, attention=KERNEL or first_block_cache=SHARE, "
    assert (ended.code, ended.error.startswith(said)) == (2, True)


def test_what_was_measured_is_kept_when_a_way_is_interrupted(farm: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("farm.bench.acceleration.measure_ways", interrupted)
    flags = ("--images", "1", "--rounds", "1", "--no-profile", "--accelerate", "compile", "--accelerate", "compile")
    ended = farm("bench", "sketch", *flags, "--out", "out")
    assert ended.code == 130
    assert json.loads((farm.folder / "out" / "bench.json").read_text())["accelerated"] == []
