"""When a call is made again, and what a call that is not comes to."""

import json
import ssl

import httpx2
import pytest

from farm.client.address import Address, checked
from farm.client.attempts import Attempts, error_of_answer, retry_after, unanswered
from farm.errors import (
    BusyError,
    FarmUnavailableError,
    ForbiddenError,
    LimitedError,
    RendererDiedError,
    RequestError,
    UnauthorizedError,
    UnknownJobError,
)

KEY = "farm-0123456789ab-" + "c" * 64
ADDRESS = checked("https://farm.example", KEY)


def answer(status: int, code: str | None = None, message: str = "no", **headers: str) -> httpx2.Response:
    body = {"error": {"message": message, "type": "x", "param": None, "code": code}}
    return httpx2.Response(status, content=json.dumps(body).encode(), headers=headers)


def attempts(*, repeatable: bool = True, patience_s: float = 60.0) -> Attempts:
    return Attempts(ADDRESS, repeatable=repeatable, patience_s=patience_s, now=0.0)


def test_a_good_answer_is_taken() -> None:
    assert attempts().answered(httpx2.Response(201), now=0.0, chance=0.5) is None


def test_a_farm_that_refuses_for_now_is_asked_again_when_it_says() -> None:
    trying = attempts(repeatable=False)
    assert trying.answered(answer(503, "busy", **{"retry-after": "7"}), now=0.0, chance=0.5) == 7.0
    assert trying.answered(answer(429, "limited", **{"retry-after": "20"}), now=8.0, chance=0.5) == 20.0


def test_longer_than_its_patience_nobody_waits_and_the_error_says_how_long() -> None:
    with pytest.raises(LimitedError, match="the day's images are used up") as caught:
        attempts().answered(
            answer(429, "limited", "the day's images are used up", **{"retry-after": "3600"}), now=0.0, chance=0.5
        )
    assert caught.value.retry_after_s == 3600.0
    with pytest.raises(BusyError):
        attempts().answered(answer(503, "busy", **{"retry-after": "7"}), now=55.0, chance=0.5)


def test_pauses_double_up_to_eight_seconds() -> None:
    trying = attempts(patience_s=1e9)
    pauses = [trying.answered(answer(503, "busy"), now=0.0, chance=1.0) for _ in range(8)]
    assert pauses == [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0]


def test_what_killed_renderers_is_not_given_to_more_of_them() -> None:
    with pytest.raises(RendererDiedError, match="died three times"):
        attempts().answered(answer(503, "renderer_died", "died three times"), now=0.0, chance=0.5)


def test_a_proxy_without_its_farm_is_asked_again_for_calls_that_may_be_repeated() -> None:
    gone = httpx2.Response(502, content=b"<html>Bad Gateway</html>")
    assert attempts().answered(gone, now=0.0, chance=1.0) == 0.25
    with pytest.raises(
        FarmUnavailableError, match=r"https://farm\.example answered 502 Bad Gateway and is no farm's endpoint"
    ):
        attempts(repeatable=False).answered(gone, now=0.0, chance=1.0)


def test_a_farm_that_nobody_listens_for_is_tried_for_two_seconds() -> None:
    trying, refused = attempts(repeatable=False), httpx2.ConnectError("[Errno 111] Connection refused")
    assert trying.failed(refused, now=0.0, chance=1.0) == 0.25
    with pytest.raises(FarmUnavailableError) as caught:
        trying.failed(refused, now=2.0, chance=1.0)
    assert caught.value.message == (
        "no farm answers at https://farm.example ([Errno 111] Connection refused); is it up (farm up), and is FARM_URL right?"
    )


def test_a_call_that_broke_off_is_made_again_only_where_that_changes_nothing() -> None:
    broken = httpx2.ReadError("connection reset")
    assert attempts().failed(broken, now=0.0, chance=1.0) == 0.25
    with pytest.raises(FarmUnavailableError, match="what was asked may have been done all the same"):
        attempts(repeatable=False).failed(broken, now=0.0, chance=1.0)


def test_a_farm_that_speaks_tls_alone_is_guessed_at() -> None:
    broken = httpx2.RemoteProtocolError("Server disconnected without sending a response.")
    found = unanswered(broken, Address("http://farm.example", "", False), may_have_happened=False)
    assert found.message.endswith("a response.; if it speaks TLS, write https://)")
    found = unanswered(broken, Address("https://farm.example", "", False), may_have_happened=False)
    assert "write https" not in found.message


def test_an_untrusted_certificate_is_said_at_once_with_what_to_do() -> None:
    failed = httpx2.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED]")
    cause = ssl.SSLCertVerificationError(1, "certificate verify failed: self-signed certificate")
    cause.verify_message = "self-signed certificate"
    failed.__cause__ = cause
    with pytest.raises(FarmUnavailableError) as caught:
        attempts().failed(failed, now=0.0, chance=0.5)
    assert caught.value.message == (
        "the certificate of https://farm.example is not trusted: self-signed certificate; name its CA's PEM file in "
        "SSL_CERT_FILE"
    )


def test_errors_come_out_as_the_farm_raised_them() -> None:
    found = error_of_answer(answer(404, "unknown_job", "no job named shapes"), ADDRESS)
    assert isinstance(found, UnknownJobError)
    assert found.message == "no job named shapes"
    assert isinstance(error_of_answer(answer(401, "unauthorized"), ADDRESS), UnauthorizedError)
    assert isinstance(error_of_answer(answer(403, "host"), ADDRESS), ForbiddenError)
    assert isinstance(error_of_answer(answer(413, "too_large"), ADDRESS), RequestError)
    assert isinstance(error_of_answer(answer(500, "internal"), ADDRESS), FarmUnavailableError)


def test_an_answer_that_repeats_the_key_shows_it_to_nobody() -> None:
    assert (
        error_of_answer(answer(401, "unauthorized", f"key {KEY} is revoked"), ADDRESS).message == "key [key] is revoked"
    )


def test_a_farm_that_sends_elsewhere_is_not_followed() -> None:
    moved = httpx2.Response(308, headers={"location": "https://other.example/v1/jobs"})
    with pytest.raises(
        FarmUnavailableError, match=r"sends on to https://other\.example/v1/jobs; give the address that it leads to"
    ):
        attempts().answered(moved, now=0.0, chance=0.5)


@pytest.mark.parametrize(
    ("said", "seconds"), [("5", 5.0), ("", None), ("-1", None), ("1e9", None), ("Wed, 21 Oct", None)]
)
def test_only_whole_seconds_are_waited_for(said: str, seconds: float | None) -> None:
    assert retry_after(httpx2.Response(503, headers={"retry-after": said})) == seconds
