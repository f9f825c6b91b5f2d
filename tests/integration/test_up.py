"""`farm up` and `farm down` as a person runs them: start, ends of every kind, and what listens meanwhile."""

import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

import psutil
import pytest

from tests.chaos import end, title
from tests.integration.servers import do_without
from tests.integration.test_farm import SLEEPY, Terminal, children, find, until

RAY_GRPC = ("gcs_server", "raylet", "ray::")
"""Processes whose ports on all interfaces are gRPC that asks for Ray's token; Ray cannot bind them to one address."""

AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""These try for a minute to tell the control store, which is gone too, before they end by themselves."""


class Up:
    """A `farm up` that answers."""

    def __init__(self, terminal: Terminal, *flags: object, context: ssl.SSLContext | None = None):
        self.process = terminal.start("up", "--port", 0, "--json", *flags)
        lines: list[str] = []
        while lines[-1:] != ["}\n"]:
            lines.append(self.process.stdout.readline())
            assert lines[-1], self.process.communicate()[1]
        told = json.loads("".join(lines))
        assert "error" not in told, told
        self.url, self.keeper = told["url"], told["pid"]
        self.context = context
        self.family = [self.process, *children(self.process)]

    def get(self, path: str, *, key: str = "") -> tuple[int, str]:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        request = urllib.request.Request(self.url + path, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=20, context=self.context) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as refused:
            return refused.code, refused.read().decode()

    def ended(self, seconds: float, *, but: tuple[str, ...] = ()) -> None:
        """Wait until nothing of it runs, but what is called so."""
        stop = time.monotonic() + seconds
        while left := [member for member in self.family if alive(member) and not title(member).startswith(but or "-")]:
            assert time.monotonic() < stop, f"still there: {[title(member) for member in left]}"
            time.sleep(0.1)


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    terminal = Terminal(tmp_path)
    terminal.env.pop("RAY_AUTH_MODE", None)
    yield terminal
    terminal.close()


def private_folder(terminal: Terminal) -> Path:
    """Where HAProxy keeps its things, as the note of the farm says."""
    note = next((terminal.folder / "runtime").glob("*.json"))
    return Path(json.loads(note.read_text())["folder"])


def test_the_endpoint_answers_listens_on_loopback_alone_and_ends_by_farm_down(terminal):
    up = Up(terminal)
    assert up.get("/healthz")[0] == 200
    folder = private_folder(terminal)
    assert folder.stat().st_mode & 0o777 == 0o700
    wide = []
    for member in up.family:
        connections = []
        with suppress(psutil.NoSuchProcess):  # some of the family only start others
            connections = member.net_connections("inet")
        for found in connections:
            if found.status == psutil.CONN_LISTEN and not ip_address(found.laddr.ip).is_loopback:
                wide.append("ray:: driver" if member.pid == up.keeper else title(member))
                assert not speaks_http(found.laddr.port), f"{title(member)} serves HTTP on {found.laddr}"
    assert all(name.startswith(RAY_GRPC) for name in wide), wide
    assert not [name for name in wide if name.startswith("haproxy")]
    _, err = terminal.run("up", code=6)
    assert f"runs already at {up.url} (process {up.keeper}); farm down ends it" in err
    _, err = terminal.run("down")
    assert f"the farm at {up.url} is down" in err
    _, err = up.process.communicate(timeout=30)
    assert up.process.returncode == 0, err
    assert "Traceback" not in err
    up.ended(15)
    assert not folder.exists()
    _, err = terminal.run("down")
    assert "no farm runs for" in err


def speaks_http(port: int) -> bool:
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.settimeout(1.0)
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        try:
            return connection.recv(100).startswith(b"HTTP/1")
        except OSError:
            return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_in_good_order_and_it_starts_again(terminal, number):
    for _ in range(2):
        up = Up(terminal)
        assert up.get("/healthz")[0] == 200
        up.process.send_signal(number)
        _, err = up.process.communicate(timeout=30)
        assert up.process.returncode == 0, err
        assert "the farm is down; what is stored stays, farm up goes on with it" in err
        up.ended(15)


@pytest.mark.parametrize("who", ["command", "keeper"])
def test_killed_it_leaves_nothing_running_and_the_next_start_clears_away_its_folder(terminal, who):
    up = Up(terminal)
    folder = private_folder(terminal)
    os.kill(up.process.pid if who == "command" else up.keeper, signal.SIGKILL)
    up.ended(30, but=AGENTS)
    assert folder.exists()
    again = Up(terminal)
    assert not folder.exists()
    assert again.get("/healthz")[0] == 200
    terminal.run("down")
    for member in up.family:
        if alive(member):
            end(member.pid)


def test_a_killed_haproxy_and_a_killed_gateway_come_back(terminal):
    up = Up(terminal)
    for name in ("haproxy", "ray::ServeReplica"):
        victim = find(up.process, name)[0]
        end(victim.pid)
        until(lambda victim=victim: not alive(victim) and answers(up), seconds=60)
    terminal.run("down")


def answers(up: Up) -> bool:
    try:
        return up.get("/healthz")[0] == 200
    except OSError:
        return False


def test_while_no_gateway_lives_the_refusal_is_in_the_apis_own_shape(terminal):
    up = Up(terminal)
    replica = find(up.process, "ray::ServeReplica")[0]
    fallback = find(up.process, "ray::ProxyActor")
    for member in [*fallback, replica]:
        member.suspend()
        end(member.pid)
    seen: list[tuple[int, str]] = []

    def refused() -> bool:
        try:
            seen.append(up.get("/healthz"))
        except OSError:
            return False  # HAProxy had not yet noticed, and brought it to those that are gone
        return seen[-1][0] == 503

    until(refused, seconds=20)
    assert json.loads(seen[-1][1])["error"]["code"] == "farm_unavailable"
    until(lambda: answers(up), seconds=60)
    terminal.run("down")


def test_a_port_that_is_taken_is_said_before_anything_starts(terminal):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        _, err = terminal.run("up", "--port", port, code=6)
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in err
    assert "starting the farm" not in err


def test_beside_a_farm_render_of_the_same_store_it_is_refused_and_of_another_it_starts(terminal, tmp_path):
    manifest = terminal.manifest("long", SLEEPY.format(count=200, steps=100))
    render = terminal.start("render", manifest)
    until(lambda: terminal.receipts("long") >= 1)
    _, err = terminal.run("up", "--port", 0, code=6)
    assert "farm render (process" in err
    _, err = terminal.run("down", code=6)
    assert "that farm belongs to farm render" in err
    up = Up(terminal, "--store", tmp_path / "another")
    assert up.get("/healthz")[0] == 200
    render.send_signal(signal.SIGINT)
    render.communicate(timeout=30)
    assert render.returncode == 130
    terminal.run("down", "--store", tmp_path / "another")


def test_it_renders_what_the_store_holds_and_farm_render_attaches_to_it(terminal):
    manifest = terminal.manifest("begun", SLEEPY.format(count=40, steps=20))
    render = terminal.start("render", manifest)
    until(lambda: terminal.receipts("begun") >= 1)
    render.send_signal(signal.SIGINT)
    render.communicate(timeout=30)
    up = Up(terminal)
    out, _ = terminal.run("render", manifest)
    assert "120 of 120 images" in out
    assert alive(up.process), "farm render must not end a farm that it did not start"
    terminal.run("down")


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    openssl = shutil.which("openssl")
    if openssl is None:
        do_without("openssl is not installed")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    command = [openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *subject]
    subprocess.run([*command, "-keyout", key, "-out", cert], check=True, capture_output=True)
    return cert, key


def test_on_all_addresses_it_wants_keys_and_tls_and_then_speaks_https_alone(terminal, certificate):
    cert, key = certificate
    _, err = terminal.run("up", "--host", "0.0.0.0", "--port", 0, code=2)
    assert "make one first: farm keys create" in err
    text = terminal.run("keys", "create", "--scope", "read")[0].strip()
    _, err = terminal.run("up", "--host", "0.0.0.0", "--port", 0, code=2)
    assert "without TLS, so that keys could be read on the way" in err
    terminal.env |= {"FARM_TLS_CERT": str(cert), "FARM_TLS_KEY": str(key)}
    up = Up(terminal, "--host", "0.0.0.0", context=ssl.create_default_context(cafile=str(cert)))
    assert up.url.startswith("https://127.0.0.1:")
    assert up.get("/v1/models")[0] == 401
    assert up.get("/v1/models", key=text)[0] == 200
    with pytest.raises(OSError, match=r"."):
        urllib.request.urlopen(up.url.replace("https", "http"), timeout=5)
    assert (private_folder(terminal) / "endpoint.pem").stat().st_mode & 0o777 == 0o600
    terminal.run("down")


def test_behind_a_named_proxy_others_are_not_let_in(terminal):
    text = terminal.run("keys", "create")[0].strip()
    terminal.env |= {"FARM_TLS_PROXY": "192.0.2.200", "FARM_PUBLIC_URL": "https://farm.example.org"}
    up = Up(terminal, "--host", "0.0.0.0")
    assert up.url == "https://farm.example.org"
    front = next(member for member in up.family if title(member).startswith("haproxy"))
    ports = [found.laddr for found in front.net_connections("inet") if found.status == psutil.CONN_LISTEN]
    assert [at.ip for at in ports] == ["0.0.0.0"]
    up.url = f"http://127.0.0.1:{ports[0].port}"
    assert up.get("/v1/models", key=text)[0] == 200
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        own = probe.getsockname()[0]
    if not ip_address(own).is_loopback:
        up.url = f"http://{own}:{ports[0].port}"
        with pytest.raises(OSError, match=r"."):
            up.get("/v1/models", key=text)
    terminal.run("down")


def test_a_certificate_without_its_key_and_ray_without_its_token_are_refused(terminal, tmp_path):
    (tmp_path / "cert.pem").write_text("nonsense")
    terminal.env |= {"FARM_TLS_CERT": str(tmp_path / "cert.pem")}
    _, err = terminal.run("up", code=2)
    assert "tls_cert is set and tls_key is not" in err
    terminal.env |= {"FARM_TLS_KEY": str(tmp_path / "cert.pem")}
    _, err = terminal.run("up", "--port", 0, code=2)
    assert "are no certificate and its key" in err
    terminal.env |= {"RAY_AUTH_MODE": "disabled"}
    _, err = terminal.run("up", code=2)
    assert "Ray's ports would take anybody's commands" in err
