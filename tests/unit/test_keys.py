"""Keys of the endpoint: made, checked, revoked."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from farm.errors import RecordError, RequestError, UnauthorizedError
from farm.keys import Keys, NewKey, Scope, create_key, keyless, list_keys, revoke_key
from farm.portion import Allowance
from farm.storage.local import LocalStore

NOW = datetime(2026, 5, 4, 12, 0, tzinfo=UTC)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def made(store: LocalStore, *scopes: Scope, owner: str = "alice", days: float | None = None) -> NewKey:
    expires_at = NOW + timedelta(days=days) if days is not None else None
    return create_key(store, owner=owner, scopes=scopes or ("render",), at=NOW, expires_at=expires_at)


def test_a_new_key_is_let_in_under_its_owners_name(store: LocalStore) -> None:
    new = create_key(store, owner="alice", scopes=["render"], at=NOW, allowance=Allowance(images_per_day=9), note="ci")
    key = Keys(store).check(new.text, NOW)
    assert (key.owner, key.scopes, key.allowance.images_per_day, key.note) == ("alice", ("render",), 9, "ci")


def test_a_key_has_256_random_bits_and_its_secret_is_not_in_the_store(store: LocalStore) -> None:
    first, second = made(store), made(store)
    secret = first.text.rpartition("-")[2]
    assert len(bytes.fromhex(secret)) == 32
    assert secret != second.text.rpartition("-")[2]
    assert secret.encode() not in store.get(f"keys/{first.key.id}.json")
    assert first.key.secret_sha256 not in repr(first.key)


def test_two_keys_that_draw_one_id_get_two(store: LocalStore) -> None:
    drawn = iter(["aa" * 32, "0" * 12, "bb" * 32, "0" * 12, "1" * 12])
    made_keys = [
        create_key(store, owner="a", scopes=["read"], at=NOW, draw=lambda _: next(drawn)).key.id for _ in range(2)
    ]
    assert made_keys == ["0" * 12, "1" * 12]


@pytest.mark.parametrize(
    "text", ["", "sk-123", "farm-", "farm-0-0", f"farm-{'0' * 12}-{'0' * 63}", f"farm-../{'0' * 9}-{'0' * 64}"]
)
def test_a_text_of_another_form_is_refused_without_asking_the_store(store: LocalStore, text: str) -> None:
    assert Keys(store).is_fresh(text, NOW)
    with pytest.raises(UnauthorizedError, match="no key of a farm"):
        Keys(store).check(text, NOW)


def test_an_unknown_id_and_a_wrong_secret_are_told_the_same(store: LocalStore) -> None:
    new = made(store)
    said = []
    for text in (f"farm-{'0' * 12}-{'0' * 64}", f"farm-{new.key.id}-{'0' * 64}"):
        with pytest.raises(UnauthorizedError) as refused:
            Keys(store).check(text, NOW)
        said.append(refused.value.message)
    assert said[0] == said[1] == "this key is not known here; ask an administrator for one, or check FARM_KEY"


def test_a_revoked_key_is_let_in_no_more_after_the_cache_has_aged(store: LocalStore) -> None:
    new, keys = made(store), Keys(store)
    keys.check(new.text, NOW)
    revoke_key(store, new.key.id, at=NOW)
    keys.check(new.text, NOW + timedelta(seconds=4.9))
    with pytest.raises(UnauthorizedError, match=f"key {new.key.id} was revoked at 2026-05-04T12:00:00"):
        keys.check(new.text, NOW + timedelta(seconds=5))


def test_a_clock_set_back_keeps_no_key_longer(store: LocalStore) -> None:
    new, keys = made(store), Keys(store)
    keys.check(new.text, NOW)
    revoke_key(store, new.key.id, at=NOW)
    with pytest.raises(UnauthorizedError, match="was revoked"):
        keys.check(new.text, NOW - timedelta(hours=1))


def test_a_key_expires_at_its_moment_though_it_is_cached(store: LocalStore) -> None:
    new, keys = made(store, days=1), Keys(store)
    keys.check(new.text, NOW + timedelta(days=1, seconds=-1))
    with pytest.raises(UnauthorizedError, match="expired at 2026-05-05T12:00:00"):
        keys.check(new.text, NOW + timedelta(days=1))


def test_how_a_key_stands_is_not_told_to_who_guesses_its_secret(store: LocalStore) -> None:
    new = made(store)
    revoke_key(store, new.key.id, at=NOW)
    with pytest.raises(UnauthorizedError, match="not known here"):
        Keys(store).check(f"farm-{new.key.id}-{'f' * 64}", NOW)


def test_guesses_fill_no_memory(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farm.keys.CACHED", 3)
    keys = Keys(store)
    for number in range(9):
        with pytest.raises(UnauthorizedError):
            keys.check(f"farm-{number:012x}-{'0' * 64}", NOW)
    assert [keys.is_fresh(f"farm-{number:012x}-{'0' * 64}", NOW) for number in range(9)] == [False] * 6 + [True] * 3


@pytest.mark.parametrize(
    ("scopes", "may"),
    [(("read",), (True, False, False)), (("render",), (True, True, False)), (("admin", "read"), (True, True, True))],
)
def test_a_scope_has_the_lesser_ones_in_itself(
    store: LocalStore, scopes: tuple[Scope, ...], may: tuple[bool, bool, bool]
) -> None:
    key = made(store, *scopes).key
    assert (key.may("read"), key.may("render"), key.may("admin")) == may


def test_revoking_twice_keeps_the_first_moment(store: LocalStore) -> None:
    new = made(store)
    revoke_key(store, new.key.id, at=NOW)
    again = revoke_key(store, new.key.id, at=NOW + timedelta(days=1))
    assert again.revoked_at == "2026-05-04T12:00:00+00:00"
    assert [key.state(NOW) for key in list_keys(store)] == ["revoked"]


def test_an_id_that_no_key_has_cannot_be_revoked(store: LocalStore) -> None:
    with pytest.raises(RequestError, match="no key has the id 000000000000; farm keys list shows them"):
        revoke_key(store, "0" * 12, at=NOW)


def test_a_whole_key_given_for_an_id_is_not_repeated(store: LocalStore) -> None:
    new = made(store)
    with pytest.raises(RequestError) as refused:
        revoke_key(store, new.text, at=NOW)
    assert new.text.rpartition("-")[2] not in refused.value.message


def test_values_that_cannot_be_are_refused(store: LocalStore) -> None:
    with pytest.raises(RequestError, match="owner: String should have at least 1 character"):
        create_key(store, owner="", scopes=["read"], at=NOW)
    with pytest.raises(RequestError, match="a limit must be 1 or more"):
        create_key(store, owner="a", scopes=["read"], at=NOW, allowance=Allowance(images_per_day=0))
    with pytest.raises(RequestError, match="would have expired"):
        create_key(store, owner="a", scopes=["read"], at=NOW, expires_at=NOW)
    assert list(list_keys(store)) == []


def test_a_damaged_record_is_an_error_of_the_store_not_an_unknown_key(store: LocalStore) -> None:
    new = made(store)
    store.put(f"keys/{new.key.id}.json", b"{}")
    with pytest.raises(RecordError, match="is damaged"):
        Keys(store).check(new.text, NOW)


def test_a_record_under_another_id_lets_nobody_in(store: LocalStore) -> None:
    new = made(store)
    store.put(f"keys/{'0' * 12}.json", store.get(f"keys/{new.key.id}.json"))
    with pytest.raises(RecordError, match="the record of another key"):
        Keys(store).check(new.text.replace(new.key.id, "0" * 12), NOW)


def test_who_needs_no_key_is_an_administrator_whom_no_text_names() -> None:
    key = keyless("bob")
    assert (key.owner, key.id, key.may("admin")) == ("bob", "", True)
