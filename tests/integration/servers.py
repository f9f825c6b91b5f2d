"""Real S3 servers for tests, each on a loopback port of its own, ended by its process id."""

import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from farm.settings import Settings
from farm.storage.opening import open_store
from farm.storage.s3 import S3Store

CEPH = Path(__file__).parents[2] / "infra" / "s3" / "ceph.sh"
START_LIMIT_S = 120


@dataclass(frozen=True, slots=True)
class S3Server:
    """Where a server listens, and keys that it takes. `folder` is the one to give `ceph.sh`, where it is Ceph."""

    endpoint: str
    bucket: str
    access_key: str
    secret_key: str
    folder: Path | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What a process of the farm needs to use the server; `FARM_STORE` names a prefix that nobody else has."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_EC2_METADATA_DISABLED": "true",
            "FARM_S3_ENDPOINT": self.endpoint,
            "FARM_S3_ADDRESSING": "path",
            "FARM_STORE": f"s3://{self.bucket}/{uuid.uuid4().hex}",
        }

    def store(self, monkeypatch: pytest.MonkeyPatch, *, bucket: str | None = None, attempts: int = 5) -> S3Store:
        """Return a store below a fresh prefix, with this server's keys in the environment for the test's length."""
        for name, value in self.environment.items():
            if name.startswith("AWS_"):
                monkeypatch.setenv(name, value)
        url = f"s3://{bucket or self.bucket}/{uuid.uuid4().hex}"
        store = open_store(url, Settings(s3_endpoint=self.endpoint, s3_addressing="path"))
        assert isinstance(store, S3Store)
        store._attempts = attempts
        return store


class MotoProcess:
    """moto's server in a process of its own: starts in a second, checks no credentials, keeps nothing.

    `ignore_conditions` strips `If-None-Match` and `If-Match` before moto sees them, as some servers do.
    """

    def __init__(self, log: Path, *, ignore_conditions: bool = False):
        code = f"from tests.integration.servers import serve_moto; serve_moto(ignore_conditions={ignore_conditions})"
        with log.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", code],
                cwd=CEPH.parents[2],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        assert self.process.stdout is not None
        port = self.process.stdout.readline().strip()
        if not port:
            raise RuntimeError(f"moto's server did not start: {log.read_text()[-2000:]}")
        self.server = S3Server(f"http://127.0.0.1:{port}", "farm", "any", "any")
        request = urllib.request.Request(f"{self.server.endpoint}/farm", method="PUT")
        urllib.request.urlopen(request, timeout=30).close()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def serve_moto(*, ignore_conditions: bool) -> None:
    """Serve until killed; prints the port first."""
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    application = DomainDispatcherApplication(create_backend_app)

    def unconditional(environ: dict[str, object], start_response: object) -> object:
        if ignore_conditions:
            environ.pop("HTTP_IF_NONE_MATCH", None)
            environ.pop("HTTP_IF_MATCH", None)
        return application(environ, start_response)

    server = make_server("127.0.0.1", 0, unconditional, threaded=True)
    print(server.port, flush=True)
    server.serve_forever()


@pytest.fixture(scope="session")
def moto_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    moto = MotoProcess(tmp_path_factory.mktemp("moto") / "log")
    yield moto.server
    moto.kill()


@pytest.fixture(scope="session")
def ignoring_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A server that ignores the condition on a put."""
    moto = MotoProcess(tmp_path_factory.mktemp("moto-ignoring") / "log", ignore_conditions=True)
    yield moto.server
    moto.kill()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """Ceph's gateway. Not to be had: skips with the reason, and fails where `CI` is set."""
    if not all(shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") for name in ("radosgw", "ceph-osd")):
        do_without(f"Ceph's gateway is not installed; run: sudo {CEPH} install")
    folder = tmp_path_factory.mktemp("ceph")
    try:
        try:
            environment = ceph("start", folder)
        except subprocess.SubprocessError as exc:
            log = exc.stderr or b""
            do_without(f"Ceph's gateway did not start: {log.decode(errors='replace')[-1000:]}")
        yield S3Server(
            environment["FARM_S3_ENDPOINT"],
            "farm",
            environment["AWS_ACCESS_KEY_ID"],
            environment["AWS_SECRET_ACCESS_KEY"],
            folder,
        )
    finally:
        ceph("kill", folder)
        shutil.rmtree(folder, ignore_errors=True)


def ceph(command: str, folder: Path) -> dict[str, str]:
    """Run `ceph.sh` and return the environment that it prints."""
    done = subprocess.run([CEPH, command, folder], capture_output=True, check=True, timeout=START_LIMIT_S)
    return dict(line.split("=", 1) for line in done.stdout.decode().splitlines() if "=" in line)


def wait_until_gone(endpoint: str, *, limit_s: float = 20.0) -> None:
    """Return when nothing answers at `endpoint` any more."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        try:
            urllib.request.urlopen(endpoint, timeout=1).close()
        except urllib.error.HTTPError:
            time.sleep(0.05)
        except OSError:
            return
    raise AssertionError(f"{endpoint} still answers after {limit_s} s")


def do_without(reason: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
