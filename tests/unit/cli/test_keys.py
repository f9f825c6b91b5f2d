"""`farm keys` as a person types it."""

import json
from datetime import UTC, datetime

from farm.keys import Keys
from farm.storage.local import LocalStore
from tests.unit.cli.conftest import Place


def test_a_key_is_shown_once_and_works(farm: Place) -> None:
    ended = farm("keys", "create", "--owner", "alice", "--note", "ci")
    text = ended.out.strip()
    key = Keys(LocalStore(farm.store)).check(text, datetime.now(UTC))
    assert (key.owner, key.scopes, key.note) == ("alice", ("render",), "ci")
    assert f"key {key.id} of alice may render; it is shown this once" in ended.err
    assert text not in farm("keys", "list").out + farm("keys", "list", "--json").out


def test_limits_scopes_and_an_end_are_kept(farm: Place) -> None:
    limits = ("--images-per-minute", "6", "--images-at-once", "2", "--images-per-day", "100")
    made = json.loads(
        farm("keys", "create", "--scope", "admin", "--scope", "read", "--days", "1", *limits, "--json").out
    )
    assert made["scopes"] == ["read", "admin"]
    assert made["allowance"] == {"images_per_minute": 6, "images_at_once": 2, "images_per_day": 100}
    left = datetime.fromisoformat(made["expires_at"]) - datetime.fromisoformat(made["created_at"])
    assert left.total_seconds() == 86_400
    assert "secret_sha256" not in made


def test_a_revoked_key_stays_in_the_list(farm: Place) -> None:
    key = json.loads(farm("keys", "create", "--owner", "bob", "--json").out)["id"]
    assert f"key {key} of bob is revoked; a farm that runs feels it within 5 s" in farm("keys", "revoke", key).err
    (listed,) = json.loads(farm("keys", "list", "--json").out)["keys"]
    assert (listed["id"], listed["state"]) == (key, "revoked")
    assert farm("keys", "list").out.splitlines()[-1].split()[:4] == [key, "bob", "render", "revoked"]


def test_what_cannot_be_is_refused(farm: Place) -> None:
    ended = farm("keys", "create", "--scope", "write")
    assert (ended.code, ended.error) == (2, "no scope is called 'write'; there are read, render, admin")
    assert farm("keys", "revoke", "0" * 12).error == "no key has the id 000000000000; farm keys list shows them"
    assert farm("keys", "create", "--images-per-day", "0").code == 2
    assert farm("keys", "list").err == "there are no keys; farm keys create makes one\n"
