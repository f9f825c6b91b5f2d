"""What farm doctor says of the endpoint and of Ray's token; the other checks look at the machine itself."""

import dataclasses
from datetime import UTC, datetime
from pathlib import Path

import pytest

from farm.doctor import Check, examine
from farm.keys import create_key
from farm.settings import Settings
from farm.storage.local import LocalStore
from farm.whereabouts import note_file, own_whereabouts, write_note


def checks(tmp_path: Path, name: str, **given: object) -> list[Check]:
    settings = Settings(store=str(tmp_path / "store"), runtime_dir=tmp_path / "runtime", http_port=0, **given)
    return [check for check in examine(settings, render=False) if check.name == name]


def test_an_endpoint_of_this_machine_alone_is_sound(tmp_path: Path) -> None:
    (found,) = checks(tmp_path, "endpoint")
    assert (found.status, found.found) == (
        "ok",
        "http://127.0.0.1:0 is for users of this machine alone, who need no key",
    )


def test_an_endpoint_open_to_others_without_a_key_is_a_fault(tmp_path: Path) -> None:
    (found,) = checks(tmp_path, "endpoint", http_host="0.0.0.0")
    assert found.status == "fail"
    assert "make one first: farm keys create" in found.found


def test_keys_are_counted_by_how_they_stand(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "store")
    create_key(store, owner="a", scopes=["read"], at=datetime.now(UTC))
    old = datetime(2020, 1, 1, tzinfo=UTC)
    create_key(store, owner="a", scopes=["read"], at=old, expires_at=old.replace(year=2021))
    (found,) = checks(tmp_path, "endpoint", http_host="0.0.0.0", tls_proxy="10.0.0.5")
    assert found.status == "ok"
    assert found.found.endswith("TLS by the proxy 10.0.0.5; keys: 1 valid, 1 expired")


def test_a_farm_that_is_up_is_told(tmp_path: Path) -> None:
    settings = Settings(store=str(tmp_path / "store"), runtime_dir=tmp_path / "runtime")
    write_note(note_file(settings), dataclasses.replace(own_whereabouts("up"), url="http://127.0.0.1:8000"))
    assert checks(tmp_path, "endpoint")[-1].found == "the farm is up at http://127.0.0.1:8000"


def test_ray_without_its_token_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    last = checks(tmp_path, "ray")[-1]
    assert (last.status, last.next_step) == ("fail", "leave RAY_AUTH_MODE out, so that Ray asks for its token")


def test_a_card_that_is_wrong_is_a_fault_and_the_others_are_told(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("name: bad\nfamily: none\n")
    found = checks(tmp_path, "models", models=tmp_path)
    faults = [check for check in found if check.status == "fail"]
    assert [check.next_step for check in faults] == ["mend the card"]
    assert f"{tmp_path / 'bad.yaml'}:2" in faults[0].found
    assert any(check.found.startswith("sketch: ") for check in found)
