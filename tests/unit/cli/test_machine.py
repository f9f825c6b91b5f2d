import json

import pytest

from farm import doctor
from farm.doctor import Check
from tests.unit.cli.conftest import Place


def test_doctor_without_a_render_finds_this_place_sound(farm: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = farm("doctor", "--no-render", "--json")
    checks = {(check["name"], check["status"]) for check in json.loads(ended.out)["checks"]}
    assert {("python", "ok"), ("packages", "ok"), ("store", "ok"), ("ray", "ok")} <= checks
    assert all(check["next_step"] for check in json.loads(ended.out)["checks"] if check["status"] == "warn")


def test_a_check_that_fails_stops_no_other_and_ends_with_code_7(farm: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    farm.store.write_text("a file where the folder should be")

    def broken() -> list[Check]:
        raise RuntimeError("the driver\nis odd")

    monkeypatch.setattr(doctor, "_memory", broken)
    ended = farm("doctor", "--no-render")
    assert ended.code == 7
    lines = ended.out.splitlines()
    assert "FAIL  memory       RuntimeError: the driver is odd; run farm doctor -v for the traceback" in lines
    assert any(line.startswith("FAIL  store ") for line in lines)
    assert any(line.startswith("ok    ray ") for line in lines)
    assert ended.err.strip().endswith("checks failed")


def test_a_render_that_comes_out_black_is_a_failure(farm: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "TEST_MODEL", "shapes")
    monkeypatch.setattr(doctor, "flag_of", lambda pixels: "black")
    ended = farm("doctor")
    assert ended.code == 7
    assert "the picture is black; see the driver and torch's build" in ended.out


def test_a_sound_test_render_says_how_long_it_took(farm: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "TEST_MODEL", "shapes")
    assert ", one picture in " in farm("doctor").out
