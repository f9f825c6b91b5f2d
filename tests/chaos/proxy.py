"""A proxy before an S3 server that does to requests what servers and networks do, drawn from a seed.

Host and all signed headers go through as they came, so signatures hold. What a client sees of each fault:

    refuse       500 InternalError, nothing done             delay        its answer, but late
    slow_down    503 SlowDown, nothing done                  cut_upload   the connection breaks in mid-upload
    deny         500, though the server has done it          break_off    the connection breaks in mid-answer
    swallow      no answer, though the server has done it    break_head   so, within the answer's head
    reset        the connection is reset, nothing done

After `deny`, `swallow` and `break_head` a client that asks again meets what it did itself: a conditional put is answered 412.
"""

import contextlib
import http.client
import random
import socket
import socketserver
import struct
import threading
import time
from collections import deque
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal, get_args
from urllib.parse import urlsplit

Fault = Literal["refuse", "slow_down", "deny", "reset", "delay", "cut_upload", "break_off", "break_head", "swallow"]
FAULTS: tuple[Fault, ...] = get_args(Fault)
ANSWER_S = 120.0
"""How long the server may take, stopped ones too; clients give up earlier."""
LATE_S = (21.0, 28.0)
"""A delay longer than the farm's clients wait: what is done then is done after they have asked again."""
_ERROR = "<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>by the proxy</Message></Error>"


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request as it went. `status` is the server's own answer, None where there was none."""

    at: float
    peer: str
    method: str
    path: str
    fault: Fault | None
    status: int | None


@dataclass(frozen=True, slots=True)
class _Request:
    method: str
    target: str
    head: bytes
    body: bytes

    @property
    def path(self) -> str:
        return urlsplit(self.target).path


class _CutError(Exception):
    """Raised to end a client's connection."""


class FaultProxy:
    """Listens on `host` at a port of its own. `rate`: the share of requests that meets a fault; may be set at any time.

    `late`: the share of delays that outlast a client's patience. `next_faults` come first, one a request, None for none.
    `picture_every_s`: how much time the store takes for each picture; may be set at any time, and sets a job's pace.
    """

    def __init__(
        self,
        server: str,
        *,
        seed: int,
        rate: float = 0.0,
        faults: tuple[Fault, ...] = FAULTS,
        late: float = 0.0,
        host: str = "127.0.0.1",
    ):
        parts = urlsplit(server)
        assert parts.hostname
        assert parts.port
        self._server = (parts.hostname, parts.port)
        self._rng = random.Random(seed)
        self._faults = faults
        self._late = late
        self._lock = threading.Lock()
        self._connections: set[socket.socket] = set()
        self._held: dict[str, float] = {}
        self._in_flight = 0
        self._next_picture = 0.0
        self.picture_every_s = 0.0
        self.rate = rate
        self.next_faults: deque[Fault | None] = deque()
        self.journal: list[Exchange] = []
        self._tcp = _Listener((host, 0), _Client)
        self._tcp.proxy = self
        self._thread = threading.Thread(target=self._tcp.serve_forever, args=(0.1,), name="s3-proxy", daemon=True)
        self._thread.start()

    @property
    def endpoint(self) -> str:
        """The URL to give to clients."""
        host, port = self._tcp.server_address[:2]
        return f"http://{host!s}:{port}"

    def hold_receipts(self, peer: str, seconds: float) -> None:
        """From now on let every receipt that comes from this address wait for so long."""
        self._held[peer] = seconds

    def pictures_from(self, peer: str, *, seconds: float) -> bool:
        """Whether this address has stored a picture in the last so many seconds."""
        since = time.monotonic() - seconds
        recent = takewhile(lambda exchange: exchange.at > since, reversed(self.journal))
        return any(one.peer == peer and one.method == "PUT" and "/images/" in one.path for one in recent)

    def wait_until_idle(self, *, limit_s: float = ANSWER_S) -> None:
        """Return when no request is under way, or the time is up."""
        until = time.monotonic() + limit_s
        while self._in_flight and time.monotonic() < until:
            time.sleep(0.05)

    def close(self) -> None:
        """End, with all connections."""
        self._tcp.shutdown()
        self._tcp.server_close()
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()

    # What its connections' threads call

    def draw(self, request: _Request, peer: str) -> tuple[Fault | None, float, float]:
        """Begin a request, which `note` ends: its fault, seconds to wait before it is passed on, and where to cut, 0..1."""
        with self._lock:
            self._in_flight += 1
            if self.next_faults:
                fault = self.next_faults.popleft()
            else:
                fault = self._rng.choice(self._faults) if self._rng.random() < self.rate else None
            late = self._rng.random() < self._late
            wait = self._rng.uniform(*LATE_S) if late else self._rng.uniform(0.1, 2.0)
            cut = self._rng.uniform(0.1, 0.9)
        if fault == "cut_upload" and not request.body:
            fault = "reset"
        return fault, self._slowness(request, peer) + (wait if fault == "delay" else 0.0), cut

    def _slowness(self, request: _Request, peer: str) -> float:
        if request.method != "PUT":
            return 0.0
        if "/images/" in request.path:
            now = time.monotonic()
            with self._lock:
                self._next_picture = max(now, self._next_picture) + self.picture_every_s
                return self._next_picture - now
        return self._held.get(peer, 0.0) if "/receipts/" in request.path else 0.0

    def connect(self) -> socket.socket:
        try:
            return socket.create_connection(self._server, timeout=ANSWER_S)
        except OSError as exc:
            raise _CutError("the server does not listen") from exc

    def note(self, peer: str, request: _Request, fault: Fault | None, status: int | None) -> None:
        with self._lock:
            self._in_flight -= 1
        self.journal.append(Exchange(time.monotonic(), peer, request.method, request.path, fault, status))

    def know(self, connection: socket.socket) -> None:
        with self._lock:
            self._connections.add(connection)

    def forget(self, connection: socket.socket) -> None:
        with self._lock:
            self._connections.discard(connection)


