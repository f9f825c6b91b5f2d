"""Who and what comes in: hosts, origins, bodies, keys."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from farm.keys import create_key, revoke_key
from farm.ledger import Ledger
from farm.server import doors
from farm.server.doors import BODY_BYTES, MANIFEST_BYTES, Doors
from farm.server.errors import error_answer
from farm.server.services import Services, build_services
from farm.settings import Settings
from farm.storage.local import LocalStore

NOW = datetime(2026, 11, 21, 12, tzinfo=UTC)
HERE = "http://127.0.0.1:8000"


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """An app that reads the body and says whose key it was."""
    if scope["type"] != "http":
        return
    try:
        body = await Request(scope, receive).body()
    except doors.HTTPException as exc:
        await error_answer(exc.status_code, exc.detail)(scope, receive, send)
        return
    caller = scope.get("caller")
    await JSONResponse({"bytes": len(body), "owner": caller and caller.owner})(scope, receive, send)


class Clock:
    def __init__(self) -> None:
        self.now = NOW.timestamp()

    def __call__(self) -> float:
        return self.now


def services_for(folder: Path, **settings: Any) -> Services:
    given = Settings(**{"store": str(folder / "store"), "owner": "me"} | settings)
    ledger = Ledger(LocalStore(folder / "store"))
    link: Any = None  # no route, so nobody asks the farm
    return build_services(given, name="gateway-0", incarnation="1", link=link, ledger=ledger, wall=Clock())


@pytest.fixture
def services(tmp_path: Path) -> Services:
    return services_for(tmp_path)


@pytest.fixture
def closed(tmp_path: Path) -> Services:
    """Of an endpoint that others reach, so that it wants keys."""
    return services_for(tmp_path, http_host="0.0.0.0", public_url="https://farm.example.org")


def send(services: Services, method: str = "GET", path: str = "/v1/models", *, base: str = HERE, **options: Any) -> Any:
    async def main() -> httpx2.Response:
        transport = httpx2.ASGITransport(app=Doors(echo, services))
        async with httpx2.AsyncClient(transport=transport, base_url=base) as client:
            return await client.request(method, path, **options)

    return asyncio.run(main())


def error(answer: Any) -> tuple[int, str, str]:
    said = answer.json()["error"]
    return answer.status_code, said["message"], said["code"]


def test_on_loopback_without_a_key_one_is_the_local_user(services):
    answer = send(services)
    assert (answer.status_code, answer.json()["owner"]) == (200, "me")
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1", "[::1]:8000", "LOCALHOST"])
def test_loopback_has_several_names(services, host):
    assert send(services, headers={"host": host}).status_code == 200


@pytest.mark.parametrize("host", ["evil.example:8000", "localhost.evil.example", "10.0.0.1", ""])
def test_without_keys_a_name_of_anywhere_is_refused(services, host):
    status, message, code = error(send(services, headers={"host": host}))
    assert (status, code) == (403, "host")
    assert message.startswith(f"host {host.partition(':')[0]!r} is not a name of this endpoint")


def test_another_sites_page_is_refused_and_ones_own_is_not(services):
    assert error(send(services, headers={"origin": "http://evil.example"})) == (
        403,
        "requests from other sites' pages are not answered",
        "origin",
    )
    assert send(services, headers={"origin": "null"}).status_code == 403
    assert send(services, headers={"origin": "http://[bad"}).status_code == 403
    assert send(services, headers={"origin": "http://127.0.0.1:9999"}).status_code == 403
    assert send(services, headers={"origin": HERE}).status_code == 200


def test_a_public_name_is_an_origin_of_ones_own(closed):
    key = create_key(closed.ledger.store, owner="ann", scopes=("read",), at=NOW)
    headers = {"authorization": f"Bearer {key.text}", "origin": "https://farm.example.org"}
    assert send(closed, headers=headers).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None])
def test_only_json_is_read(services, kind):
    headers = {"content-type": kind} if kind else {}
    status, message, code = error(send(services, "POST", "/v1/images/generations", content=b"{}", headers=headers))
    assert (status, code) == (415, "media_type")
    assert message == f"a body of type {kind or 'unknown'} is not read; send application/json"


def test_jobs_may_be_yaml(services):
    headers = {"content-type": "application/yaml; charset=utf-8"}
    assert send(services, "POST", "/v1/jobs", content=b"name: x", headers=headers).json()["bytes"] == 7
    assert send(services, "POST", "/v1/images/generations", content=b"x", headers=headers).status_code == 415


def test_compressed_bodies_are_not_read(services):
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    assert send(services, "POST", "/v1/jobs", content=b"x", headers=headers).status_code == 415


def test_a_body_that_says_it_is_too_large_is_not_read(services):
    headers = {"content-type": "application/json"}
    status, message, _ = error(
        send(services, "POST", "/v1/images/generations", content=b"x" * (BODY_BYTES + 1), headers=headers)
    )
    assert (status, message) == (413, f"the body has {BODY_BYTES + 1} bytes, at most {BODY_BYTES} are taken; send less")
    assert (
        send(services, "POST", "/v1/jobs", content=b"x" * (BODY_BYTES + 1), headers=headers).json()["bytes"]
        > BODY_BYTES
    )


def test_a_body_in_pieces_ends_where_it_is_too_large(services):
    sent = 0

    async def pieces() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(100):
            sent += 2**20
            yield b"x" * 2**20

    status, message, _ = error(
        send(services, "POST", "/v1/jobs", content=pieces(), headers={"content-type": "application/json"})
    )
    assert status == 413
    assert message == f"the body has more than the {MANIFEST_BYTES} bytes that are taken; send less"
    assert sent <= MANIFEST_BYTES + 2 * 2**20


def test_a_body_that_does_not_come_is_given_up(services, monkeypatch):
    monkeypatch.setattr(doors, "BODY_S", 0.05)

    async def dribble() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(5)
        yield b"}"

    status, message, _ = error(
        send(services, "POST", "/v1/jobs", content=dribble(), headers={"content-type": "application/json"})
    )
    assert (status, message) == (408, "the body did not arrive within 0.05 s; send it again")


def test_an_endpoint_that_others_reach_wants_a_key(closed):
    answer = send(closed)
    assert error(answer) == (
        401,
        "this endpoint needs a key: send Authorization: Bearer farm-..., as `farm keys create` shows it",
        "unauthorized",
    )
    assert answer.headers["www-authenticate"] == 'Bearer realm="farm"'
    assert send(closed, headers={"authorization": "Basic eDp5"}).status_code == 401
    assert send(closed, headers={"authorization": "Bearer sk-other"}).status_code == 401
    for path in ("/healthz", "/readyz", "/docs", "/openapi.json"):
        assert send(closed, path=path).status_code == 200


def test_a_key_says_who_asks_until_it_is_revoked(closed):
    made = create_key(closed.ledger.store, owner="ann", scopes=("render",), at=NOW)
    headers = {"authorization": f"Bearer {made.text}"}
    assert send(closed, headers=headers).json()["owner"] == "ann"
    revoke_key(closed.ledger.store, made.key.id, at=NOW)
    closed.wall.now += 6
    status, message, _ = error(send(closed, headers=headers))
    assert status == 401
    assert message.startswith(f"key {made.key.id} was revoked at ")


def test_a_key_ends_by_itself(closed):
    made = create_key(
        closed.ledger.store, owner="ann", scopes=("read",), at=NOW, expires_at=NOW + timedelta(seconds=10)
    )
    headers = {"authorization": f"Bearer {made.text}"}
    assert send(closed, headers=headers).status_code == 200
    closed.wall.now += 11
    assert send(closed, headers=headers).status_code == 401


def test_on_loopback_another_programs_key_is_passed_over_and_one_of_ours_is_checked(services):
    assert send(services, headers={"authorization": "Bearer sk-not-needed"}).json()["owner"] == "me"
    assert send(services, headers={"authorization": f"Bearer farm-{'0' * 12}-{'0' * 64}"}).status_code == 401
    made = create_key(services.ledger.store, owner="ann", scopes=("read",), at=NOW)
    assert send(services, headers={"authorization": f"Bearer {made.text}"}).json()["owner"] == "ann"


def test_requests_are_counted_with_their_status(services):
    send(services)
    send(services, headers={"host": "evil.example"})
    samples = {(one.name, one.labels): one.value for one in services.meters.snapshot().samples}
    for status in ("200", "403"):
        labels = (("method", "GET"), ("route", "none"), ("status", status))
        assert samples["farm_http_requests_total", labels] == 1
    assert samples["farm_http_in_flight", ()] == 0


def held_back(services: Services, head: str) -> tuple[bytes, float]:
    """What a live server sends to one who begins a body and says no more, and after how many seconds it hangs up."""

    async def main() -> tuple[bytes, float]:
        config = uvicorn.Config(Doors(echo, services), log_level="error", lifespan="off", timeout_keep_alive=90)
        config.load()
        server = uvicorn.Server(config)
        ours, theirs = socket.socketpair()
        await asyncio.get_running_loop().connect_accepted_socket(
            lambda: config.http_protocol_class(config, server.server_state, {}), theirs
        )
        reader, writer = await asyncio.open_connection(sock=ours)
        began = time.monotonic()
        writer.write(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        answer = await asyncio.wait_for(reader.read(), 10)
        seconds = time.monotonic() - began
        writer.close()
        await writer.wait_closed()
        await asyncio.sleep(0.05)  # in which the server's end of it is closed too
        return answer, seconds

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("head", "status"),
    [
        ("POST /v1/jobs HTTP/1.1\r\nHost: evil.example\r\n", b"403"),
        ("POST /v1/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: text/plain\r\n", b"415"),
        (
            "POST /v1/jobs HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nAuthorization: Bearer farm-x\r\n",
            b"401",
        ),
    ],
)
def test_who_is_refused_cannot_keep_the_connection_by_holding_back_the_body(services, monkeypatch, head, status):
    monkeypatch.setattr(doors, "LINGER_S", 0.1)
    answer, seconds = held_back(services, head)
    assert answer.startswith(b"HTTP/1.1 " + status)
    assert b"connection: close" in answer
    assert answer.endswith(b"}")
    assert 0.05 < seconds < 2


def test_a_body_that_was_read_keeps_the_connection(services):
    answer = send(services, "POST", "/v1/jobs", content=b"{}", headers={"content-type": "application/json"})
    assert "connection" not in answer.headers
    refused = send(services, "POST", "/v1/jobs", content=b"{}", headers={"content-type": "text/plain"})
    assert refused.headers["connection"] == "close"
    assert "connection" not in send(services, headers={"host": "evil.example"}).headers
