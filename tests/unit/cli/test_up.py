"""What `farm up` refuses before anything starts, and `farm down` where nothing runs."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from farm.settings import load_settings
from farm.whereabouts import note_file, own_whereabouts, write_note
from tests.unit.cli.conftest import Place


@pytest.fixture(autouse=True)
def _runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FARM_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)


def test_open_to_others_it_wants_a_key_first_and_then_tls(farm: Place) -> None:
    ended = farm("up", "--host", "0.0.0.0")
    assert ended.code == 2
    assert "would be reached at 0.0.0.0:8000 without a key by anybody; make one first: farm keys create" in ended.error
    farm("keys", "create")
    assert "without TLS, so that keys could be read on the way" in farm("up", "--host", "0.0.0.0").error


def test_a_port_that_cannot_be_is_refused(farm: Place) -> None:
    ended = farm("up", "--port", "70000")
    assert ended.code == 2
    assert "setting http_port: Input should be less than or equal to 65535" in ended.error


def test_ray_without_its_token_is_refused(farm: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    ended = farm("up")
    assert ended.code == 2
    assert "RAY_AUTH_MODE is 'disabled': Ray's ports would take anybody's commands" in ended.error


def test_a_second_one_is_told_of_the_first(farm: Place) -> None:
    note = note_file(load_settings())
    write_note(note, dataclasses.replace(own_whereabouts("up"), url="http://127.0.0.1:8000"))
    ended = farm("up")
    assert ended.code == 6
    assert f"runs already at http://127.0.0.1:8000 (process {os.getpid()}); farm down ends it" in ended.error


def test_down_ends_nothing_that_farm_render_started(farm: Place) -> None:
    write_note(note_file(load_settings()), own_whereabouts("render"))
    ended = farm("down")
    assert ended.code == 6
    assert f"that farm belongs to farm render (process {os.getpid()}) and ends with its job" in ended.error


def test_down_clears_away_what_a_killed_farm_left(farm: Place, tmp_path: Path) -> None:
    folder = tmp_path / "private"
    folder.mkdir()
    note = note_file(load_settings())
    write_note(note, dataclasses.replace(own_whereabouts("up", folder=str(folder)), started=1.0))
    ended = farm("down")
    assert ended.code == 0
    assert f"what one left that was killed (process {os.getpid()}) is cleared away" in ended.err
    assert not folder.exists()
    assert "nothing was to be done" in farm("down").err


def test_down_without_a_farm_is_done_at_once(farm: Place) -> None:
    ended = farm("down", "--json")
    assert ended.code == 0
    assert json.loads(ended.out)["url"] is None
