"""The note by which commands find a farm on this machine."""

import dataclasses
import os
from pathlib import Path

import pytest

from farm.errors import FarmUnavailableError
from farm.settings import Settings
from farm.whereabouts import clear_away, living, note_file, own_whereabouts, read_note, refuse_second, write_note


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(store=str(tmp_path / "store"), runtime_dir=tmp_path / "runtime")


def test_a_note_is_read_as_it_was_written_while_its_writer_lives(settings: Settings) -> None:
    note = note_file(settings)
    ours = dataclasses.replace(own_whereabouts("up", address="127.0.0.2:1"), url="http://127.0.0.1:8000")
    write_note(note, ours)
    assert living(note) == read_note(note) == ours


@pytest.mark.parametrize("change", [{"pid": 2**22 + 1}, {"started": 1.0}])
def test_a_note_of_a_process_that_has_gone_does_not_count(settings: Settings, change: dict[str, float]) -> None:
    note = note_file(settings)
    write_note(note, dataclasses.replace(own_whereabouts("up"), **change))
    assert living(note) is None
    assert read_note(note) is not None
    refuse_second(settings)


def test_what_a_killed_farm_left_is_cleared_away_and_nothing_else(settings: Settings, tmp_path: Path) -> None:
    note, folder = note_file(settings), tmp_path / "private"
    folder.mkdir()
    (folder / "endpoint.pem").write_text("key")
    ours = own_whereabouts("up", folder=str(folder))
    assert clear_away(note) is None
    write_note(note, ours)
    assert clear_away(note) is None
    assert folder.exists()
    killed = dataclasses.replace(ours, started=1.0)
    write_note(note, killed)
    assert clear_away(note) == killed
    assert not folder.exists()
    assert not note.exists()


@pytest.mark.parametrize("text", ["", "{}", "[1]", "null", '{"pid": "1", "started": 1}', '{"pid": 1, "started": "x"}'])
def test_a_note_that_cannot_be_read_is_none(settings: Settings, text: str) -> None:
    note = note_file(settings)
    note.write_text(text)
    assert read_note(note) is None


def test_what_a_later_version_adds_is_passed_over(settings: Settings) -> None:
    note = note_file(settings)
    note.write_text('{"address": "a", "pid": 1, "started": 1.5, "later": true}')
    found = read_note(note)
    assert found is not None
    assert (found.address, found.command) == ("a", "render")


def test_one_store_has_one_note_by_whatever_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stores = ("./a", str(tmp_path / "a"), "b", "s3://bucket/a")
    notes = [note_file(Settings(store=store, runtime_dir=tmp_path / "runtime")) for store in stores]
    assert notes[0] == notes[1]
    assert len(set(notes)) == 3


def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    os.chmod(open_to_all, 0o777)
    with pytest.raises(FarmUnavailableError, match="is open to other users, who could mislead this farm"):
        note_file(Settings(runtime_dir=open_to_all))


def test_a_second_farm_on_a_store_is_told_of_the_first(settings: Settings) -> None:
    note = note_file(settings)
    write_note(note, dataclasses.replace(own_whereabouts("up"), url="http://127.0.0.1:8000"))
    with pytest.raises(FarmUnavailableError, match=rf"runs already at http://127.0.0.1:8000 \(process {os.getpid()}\)"):
        refuse_second(settings)
    write_note(note, own_whereabouts("render"))
    with pytest.raises(FarmUnavailableError, match=r"farm render \(process \d+\) runs a farm"):
        refuse_second(settings)
