"""What must be in place before the endpoint listens."""

from pathlib import Path

import pytest

from farm.errors import SettingsError
from farm.exposure import endpoint_url, is_loopback, needs_no_key, proxy_network, refuse_exposure
from farm.settings import Settings

CERT = {"tls_cert": Path("cert.pem"), "tls_key": Path("key.pem")}


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "[::1]", "localhost", "LOCALHOST."])
def test_this_machine_by_itself_is_loopback(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "localhost.example.org", "farm.example.org", ""])
def test_every_other_name_is_not(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize(
    ("given", "free"),
    [
        ({}, True),
        ({"public_url": "http://localhost:9000"}, True),
        ({"http_host": "0.0.0.0"}, False),
        ({"tls_proxy": "127.0.0.1"}, False),
        ({"public_url": "https://farm.example.org"}, False),
    ],
)
def test_no_key_is_needed_where_nobody_else_can_come_in(given: dict[str, object], free: bool) -> None:
    assert needs_no_key(Settings(**given)) is free


def test_on_loopback_nothing_is_asked_for() -> None:
    refuse_exposure(Settings(), has_keys=False)


@pytest.mark.parametrize(
    "given", [{"http_host": "0.0.0.0", **CERT}, {"public_url": "https://farm.example.org", "tls_proxy": "127.0.0.1"}]
)
def test_seen_from_elsewhere_it_needs_a_key(given: dict[str, object]) -> None:
    with pytest.raises(SettingsError, match="without a key by anybody; make one first: farm keys create"):
        refuse_exposure(Settings(**given), has_keys=False)
    refuse_exposure(Settings(**given), has_keys=True)


@pytest.mark.parametrize("given", [{"http_host": "10.0.0.1"}, {"public_url": "https://farm.example.org"}])
def test_seen_from_elsewhere_it_needs_tls_of_its_own_or_of_a_named_proxy(given: dict[str, object]) -> None:
    with pytest.raises(SettingsError, match="without TLS, so that keys could be read on the way"):
        refuse_exposure(Settings(**given), has_keys=True)
    refuse_exposure(Settings(**given, **CERT), has_keys=True)
    refuse_exposure(Settings(**given, tls_proxy="10.0.0.0/24"), has_keys=True)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tls_cert": Path("cert.pem")}, "tls_cert is set and tls_key is not"),
        ({"tls_key": Path("key.pem")}, "tls_key is set and tls_cert is not"),
        ({**CERT, "tls_proxy": "10.0.0.5"}, "tls_cert and tls_proxy are both set"),
        ({"tls_proxy": "nginx"}, "must be an address or a network such as 10.0.0.5"),
        ({"tls_proxy": "0.0.0.0/0"}, "is everybody; name the proxy's own address"),
        ({"public_url": "farm.example.org"}, "public_url must be scheme and host"),
        ({"public_url": "https://farm.example.org/farm"}, "public_url must be scheme and host"),
        ({"public_url": "https://[::1"}, "public_url must be scheme and host"),
        ({"public_url": "http://farm.example.org"}, "is no https, so that keys could be read"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        refuse_exposure(Settings(**given), has_keys=True)


def test_a_proxys_address_is_a_network_of_one() -> None:
    assert (proxy_network("10.0.0.5"), proxy_network("10.0.0.5/24")) == ("10.0.0.5/32", "10.0.0.0/24")


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ({}, "http://127.0.0.1:8000"),
        ({"http_host": "0.0.0.0", **CERT}, "https://127.0.0.1:8000"),
        ({"http_host": "::", "http_port": 9}, "http://[::1]:9"),
        ({"public_url": "https://farm.example.org/"}, "https://farm.example.org"),
    ],
)
def test_people_are_told_an_address_that_works(given: dict[str, object], url: str) -> None:
    assert endpoint_url(Settings(**given)) == url
