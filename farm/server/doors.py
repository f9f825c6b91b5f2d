"""What every request passes before a route sees it, and every answer after: plain ASGI, so that streams and disconnects
reach the routes as they are.

Refuses other hosts' names (a web page that names this machine otherwise is not ours) and other pages' origins, bodies that are
neither JSON nor, for jobs, YAML, and bodies that are too large or too slow. Finds out whose key it is before a body is read.
Closes the connection where a body was not read to its end: else who was refused could hold it. Counts requests.
"""

import asyncio
import contextlib
import time
from datetime import UTC, datetime
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from farm.errors import FarmError, UnauthorizedError
from farm.exposure import is_loopback
from farm.keys import PREFIX, Key
from farm.server.docs import OPEN
from farm.server.errors import answer_of, error_answer
from farm.server.methods import STREAMS
from farm.server.services import Services

BODY_BYTES = 2**20
MANIFEST_BYTES = 16 * 2**20
BODY_S = 60.0
"""How long a client may take to send its body."""
LINGER_S, LINGER_BYTES = 1.0, 2**20
"""So long and so much of a body that nobody reads is still taken, so that the client comes to read the answer."""

_JSON = frozenset({b"application/json"})
_YAML = frozenset({b"application/yaml", b"application/x-yaml", b"text/yaml", b"text/x-yaml"})
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_ALWAYS = [
    (b"x-content-type-options", b"nosniff"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),
]
"""What every answer says, since some of them end up in a browser."""
_CLOSE = (b"connection", b"close")


class Doors:
    """The outermost part of the app."""

    def __init__(self, app: ASGIApp, services: Services):
        self._app = app
        self._services = services
        public = urlsplit(services.settings.public_url or "").hostname
        self._public = public.lower() if public else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1000})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        meters, started, status = self._services.meters, time.perf_counter(), "499"
        body = _Body(receive, unread=_has_body(dict(scope["headers"])))
        closes = False

        async def answering(message: Message) -> None:
            nonlocal status, closes
            if message["type"] == "http.response.start":
                status, closes = str(message["status"]), body.unread
                message["headers"] = [*message.get("headers", ()), *_ALWAYS, *([_CLOSE] if closes else [])]
            elif closes and not message.get("more_body", False):
                await send({**message, "more_body": True})
                await body.linger()
                message = {"type": "http.response.body"}
            await send(message)

        meters.shift("farm_http_in_flight", 1)
        try:
            await self._let_in(scope, body.receive, answering)
        finally:
            meters.shift("farm_http_in_flight", -1)
            method = scope["method"] if scope["method"] in _METHODS else "other"
            route = str(getattr(scope.get("route"), "path", "none"))
            meters.count("farm_http_requests_total", method=method, route=route, status=status)
            if not scope["path"].endswith(STREAMS):
                meters.observe("farm_http_request_seconds", time.perf_counter() - started, method=method, route=route)

    async def _let_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        refusal = self._wrong_place(headers) or _wrong_body(scope, headers)
        if refusal is not None:
            status, message, code = refusal
            await error_answer(status, message, code=code)(scope, receive, send)
            return
        if scope["path"] not in OPEN:
            try:
                scope["caller"] = await self._who(headers.get(b"authorization", b""))
            except FarmError as exc:
                await answer_of(exc)(scope, receive, send)
                return
        await self._app(scope, _limited(receive, _limit(scope["path"])), send)

    def _wrong_place(self, headers: dict[bytes, bytes]) -> tuple[int, str, str] | None:
        """Without keys, a page of anywhere could speak to this machine by a name of its own: that name gives it away."""
        authority = headers.get(b"host", b"").decode("latin-1").lower()
        host = _name(authority)
        if self._services.local is not None and not (is_loopback(host) or host == self._public):
            return 403, f"host {host[:100]!r} is not a name of this endpoint; use its address, 127.0.0.1", "host"
        origin = headers.get(b"origin")
        if origin is None:
            return None
        with contextlib.suppress(ValueError):  # an origin that is no address is another's too
            parts = urlsplit(origin.decode("latin-1").lower())
            if parts.netloc == authority or (self._public is not None and parts.hostname == self._public):
                return None
        return 403, "requests from other sites' pages are not answered", "origin"

    async def _who(self, authorization: bytes) -> Key:
        """Raises UnauthorizedError; a value that is no key of ours counts as none, as clients must send something."""
        scheme, _, text = authorization.decode("latin-1").partition(" ")
        text = text.strip()
        services = self._services
        if services.local is not None and not text.startswith(PREFIX):
            return services.local
        if scheme.lower() != "bearer" or not text:
            raise UnauthorizedError(
                "this endpoint needs a key: send Authorization: Bearer farm-..., as `farm keys create` shows it"
            )
        now = datetime.fromtimestamp(services.wall(), UTC)
        if services.keys.is_fresh(text, now):
            return services.keys.check(text, now)
        return await asyncio.to_thread(services.keys.check, text, now)