class _Listener(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    proxy: FaultProxy


class _Client(socketserver.StreamRequestHandler):
    """One client's connection, a request at a time."""

    server: _Listener
    disable_nagle_algorithm = True

    def handle(self) -> None:
        proxy = self.server.proxy
        proxy.know(self.connection)
        try:
            while (request := self._read()) is not None:
                self._serve(proxy, request)
        except (_CutError, OSError, http.client.HTTPException):
            return
        finally:
            proxy.forget(self.connection)

    def finish(self) -> None:
        with contextlib.suppress(OSError):  # what it has not been told yet it shall not be
            super().finish()

    def _serve(self, proxy: FaultProxy, request: _Request) -> None:
        peer = str(self.client_address[0])
        fault, wait_s, cut = proxy.draw(request, peer)
        answer = b""
        time.sleep(wait_s)
        try:
            status, answer = self._pass_on(proxy, request, fault, cut)
        except (_CutError, OSError, http.client.HTTPException):
            proxy.note(peer, request, fault, None)
            raise
        proxy.note(peer, request, fault, status)
        match fault:
            case "refuse" | "deny":
                return self._answer_error(request, 500, "InternalError")
            case "slow_down":
                return self._answer_error(request, 503, "SlowDown")
            case "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            case "break_off" | "break_head":
                head = answer.index(b"\r\n\r\n") + 4
                first, last = (0, head) if fault == "break_head" else (head, len(answer))
                self.connection.sendall(answer[: first + int((last - first) * cut)])
            case None | "delay":
                return self.connection.sendall(answer)
        raise _CutError(fault)

    def _pass_on(
        self, proxy: FaultProxy, request: _Request, fault: Fault | None, cut: float
    ) -> tuple[int | None, bytes]:
        """Let the server do what the fault leaves of a request; returns its status and answer, where it is to give one."""
        if fault in ("refuse", "slow_down", "reset"):
            return None, b""
        with proxy.connect() as server:
            if fault == "cut_upload":
                server.sendall(request.head + request.body[: int(len(request.body) * cut)])
                return None, b""
            server.sendall(request.head + request.body)
            return _answer(server, request.method)

    def _read(self) -> _Request | None:
        """The next request whole; None where the client has left."""
        line = self.rfile.readline()
        if not line.strip():
            return None
        method, target, _ = line.decode("latin-1").split(" ", 2)
        lines, length = [line], 0
        while (header := self.rfile.readline()) not in (b"\r\n", b""):
            name, _, value = header.partition(b":")
            match name.strip().lower():
                case b"content-length":
                    length = int(value)
                case b"transfer-encoding":
                    raise _CutError("chunked requests are not understood here")
                case b"expect":
                    self.connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
                    continue  # botocore does not sign it, and the server gets the body with the head
                case b"connection":
                    continue
            lines.append(header)
        body = self.rfile.read(length)
        if len(body) < length:
            raise _CutError("the client left in mid-upload")
        return _Request(method, target, b"".join([*lines, b"Connection: close\r\n\r\n"]), body)

    def _answer_error(self, request: _Request, status: int, code: str) -> None:
        body = b"" if request.method == "HEAD" else _ERROR.format(code=code).encode()
        head = f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
        self.connection.sendall(head.encode() + body)


def _answer(server: socket.socket, method: str) -> tuple[int, bytes]:
    """Read the server's answer to its end; returns its status and the bytes to pass on."""
    response = http.client.HTTPResponse(server, method=method)
    response.begin()
    body = response.read()
    lines = [f"HTTP/1.1 {response.status} {response.reason}"]
    names = ("connection", "keep-alive", "transfer-encoding", "content-length")
    lines += [f"{name}: {value}" for name, value in response.getheaders() if name.lower() not in names]
    length = response.getheader("Content-Length", "0") if method == "HEAD" else str(len(body))
    if response.status not in (204, 304):
        lines.append(f"Content-Length: {length}")
    return response.status, "\r\n".join([*lines, "", ""]).encode("latin-1") + body
