"""What of the S3 store needs no server: links, prefixes, and that it makes no connection before it must."""

import pickle
from urllib.parse import parse_qs, urlsplit

import pytest
from botocore.exceptions import ConnectTimeoutError, EndpointConnectionError, ReadTimeoutError, ResponseStreamingError

from farm.errors import StoreDeniedError, StoreError, StoreUnavailableError
from farm.settings import Settings
from farm.storage import s3
from farm.storage.base import ObjectStore
from farm.storage.opening import open_store
from farm.storage.s3 import S3Store


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


class Body:
    """An answer's body; breaks off where it has no data."""

    def __init__(self, data: bytes | None):
        self.data = data

    def read(self) -> bytes:
        if self.data is None:
            raise ResponseStreamingError(error="connection broken")
        return self.data


def answering(monkeypatch: pytest.MonkeyPatch, *answers: Body | Exception, clock: list[float] | None = None) -> S3Store:
    """A store whose server gives these answers to `get`, each once; `clock` is what the time is at each look."""
    ticks = iter(clock or [0.0] * 20)
    store = S3Store("pictures", clock=lambda: next(ticks))
    left = list(answers)

    class Client:
        def get_object(self, **_: str) -> dict[str, Body]:
            answer = left.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return {"Body": answer}

    monkeypatch.setattr(store, "_client", Client)
    monkeypatch.setattr(s3, "_wait", lambda attempt: None)
    store.left = left
    return store


def test_a_body_that_breaks_off_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert answering(monkeypatch, Body(None), Body(None), Body(b"whole")).get("k") == b"whole"


@pytest.mark.parametrize(
    "error",
    [
        ReadTimeoutError(endpoint_url="http://h:9000"),
        EndpointConnectionError(endpoint_url="http://h:9000"),
        ConnectTimeoutError(endpoint_url="http://h:9000"),
    ],
)
def test_what_boto3_has_tried_often_enough_is_not_tried_on_top(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    store = answering(monkeypatch, error, Body(b"too late"))
    with pytest.raises(StoreUnavailableError, match="see that the server runs"):
        store.get("k")
    assert len(store.left) == 1


def test_bodies_that_always_break_off_end_in_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    store = answering(monkeypatch, *[Body(None)] * 9)
    with pytest.raises(StoreUnavailableError, match="connection broken"):
        store.get("k")
    assert len(store.left) == 4
    slow = answering(monkeypatch, *[Body(None)] * 9, clock=[0.0, 30.0, 61.0])
    with pytest.raises(StoreUnavailableError, match="connection broken"):
        slow.get("k")
    assert len(slow.left) == 7


def test_a_silent_server_counts_as_unavailable_after_about_two_minutes() -> None:
    config = S3Store("pictures", endpoint="http://h:9000")._client().meta.config
    assert config.retries["total_max_attempts"] * (config.connect_timeout + config.read_timeout) == 125