class _Body:
    """A request's body on its way in. `unread`: whether some of it may still come."""

    def __init__(self, receive: Receive, *, unread: bool):
        self._receive = receive
        self.unread = unread

    async def receive(self) -> Message:
        message = await self._receive()
        if not message.get("more_body", False):  # its end, or the client has gone
            self.unread = False
        return message

    async def linger(self) -> None:
        """Take what comes for a moment: a connection that is closed with something unread in it may lose the answer."""
        taken = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while self.unread and taken < LINGER_BYTES:
                    taken += len((await self.receive()).get("body", b""))


def _has_body(headers: dict[bytes, bytes]) -> bool:
    return headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers


def _name(authority: str) -> str:
    """The host of `host:port`."""
    if authority.startswith("["):
        return authority.partition("]")[0] + "]"
    return authority.rpartition(":")[0] or authority


def _wrong_body(scope: Scope, headers: dict[bytes, bytes]) -> tuple[int, str, str] | None:
    """JSON only: what a form of another site's page can send without asking is none."""
    if not _has_body(headers):
        return None
    length = headers.get(b"content-length", b"0")
    limit = _limit(scope["path"])
    if not length.isdigit() or int(length[:20]) > limit:
        return (
            413,
            f"the body has {length.decode('latin-1')[:20]} bytes, at most {limit} are taken; send less",
            "too_large",
        )
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    known = _JSON | _YAML if _takes_manifests(scope["path"]) else _JSON
    if kind not in known and scope["method"] not in ("GET", "HEAD"):
        wanted = ", ".join(sorted(one.decode() for one in known))
        return (
            415,
            f"a body of type {kind.decode('latin-1')[:60] or 'unknown'} is not read; send {wanted}",
            "media_type",
        )
    if headers.get(b"content-encoding", b"identity") != b"identity":
        return 415, "compressed bodies are not read; send it as it is", "media_type"
    return None


def _takes_manifests(path: str) -> bool:
    return path == "/v1/jobs" or path.startswith("/v1/jobs/")


def _limit(path: str) -> int:
    return MANIFEST_BYTES if _takes_manifests(path) else BODY_BYTES


def _limited(receive: Receive, limit: int) -> Receive:
    """Pass a body on until it is too large or takes too long; what follows it, the disconnect, may come whenever it does."""
    taken, whole, ends_at = 0, False, 0.0

    async def limited() -> Message:
        nonlocal taken, whole, ends_at
        if whole:
            return await receive()
        ends_at = ends_at or asyncio.get_running_loop().time() + BODY_S
        message = None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(ends_at):
                message = await receive()
        if message is None:
            raise HTTPException(408, f"the body did not arrive within {BODY_S:g} s; send it again")
        taken += len(message.get("body", b""))
        whole = not message.get("more_body", False)
        if taken > limit:
            raise HTTPException(413, f"the body has more than the {limit} bytes that are taken; send less")
        return message

    return limited
