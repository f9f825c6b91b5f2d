"""Servers under load: start one, ask it from so many clients at once, end it and whatever it left behind.

Clients are threads with a kept connection each; at tens of images a second they cost one or two percent of a core. A
closed loop: each sends its next request when the last was answered.
"""

import http.client
import json
import os
import signal
import socket
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

HOST = "127.0.0.1"
READY_S = 120.0
ASK_S = 300.0
END_S = 30.0


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer of status 200. `seconds`: from sending the request until its last byte was here."""

    began: float
    seconds: float
    body: dict[str, Any]


class Client:
    """One kept connection to a server on loopback. Answers that are no 200 end the benchmark."""

    def __init__(self, port: int):
        self._connection = http.client.HTTPConnection(HOST, port, timeout=ASK_S)

    def ask(
        self, path: str, body: object = None, *, method: str | None = None, kind: str = "application/json"
    ) -> Reply:
        """Send a request, POST where there is a body; `body` is sent as JSON, or as it is where it is text."""
        data = body if isinstance(body, str) or body is None else json.dumps(body)
        began = time.perf_counter()
        self._connection.request(method or ("GET" if data is None else "POST"), path, data, {"Content-Type": kind})
        answer = self._connection.getresponse()
        read = answer.read()
        seconds = time.perf_counter() - began
        if answer.status not in (200, 201, 202):
            raise SystemExit(f"{path} answered {answer.status}: {read[:500].decode(errors='replace')}")
        try:
            found = json.loads(read)
        except ValueError:
            found = {}
        return Reply(began, seconds, found)

    def close(self) -> None:
        """Hang up."""
        self._connection.close()


def drive(port: int, path: str, bodies: Sequence[object], *, clients: int) -> tuple[list[Reply], float]:
    """Ask for all bodies from so many clients at once; returns the replies and the seconds that all took together."""
    waiting = iter(bodies)
    lock, replies, failed = threading.Lock(), list[Reply](), list[BaseException]()

    def work() -> None:
        client = Client(port)
        try:
            while not failed:
                with lock:
                    body = next(waiting, None)
                if body is None:
                    return
                reply = client.ask(path, body)
                with lock:
                    replies.append(reply)
        except (OSError, http.client.HTTPException, SystemExit) as exc:
            failed.append(exc)
        finally:
            client.close()

    threads = [threading.Thread(target=work) for _ in range(clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise SystemExit(f"{path}: {type(failed[0]).__name__}: {failed[0]}")
    return replies, time.perf_counter() - began


@contextmanager
def running(
    command: Sequence[str],
    *,
    port: int,
    folder: Path,
    env: Mapping[str, str] | None = None,
    ready: Callable[[Client], object],
) -> Iterator[int]:
    """Run a server until the block is left; yields its process id when `ready` no longer raises.

    It is ended as by Ctrl-C; what it leaves behind is killed, each by its id.
    """
    with tempfile.TemporaryFile("w+", dir=folder) as log:
        process = subprocess.Popen(
            command, env=os.environ | dict(env or {}), cwd=folder, stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )
        try:
            _await(process, port, ready, log=lambda: _tail(log))
            yield process.pid
        finally:
            _end(process)


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as found:
        found.bind((HOST, 0))
        return int(found.getsockname()[1])


def percentiles(seconds: Sequence[float]) -> tuple[float, float]:
    """p50 and p95, in milliseconds to a tenth."""
    if len(seconds) < 2:
        raise SystemExit(f"{len(seconds)} measurements are too few for a percentile")
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return round(cuts[49] * 1000, 1), round(cuts[94] * 1000, 1)


def _await(
    process: "subprocess.Popen[bytes]", port: int, ready: Callable[[Client], object], *, log: Callable[[], str]
) -> None:
    until = time.monotonic() + READY_S
    while True:
        client = Client(port)
        try:
            ready(client)
            return
        except (OSError, http.client.HTTPException, SystemExit) as exc:
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"the server did not come up ({exc}):\n{log()}") from exc
        finally:
            client.close()
        time.sleep(0.2)


def _tail(log: Any) -> str:
    log.seek(0)
    return str(log.read()[-2000:])


def _end(process: "subprocess.Popen[bytes]") -> None:
    with suppress(psutil.Error):
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_S)
        for left in psutil.wait_procs(family, timeout=5)[1]:
            with suppress(psutil.Error):
                left.kill()
    if process.poll() is None:
        process.kill()
    process.wait()
