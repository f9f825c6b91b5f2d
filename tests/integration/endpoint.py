"""A real `farm up` on loopback, and people who ask it for things: well, badly, slowly, and a thousand at once."""

import asyncio
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.chaos import end, title

FARM = Path(sys.executable).parent / "farm"
GENERATIONS = "/v1/images/generations"
MAX_WAITING = 200
UP_S = 90.0
DOWN_S = 60.0
SLEEP_CARD = """\
name: sleep
title: Sleeps, ten milliseconds a step
family: sleep
source: {path: .}
licence: none
dtypes: {cpu: [float32]}
batch: {cpu: 4}
defaults: {width: 64, height: 64, num_inference_steps: 5, guidance_scale: 0}
limits: {min_px: 64, max_px: 1024, max_pixels: 1048576, multiple_of: 64}
max_steps: 10000
"""


@dataclass(frozen=True)
class Reply:
    """An answer, whatever its status."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error in OpenAI's shape; fails where there is none."""
        found = self.json["error"]
        assert set(found) == {"message", "type", "param", "code"}, found
        assert found["message"]
        return dict(found)


class Endpoint:
    """One `farm up` with two renderers, in a folder of its own."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.store = folder / "store"
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("FARM_")} | {
            "FARM_STORE": str(self.store),
            "FARM_MODELS": str(folder / "models"),
            "FARM_RUNTIME_DIR": str(folder / "runtime"),
            "FARM_HTTP_PORT": str(self.port),
            "FARM_RENDERERS": "2",
            "FARM_MAX_WAITING": str(MAX_WAITING),
            "FARM_OWNER": "ann",
        }
        (folder / "models").mkdir()
        (folder / "models" / "sleep.yaml").write_text(SLEEP_CARD)
        self._log = folder / "up.log"
        with self._log.open("w") as log:
            self.process = psutil.Popen(
                [str(FARM), "up"], env=self.env, cwd=folder, stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )
        self._family: dict[int, psutil.Process] = {}

    def await_ready(self) -> None:
        until(lambda: self._lives() and self._status("/readyz") == 200, seconds=UP_S, otherwise=self.said)

    def said(self) -> str:
        """What `farm up` wrote."""
        return self._log.read_text(errors="replace")

    def run(self, *arguments: object, code: int = 0) -> str:
        """Run a farm command against this endpoint; returns stdout."""
        done = subprocess.run(
            [str(FARM), *map(str, arguments)],
            env=self.env | {"FARM_URL": self.url},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == code, f"{arguments} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def ask(
        self,
        path: str,
        body: object = None,
        *,
        method: str | None = None,
        headers: dict[str, str] | None = None,
        timeout: float = 60.0,
    ) -> Reply:
        """Ask once; `body` is sent as JSON, or as it is where it is bytes."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        given = ({"Content-Type": "application/json"} if data is not None else {}) | (headers or {})
        request = urllib.request.Request(self.url + path, data, given, method=method)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return Reply(answer.status, {k.lower(): v for k, v in answer.headers.items()}, answer.read())
        except urllib.error.HTTPError as exc:
            with exc:
                return Reply(exc.code, {k.lower(): v for k, v in exc.headers.items()}, exc.read())

    def raw(self, data: bytes, *, timeout: float = 20.0) -> bytes:
        """Send these bytes; returns the head of what is answered, empty where the other side only hangs up."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout) as connection:
            connection.settimeout(timeout)
            got = b""
            with suppress(ConnectionError):  # it may answer and hang up before it has read all
                connection.sendall(data)
            with suppress(ConnectionError):
                while b"\r\n\r\n" not in got and (some := connection.recv(65536)):
                    got += some
            return got

    def connect(self, path: str, body: object = None, *, buffer: int | None = None) -> socket.socket:
        """Send a request and hand over the connection, its answer unread. `buffer`: bytes that it takes in unread."""
        connection = socket.socket()
        if buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        connection.connect(("127.0.0.1", self.port))
        head, end, data = request_bytes(path, body).partition(b"\r\n\r\n")
        connection.sendall(head + end)
        if data:  # in a packet of its own, as clients do: proxies have treated a hang-up after that otherwise
            time.sleep(0.05)
            connection.sendall(data)
        return connection

    def urgent(self) -> int:
        """Images of the endpoint that renderers have in hand."""
        return sum(renderer["urgent"] for renderer in self.ask("/v1/renderers").json["data"])

    def find(self, name: str) -> list[psutil.Process]:
        """Processes of this farm by what they call themselves."""
        return [process for process in self.family() if title(process).startswith(name)]

    def family(self) -> list[psutil.Process]:
        """Every process of this farm."""
        found = self.process.children(recursive=True) if self.process.is_running() else []
        self._family |= {process.pid: process for process in found}
        return found

    def resident_bytes(self) -> int:
        """Memory of the processes that a client's request goes through."""
        return sum(
            process.memory_info().rss
            for process in self.family()
            if title(process).startswith(
                ("ray::ServeReplica", "ray::Dispatcher", "ray::Proxy", "haproxy", "ray::HAProxy")
            )
        )

    def close(self) -> list[psutil.Process]:
        """Ask it to end; returns the processes that it left behind, and ends them."""
        family = self.family() or list(self._family.values())
        if self.process.is_running():
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(DOWN_S)
            except psutil.TimeoutExpired:
                end(self.process.pid)
                self.process.wait()
        left = psutil.wait_procs(family, timeout=10)[1]
        for process in left:
            end(process.pid)
        return list(left)

    def _lives(self) -> bool:
        assert self.process.poll() is None, f"farm up ended with {self.process.returncode}:\n{self.said()}"
        return True

    def _status(self, path: str) -> int | None:
        try:
            return self.ask(path, timeout=5).status
        except OSError:
            return None


