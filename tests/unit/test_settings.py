"""Owner and shares, from variables and farm.toml."""

from pathlib import Path

import pytest

from farm.errors import SettingsError
from farm.settings import load_settings


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_shares_come_from_a_variable_or_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "farm.toml").write_text('owner = "alice"\n[shares]\nalice = 2\nbob = 0.5\n')
    read = load_settings()
    assert (read.owner, read.shares) == ("alice", {"alice": 2.0, "bob": 0.5})
    monkeypatch.setenv("FARM_OWNER", "bob")
    monkeypatch.setenv("FARM_SHARES", '{"bob": 3}')
    read = load_settings()
    assert (read.owner, read.shares["bob"]) == ("bob", 3.0)
    assert load_settings(owner="eve").owner == "eve"


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        (
            "FARM_SHARES",
            "alice=2",
            """variable FARM_SHARES is no JSON, got 'alice=2'; write it as '{"alice": 2, "bob": 1}'""",
        ),
        (
            "FARM_SHARES",
            '{"alice": 0}',
            "setting shares.alice: Input should be greater than 0, got 0; mend FARM_SHARES,",
        ),
        ("FARM_SHARES", "[1]", "setting shares: Input should be a valid dictionary, got [1]; mend FARM_SHARES,"),
        (
            "FARM_REMOTE_CODE",
            "{}",
            "setting remote_code: Input should be a valid tuple, got {}; mend FARM_REMOTE_CODE,",
        ),
        (
            "FARM_REMOTE_CODE",
            "abc",
            """variable FARM_REMOTE_CODE is no JSON, got 'abc'; write it as '["4f5c..."]'""",
        ),
        (
            "FARM_REMOTE_CODE",
            '["abc"]',
            "setting remote_code.0: String should match pattern '^[0-9a-f]{64}$', got 'abc'; mend FARM_REMOTE_CODE,",
        ),
        ("FARM_OWNER", "", "setting owner: String should have at least 1 character, got ''; mend FARM_OWNER,"),
    ],
)
def test_what_cannot_be_is_named(monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError) as caught:
        load_settings()
    assert caught.value.message.startswith(message)
