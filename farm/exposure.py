"""Who can reach the endpoint, and what must be in place before it listens.

Reads no store and keeps no port. Without keys the endpoint is this machine's own; with them it may be seen from
elsewhere, over TLS.
"""

import socket
import ssl
from ipaddress import ip_address, ip_network
from urllib.parse import urlsplit

from farm.errors import FarmUnavailableError, SettingsError
from farm.settings import Settings


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine by itself."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower().rstrip(".") == "localhost"


def needs_no_key(settings: Settings) -> bool:
    """Whether only this machine's own users can reach the endpoint: it listens on loopback, and nothing stands in front."""
    public = urlsplit(settings.public_url).hostname if settings.public_url else None
    return is_loopback(settings.http_host) and settings.tls_proxy is None and (public is None or is_loopback(public))


def endpoint_url(settings: Settings) -> str:
    """Return where people reach the endpoint: the public URL, else what it listens on."""
    if settings.public_url:
        return settings.public_url.rstrip("/")
    host = settings.http_host.strip("[]")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    shown = f"[{host}]" if ":" in host else host
    return f"{'https' if settings.tls_cert else 'http'}://{shown}:{settings.http_port}"


def refuse_exposure(settings: Settings, *, has_keys: bool) -> None:
    """Raise SettingsError where the endpoint would be open to who should not reach it, or could be listened to.

    `has_keys`: whether the store holds a key.
    """
    if (settings.tls_cert is None) != (settings.tls_key is None):
        given, lacks = ("tls_cert", "tls_key") if settings.tls_cert else ("tls_key", "tls_cert")
        raise SettingsError(f"{given} is set and {lacks} is not; set FARM_{lacks.upper()} too, or neither")
    if settings.tls_cert and settings.tls_proxy:
        raise SettingsError(
            "tls_cert and tls_proxy are both set; leave FARM_TLS_PROXY out where the endpoint speaks TLS itself"
        )
    if settings.tls_proxy:
        proxy_network(settings.tls_proxy)
    _refuse_public_url(settings)
    if needs_no_key(settings):
        return
    where = settings.public_url or f"{settings.http_host}:{settings.http_port}"
    if not has_keys:
        raise SettingsError(
            f"the endpoint would be reached at {where} without a key by anybody; make one first: farm keys create, or "
            "listen on 127.0.0.1 (FARM_HTTP_HOST)"
        )
    if not (settings.tls_cert or settings.tls_proxy):
        raise SettingsError(
            f"the endpoint would be reached at {where} without TLS, so that keys could be read on the way; set FARM_TLS_CERT "
            "and FARM_TLS_KEY, or name the proxy that ends TLS in front of it: FARM_TLS_PROXY"
        )


def proxy_network(text: str) -> str:
    """Return the network that a TLS proxy connects from. Raises SettingsError where it is none, or is everybody."""
    try:
        found = ip_network(text, strict=False)
    except ValueError:
        raise SettingsError(
            f"tls_proxy must be an address or a network such as 10.0.0.5 or 10.0.0.0/24, got {text!r}; mend FARM_TLS_PROXY"
        ) from None
    if found.prefixlen == 0:
        raise SettingsError(f"tls_proxy {text} is everybody; name the proxy's own address: FARM_TLS_PROXY")
    return str(found)


def check_certificate(settings: Settings) -> None:
    """Raise SettingsError where the certificate and its key cannot be used."""
    if settings.tls_cert is None or settings.tls_key is None:
        return
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(
            settings.tls_cert, settings.tls_key, password=""
        )
    except (OSError, ValueError) as exc:
        raise SettingsError(
            f"{settings.tls_cert} and {settings.tls_key} are no certificate and its key: {exc}; both must be PEM, the key "
            "without a password (FARM_TLS_CERT, FARM_TLS_KEY)"
        ) from exc


def free_port(host: str, port: int) -> int:
    """Return the port if it can be listened on, or a free one for 0. Raises FarmUnavailableError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as found:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
            return int(found.getsockname()[1])
    except OSError as exc:
        raise FarmUnavailableError(
            f"the endpoint cannot listen on {host}:{port}: {exc.strerror or exc}; end what does, or choose another with "
            "FARM_HTTP_HOST and FARM_HTTP_PORT"
        ) from exc


def _refuse_public_url(settings: Settings) -> None:
    if settings.public_url is None:
        return
    try:
        public = urlsplit(settings.public_url)
        sound = public.scheme in ("http", "https") and bool(public.hostname) and public.port != 0
    except ValueError:
        sound = False
    if not sound or public.query or public.fragment or public.path.strip("/") or public.username:
        raise SettingsError(
            f"public_url must be scheme and host as https://farm.example.org, got {settings.public_url!r}; mend "
            "FARM_PUBLIC_URL"
        )
    if public.scheme == "http" and not is_loopback(public.hostname or ""):
        raise SettingsError(
            f"public_url {settings.public_url} is no https, so that keys could be read on the way; mend FARM_PUBLIC_URL"
        )