def picture(prompt: str = "a red circle on a white background", **fields: object) -> dict[str, object]:
    """The body of a request for an image."""
    return {"model": "sketch", "prompt": prompt, "response_format": "b64_json", **fields}


def sleepy(seconds: float, **fields: object) -> dict[str, object]:
    """The body of a request for an image that takes so long."""
    return {"model": "sleep", "prompt": "sleep", "num_inference_steps": max(1, round(seconds * 100)), **fields}


def request_bytes(path: str, body: object = None, *headers: str) -> bytes:
    """A request as it goes over the wire, for a connection that is closed after it."""
    data = b"" if body is None else json.dumps(body).encode()
    lines = [f"{'GET' if body is None else 'POST'} {path} HTTP/1.1", "Host: 127.0.0.1", "Connection: close", *headers]
    if body is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(data)}"]
    return "\r\n".join((*lines, "", "")).encode() + data


async def ask_all(port: int, bodies: Sequence[object], *, seconds: float) -> list[Reply]:
    """Ask for all of them at once, each over a connection of its own; fails where one is not answered in time."""

    async def one(body: object) -> Reply:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request_bytes(GENERATIONS, body))
        data = await reader.read()
        writer.close()
        head, _, rest = data.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        named = dict(line.lower().split(": ", 1) for line in lines[1:])
        return Reply(int(lines[0].split()[1]), named, _unchunked(rest) if "transfer-encoding" in named else rest)

    return list(await asyncio.wait_for(asyncio.gather(*(one(body) for body in bodies)), seconds))


def _unchunked(data: bytes) -> bytes:
    whole = b""
    while data:
        size, _, data = data.partition(b"\r\n")
        length = int(size, 16)
        whole, data = whole + data[:length], data[length + 2 :]
    return whole


@contextmanager
def many_files(count: int) -> Iterator[None]:
    """Let this process have so many connections open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (min(count, hard) if hard != resource.RLIM_INFINITY else count, hard)
        )
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def until(
    true: Callable[[], object],
    *,
    seconds: float = 30.0,
    otherwise: Callable[[], str] = lambda: "it did not come to that",
) -> None:
    stop = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < stop, otherwise()
        time.sleep(0.05)
