"""An address and a key are checked before anything is sent, and the key shows nowhere."""

from pathlib import Path

import pytest

from farm.client.address import checked, find_address, tls_of
from farm.errors import SettingsError

KEY = "farm-0123456789ab-" + "c" * 64


def test_an_address_is_kept_without_what_stands_behind_it() -> None:
    assert checked(" https://farm.example:8443/ ", KEY).url == "https://farm.example:8443"
    assert checked("http://127.0.0.1:8000/v1", "").url == "http://127.0.0.1:8000"
    assert checked("https://proxy.example/farm/", KEY).at("/v1/jobs") == "https://proxy.example/farm/v1/jobs"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (None, "no farm's address is given; set FARM_URL, as http://127.0.0.1:8000, or give --url"),
        ("  ", "no farm's address is given; set FARM_URL, as http://127.0.0.1:8000, or give --url"),
        ("localhost:8000", "address localhost:8000 has no scheme; write http://localhost:8000"),
        ("farm.example", "address farm.example has no scheme; write https://farm.example"),
        (
            "ftp://farm.example",
            "address ftp://farm.example is no http:// or https:// URL; write it as https://farm.example",
        ),
        ("http://", "address http:// is no http:// or https:// URL; write it as https://farm.example"),
    ],
)
def test_what_is_no_address_is_refused_with_what_to_write(url: str | None, message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        checked(url, None)
    assert caught.value.message == message


def test_a_port_that_cannot_be_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"address http://127\.0\.0\.1:99999 is no URL"):
        checked("http://127.0.0.1:99999", None)


@pytest.mark.parametrize(
    "url",
    [
        f"https://{KEY}@farm.example",
        f"https://me:{KEY}@farm.example",
        f"https://farm.example/?key={KEY}",
        f"me:{KEY}@x",
    ],
)
def test_a_key_in_an_address_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(SettingsError) as caught:
        checked(url, None)
    assert KEY not in str(caught.value)


def test_a_key_leaves_this_machine_encrypted_only() -> None:
    with pytest.raises(
        SettingsError, match=r"address http://10\.1\.2\.3:8000 is not encrypted, so the key would be readable"
    ):
        checked("http://10.1.2.3:8000", KEY)
    assert checked("http://10.1.2.3:8000", None).headers == {}
    assert checked("http://localhost:8000", KEY).headers == {"authorization": f"Bearer {KEY}"}
    assert checked("http://[::1]:8000", KEY).loopback


def test_a_line_break_behind_a_key_is_cut_off_and_one_inside_is_refused() -> None:
    assert checked("https://farm.example", f"{KEY}\n").key == KEY
    with pytest.raises(SettingsError) as caught:
        checked("https://farm.example", f"{KEY}\nHost: elsewhere")
    assert caught.value.message == (
        f"the key ({len(KEY) + 16} characters) holds blanks, line breaks or signs that no key has; copy it again, as farm keys "
        "create showed it"
    )


def test_the_key_is_in_no_repr_and_is_taken_out_of_texts() -> None:
    address = checked("https://farm.example", KEY)
    assert KEY not in repr(address)
    assert address.hide(f"no such key {KEY}!") == "no such key [key]!"


def test_settings_say_where_the_farm_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FARM_URL", "https://farm.example")
    monkeypatch.setenv("FARM_KEY", KEY)
    assert (find_address(None, None).url, find_address(None, None).key) == ("https://farm.example", KEY)
    assert find_address("http://127.0.0.1:1", "other").key == "other"


def test_a_file_that_holds_no_certificates_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = tmp_path / "ca.pem"
    wrong.write_text("no certificate")
    secure, local = checked("https://farm.example", None), checked("http://127.0.0.1:8000", None)
    for named in (wrong, tmp_path / "missing.pem"):
        with pytest.raises(SettingsError, match=f"{named} holds no certificates in PEM"):
            tls_of(secure, named)
    monkeypatch.setenv("SSL_CERT_FILE", str(wrong))
    with pytest.raises(SettingsError, match="holds no certificates in PEM"):
        tls_of(secure, None)
    assert tls_of(local, None) is True
