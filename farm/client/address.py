"""Where a farm is and with what key: checked before anything is sent, and how connections to it are made.

The key stands in one header and nowhere else: no error, log line or `repr` shows it. It leaves this machine encrypted only,
never goes to another address than the farm's, and connections to this machine itself pass every proxy by.
"""

import ipaddress
import os
import ssl
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import httpx2

from farm.errors import SettingsError
from farm.settings import load_settings

CONNECT_S = 10.0
HIDDEN = "[key]"


@dataclass(frozen=True, slots=True)
class Address:
    """A farm's endpoint. `url` ends without a slash; `key` is empty where none is needed."""

    url: str
    key: str = field(repr=False)
    loopback: bool

    @property
    def headers(self) -> dict[str, str]:
        """What every request to the farm carries."""
        return {"authorization": f"Bearer {self.key}"} if self.key else {}

    def at(self, path: str) -> str:
        """Return the URL of a path of the endpoint."""
        return f"{self.url}{path}"

    def hide(self, text: str) -> str:
        """Return the text without the key, should anybody have put it there."""
        return text.replace(self.key, HIDDEN) if self.key else text


def find_address(url: str | None, key: str | None) -> Address:
    """Return the address of `url` and `key`, or where they are None of the settings. Raises SettingsError."""
    settings = load_settings()
    if key is None and settings.key is not None:
        key = settings.key.get_secret_value()
    return checked(url if url is not None else settings.url, key)


def checked(url: str | None, key: str | None) -> Address:
    """Check an address and a key. Raises SettingsError, which shows no key and nothing in the URL that may be one."""
    if url is None or not url.strip():
        raise SettingsError("no farm's address is given; set FARM_URL, as http://127.0.0.1:8000, or give --url")
    url = url.strip()
    if "://" not in url:
        host = _host(f"http://{url}") or ""
        scheme = "http" if _loopback(host) else "https"
        raise SettingsError(f"address {_shown(url)} has no scheme; write {scheme}://{_shown(url)}")
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError as exc:
        raise SettingsError(f"address {_shown(url)} is no URL ({exc}); write it as https://farm.example:8000") from exc
    if parts.scheme not in ("http", "https") or not host or any(one.isspace() or not one.isprintable() for one in url):
        raise SettingsError(f"address {_shown(url)} is no http:// or https:// URL; write it as https://farm.example")
    if parts.query or parts.fragment or "@" in parts.netloc:
        raise SettingsError(
            f"address {_shown(url)} holds a user, a query or a fragment; give the address alone, and the key in FARM_KEY"
        )
    url = url.rstrip("/").removesuffix("/v1")
    address = Address(url, _clean(key), _loopback(host))
    if address.key and parts.scheme == "http" and not address.loopback:
        raise SettingsError(
            f"address {url} is not encrypted, so the key would be readable on its way; write https://, or reach the farm "
            "by a tunnel to this machine"
        )
    return address


def tls_of(address: Address, ca_file: Path | None) -> ssl.SSLContext | bool:
    """Return what certificates are checked by: `ca_file`, or SSL_CERT_FILE, or what this machine trusts.

    Raises SettingsError where such a file holds no certificates.
    """
    named = ca_file or os.environ.get("SSL_CERT_FILE")
    if not named or not address.url.startswith("https:"):
        return True
    try:
        return ssl.create_default_context(cafile=named)
    except (OSError, ssl.SSLError) as exc:
        raise SettingsError(
            f"{named} holds no certificates in PEM ({exc.strerror or exc}); name the file of the CA that signed "
            f"{address.url}'s"
        ) from exc


def timeouts(read_s: float) -> httpx2.Timeout:
    """Seconds that a request may take; waiting for an answer takes at most `read_s`."""
    return httpx2.Timeout(connect=CONNECT_S, read=read_s, write=60.0, pool=60.0)


def _clean(key: str | None) -> str:
    """The key without blanks around it, as a file's last line break leaves them."""
    cleaned = (key or "").strip()
    if any(not (one.isascii() and one.isprintable()) or one == " " for one in cleaned):
        raise SettingsError(
            f"the key ({len(cleaned)} characters) holds blanks, line breaks or signs that no key has; copy it again, "
            "as farm keys create showed it"
        )
    return cleaned


def _loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _host(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _shown(url: str) -> str:
    """The URL as far as it may be shown: before a query, without what stands in front of an @."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        scheme, rest = "", url
    rest = rest.partition("?")[0].partition("#")[0]
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"[:200]
