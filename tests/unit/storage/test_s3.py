"""What of the S3 store needs no server: links, prefixes, and that it makes no connection before it must."""

import pickle
from urllib.parse import parse_qs, urlsplit

import pytest

from farm.errors import StoreDeniedError, StoreError
from farm.settings import Settings
from farm.storage.base import ObjectStore
from farm.storage.opening import open_store


@pytest.fixture(autouse=True)
def _keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "some-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "some-secret")


def bucket(**settings: str) -> ObjectStore:
    return open_store("s3://pictures/farm", Settings.model_validate(settings))


@pytest.mark.parametrize(
    ("settings", "link"),
    [
        ({"s3_addressing": "path", "s3_endpoint": "http://h:9000"}, "http://h:9000/pictures/farm/a%20b.png"),
        ({"s3_addressing": "virtual", "s3_endpoint": "http://h:9000"}, "http://pictures.h:9000/farm/a%20b.png"),
        (
            {"s3_addressing": "path", "s3_endpoint": "http://h:9000", "s3_public_endpoint": "https://cdn.example"},
            "https://cdn.example/pictures/farm/a%20b.png",
        ),
        ({}, "https://pictures.s3.amazonaws.com/farm/a%20b.png"),
        ({"s3_region": "eu-central-1"}, "https://pictures.s3.eu-central-1.amazonaws.com/farm/a%20b.png"),
    ],
)
def test_links_follow_endpoint_and_addressing(settings: dict[str, str], link: str) -> None:
    url = bucket(**settings).presign("a b.png", 90)
    assert url is not None
    assert url.partition("?")[0] == link
    query = parse_qs(urlsplit(url).query)
    assert query["X-Amz-Expires"] == ["90"]
    assert query["X-Amz-Algorithm"] == ["AWS4-HMAC-SHA256"]


def test_a_link_is_signed_for_the_region() -> None:
    url = bucket(s3_region="eu-central-1").presign("k", 60)
    assert url is not None
    assert "%2Feu-central-1%2Fs3%2Faws4_request" in url


def test_half_a_pair_of_keys_is_denied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StoreDeniedError, match=r"set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"):
        bucket().presign("k", 60)


def test_an_unknown_profile_is_denied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StoreDeniedError, match=r"nobody.*or AWS_PROFILE"):
        bucket().put("k", b"")


def test_a_key_that_is_too_long_with_its_prefix_is_refused() -> None:
    key = "/".join(["x" * 203] * 5)
    assert len(key) == 1019
    with pytest.raises(StoreError, match=r"is 1025 bytes long, the limit is 1024"):
        bucket().put(f"{key}y", b"")


def test_a_copy_has_no_client_of_the_first() -> None:
    store = bucket(s3_endpoint="http://h:9000", s3_addressing="path")
    store.presign("k", 60)
    copy = pickle.loads(pickle.dumps(store))
    assert vars(copy)["_clients"] == {}
    link, again = copy.presign("k", 60), store.presign("k", 60)
    assert link is not None
    assert again is not None
    assert link.partition("?")[0] == again.partition("?")[0]
