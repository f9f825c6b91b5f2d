"""The client as people run it: a process without what renders, over real connections, to a farm that may go away."""

import asyncio
import contextlib
import datetime
import ipaddress
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from farm.client import Client
from farm.errors import FarmUnavailableError
from tests.unit.cli.test_light import BLOCKED, light
from tests.unit.server.farm_in_process import FarmInProcess

KEY = "farm-0123456789ab-" + "c" * 64
MANIFEST = "name: {name}\nmodel: sketch\nprompts: [a red circle, a blue star]\nparams: {{num_inference_steps: 2}}\n"


class Served:
    """A farm behind loopback ports of its own: `port` for HTTP, `tls_port` with a certificate that nobody knows."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.port, self.tls_port = 0, 0
        self.certificate, key = certificate(folder)
        self._key = key
        self._leave = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._servers: list[uvicorn.Server] = []
        self._app: Any = None
        self.up = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._run())
        self._loop.close()

    async def _run(self) -> None:
        async with FarmInProcess(self.folder) as farm:
            self._app = farm.app
            tls = await self._listen(0, ssl_certfile=str(self.certificate), ssl_keyfile=str(self._key))
            self.tls_port = _port(tls)
            plain = await self._listen(0)
            self.port = _port(plain)
            self.up.set()
            await self._leave.wait()
            for server in self._servers:
                await _end(server)

    async def _listen(self, port: int, **options: Any) -> uvicorn.Server:
        config = uvicorn.Config(
            self._app, port=port, lifespan="off", log_config=None, timeout_graceful_shutdown=0, **options
        )
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server._serve())
        while not server.started:  # noqa: ASYNC110  (what it waits for has no event)
            await asyncio.sleep(0.01)
        server.serving = serving  # type: ignore[attr-defined]
        self._servers.append(server)
        return server

    def go_away(self) -> None:
        """Break all connections to the HTTP port, and listen there no more."""
        asyncio.run_coroutine_threadsafe(_end(self._servers.pop()), self._loop).result(30)

    def come_back(self) -> None:
        asyncio.run_coroutine_threadsafe(self._listen(self.port), self._loop).result(30)

    def leave(self) -> None:
        self._loop.call_soon_threadsafe(self._leave.set)


async def _end(server: uvicorn.Server) -> None:
    server.should_exit = server.force_exit = True
    for connection in list(server.server_state.connections):
        connection.transport.abort()
    with contextlib.suppress(asyncio.CancelledError):
        await server.serving  # type: ignore[attr-defined]


def _port(server: uvicorn.Server) -> int:
    return int(server.servers[0].sockets[0].getsockname()[1])


def certificate(folder: Path) -> tuple[Path, Path]:
    """Make a certificate of 127.0.0.1 that signs itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    certificate, private = folder / "certificate.pem", folder / "key.pem"
    certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return certificate, private


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    farm = Served(tmp_path_factory.mktemp("farm"))
    thread = threading.Thread(target=farm.run)
    thread.start()
    assert farm.up.wait(60)
    yield farm
    farm.leave()
    thread.join(60)


def test_a_client_without_what_renders_submits_watches_and_controls(served: Served, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(MANIFEST.format(name="light"))
    ended = light("submit", "job.yaml", "--watch", folder=tmp_path, FARM_URL=served.url)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("light: done, 2 of 2 images, 0 failed\n")
    assert light("status", "--url", served.url, folder=tmp_path).stdout.count("light") == 1
    assert light("retry", "light", "--all", folder=tmp_path, FARM_URL=served.url).returncode == 0
    assert light("status", "light", "-w", folder=tmp_path, FARM_URL=served.url).returncode == 0
    said = light("cancel", "light", folder=tmp_path, FARM_URL=served.url)
    assert said.returncode == 2
    assert said.stderr == "error: light is done, 2 images; there is nothing to cancel\n"
    drawn = light("prompt", folder=tmp_path, typed="/steps 1\na red circle\n", FARM_URL=served.url)
    assert drawn.stdout.startswith("farm-pictures/0001.png  seed ")
    assert (tmp_path / "farm-pictures" / "0001.png").read_bytes().startswith(b"\x89PNG")


def test_connections_to_this_machine_pass_every_proxy_by(served: Served, tmp_path: Path) -> None:
    names = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "all_proxy")
    proxies = dict.fromkeys(names, "http://127.0.0.1:9")
    ended = light("models", folder=tmp_path, FARM_URL=served.url, **proxies)
    assert ended.returncode == 0, ended.stderr


def test_a_certificate_that_nobody_knows_is_refused_until_it_is_named(served: Served, tmp_path: Path) -> None:
    url = f"https://127.0.0.1:{served.tls_port}"
    refused = light("models", folder=tmp_path, FARM_URL=url, FARM_KEY=KEY)
    assert refused.returncode == 6
    assert refused.stderr == (
        f"error: the certificate of {url} is not trusted: self-signed certificate; name its CA's PEM file in "
        "SSL_CERT_FILE\n"
    )
    named = light("models", folder=tmp_path, FARM_URL=url, SSL_CERT_FILE=str(served.certificate))
    assert named.returncode == 0, named.stderr
    with Client(url, "", ca_file=served.certificate) as client:
        assert "sketch" in [model.id for model in client.models()]


@pytest.mark.parametrize("flags", [(), ("-v",), ("--json",)])
def test_a_wrong_key_is_said_without_being_shown(served: Served, tmp_path: Path, flags: tuple[str, ...]) -> None:
    ended = light("status", *flags, folder=tmp_path, FARM_URL=served.url, FARM_KEY=f"{KEY}\n")
    assert ended.returncode == 2
    assert "unauthorized" in ended.stdout if flags == ("--json",) else "key" in ended.stderr
    assert "c" * 20 not in ended.stdout + ended.stderr


def test_logs_of_the_http_library_do_not_show_the_key(served: Served, tmp_path: Path) -> None:
    code = BLOCKED.replace(
        "from farm.cli.app import run\nrun()",
        "import logging, farm\nlogging.basicConfig(level=0)\n"
        f"client = farm.Client({served.url!r}, {KEY!r})\nprint(client, vars(client))\n"
        "try:\n    client.models()\nexcept Exception as exc:\n    print(repr(exc))",
    )
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert "UnauthorizedError" in ended.stdout
    assert "send_request_headers" in ended.stderr
    assert "c" * 20 not in ended.stdout + ended.stderr


def test_a_watch_outlives_a_farm_that_goes_away_for_a_while(served: Served, tmp_path: Path) -> None:
    with Client(served.url, "", patience_s=60) as client:
        job = {"name": "broken", "model": "sketch", "prompts": ["a red circle"], "seeds": {"count": 150}}
        client.submit({**job, "params": {"num_inference_steps": 2}})
        landed: list[int] = []
        away = False
        for event in client.watch("broken"):
            if event.kind == "image":
                landed.append(event.data["index"])
            if landed and not away:
                away = True
                served.go_away()
                threading.Timer(2.0, served.come_back).start()
        assert event.kind == "end"
        assert sorted(landed) == list(range(150))


def test_a_watch_of_a_farm_that_stays_away_ends_with_what_to_do(served: Served, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(MANIFEST.format(name="gone") + "seeds: {count: 3000}\n")
    with Client(served.url, "", patience_s=3) as client:
        client.submit(tmp_path / "job.yaml")
        events = client.watch("gone", images="none")
        assert next(events).kind == "progress"
        served.go_away()
        try:
            with pytest.raises(FarmUnavailableError, match=r"no farm answers at http://127\.0\.0\.1:\d+ .*is it up"):
                list(events)
        finally:
            served.come_back()
        assert client.cancel("gone")["state"] == "cancelled"


def test_output_that_is_redirected_is_whole_and_plain(served: Served, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(MANIFEST.format(name="plain"))
    ended = light("submit", "job.yaml", "-w", "--json", folder=tmp_path, FARM_URL=served.url)
    assert json.loads(ended.stdout)["state"] == "done"
    assert "\x1b" not in ended.stdout + ended.stderr


def test_a_server_that_is_no_farm_is_said_to_be_none(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    with connection:
                        connection.recv(65536)
                        connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\nconnection: close\r\n\r\nhello")

        threading.Thread(target=answer, daemon=True).start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        ended = light("status", folder=tmp_path, FARM_URL=url)
        assert ended.returncode == 6
        assert ended.stderr == (
            f"error: {url} answered with no JSON; is it a farm's endpoint, and as new as this client?\n"
        )
        listening.shutdown(socket.SHUT_RDWR)
