"""The endpoint as a team has it: a real `farm up`, asked by the openai client and by everything that goes wrong.

One farm for all of these tests, which leave it as they found it: killed processes are back before the next test.
"""

import asyncio
import base64
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import openai
import pytest
from PIL import Image

from farm.ledger import Ledger
from farm.settings import load_settings
from farm.storage.opening import open_store
from tests.chaos import end
from tests.integration.endpoint import (
    GENERATIONS,
    MAX_WAITING,
    Endpoint,
    Reply,
    ask_all,
    many_files,
    picture,
    request_bytes,
    sleepy,
    until,
)

README = Path(__file__).parents[2] / "README.md"
MB = 2**20


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    endpoint = Endpoint(tmp_path_factory.mktemp("up"))
    try:
        endpoint.await_ready()
        yield endpoint
    finally:
        left = endpoint.close()
    assert left == [], f"farm up left processes behind: {left}\n{endpoint.said()}"


@pytest.fixture(autouse=True)
def nothing_is_left_in_hand(up: Endpoint) -> Iterator[None]:
    """Every test leaves renderers without an urgent image, and an endpoint that answers."""
    yield
    until(lambda: up.ask("/readyz").status == 200)
    until(lambda: up.urgent() == 0)


@pytest.fixture
def client(up: Endpoint) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{up.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def manifest(name: str, *, images: int, steps: int) -> dict[str, object]:
    return {
        "name": name,
        "model": "sleep",
        "prompts": ["sleep"],
        "seeds": {"count": images, "from": "slot"},
        "params": {"num_inference_steps": steps},
    }


def job_state(up: Endpoint, job: str) -> str:
    return str(up.ask(f"/v1/jobs/{job}").json["state"])


def later(up: Endpoint, body: dict[str, object]) -> "tuple[threading.Thread, list[Reply]]":
    """Ask from another thread."""
    replies: list[Reply] = []
    thread = threading.Thread(target=lambda: replies.append(up.ask(GENERATIONS, body, timeout=120)))
    thread.start()
    return thread, replies


# Asked well


def test_the_openai_client_gets_a_picture_with_its_seed_and_the_same_one_again(client):
    first = client.images.generate(
        model="sketch", prompt="a red circle on a white background", size="64x64", response_format="b64_json",
        extra_body={"seed": 7},
    )  # fmt: skip
    data = base64.b64decode(first.data[0].b64_json)
    image = Image.open(io.BytesIO(data))
    assert (image.format, image.size) == ("PNG", (64, 64))
    assert first.data[0].model_extra["seed"] == 7
    assert first.data[0].model_extra["seconds"] > 0
    again = client.images.generate(model="sketch", prompt="a red circle on a white background", extra_body={"seed": 7})
    pixels = Image.open(io.BytesIO(base64.b64decode(again.data[0].b64_json))).convert("RGB").tobytes()
    assert pixels == image.convert("RGB").tobytes()


def test_the_openai_client_gets_links_that_answer_the_picture(up, client):
    answer = client.images.generate(
        model="sketch", prompt="a blue star on a white background", n=2, response_format="url", output_format="webp"
    )
    assert len(answer.data) == 2
    for one in answer.data:
        assert one.url.startswith(up.url)
        got = up.ask(one.url.removeprefix(up.url))
        assert got.status == 200
        assert got.headers["content-type"] == "image/webp"
        assert Image.open(io.BytesIO(got.body)).format == "WEBP"
    assert len({one.model_extra["seed"] for one in answer.data}) == 2


def test_the_openai_client_lists_the_models_and_says_what_is_wrong_in_its_own_classes(client):
    assert {model.id for model in client.models.list()} >= {"sketch", "sleep"}
    assert client.models.retrieve("sketch").id == "sketch"
    with pytest.raises(openai.NotFoundError, match="no-such-model") as unknown:
        client.images.generate(model="no-such-model", prompt="a cat")
    assert unknown.value.code == "unknown_model"
    with pytest.raises(openai.BadRequestError, match="background") as refused:
        client.images.generate(model="sketch", prompt="a cat", background="transparent")
    assert refused.value.param == "background"
    with pytest.raises(openai.BadRequestError, match="num_inference_steps"):
        client.images.generate(model="sketch", prompt="a cat", extra_body={"num_inference_steps": 100_000})


def test_a_batch_of_prompts_is_split_over_the_renderers_and_comes_back_in_order(up):
    prompts = [f"a {color} circle on a white background" for color in ("red", "green", "blue", "yellow")]
    body = {"model": "sketch", "prompts": prompts, "seed": 5, "response_format": "b64_json"}
    whole = up.ask(GENERATIONS, body).json["data"]
    assert len(whole) == 4
    singles = [up.ask(GENERATIONS, picture(prompt, seed=5)).json["data"][0] for prompt in prompts]
    for a, b in zip(whole, singles, strict=True):
        first, second = (Image.open(io.BytesIO(base64.b64decode(one["b64_json"]))).convert("RGB") for one in (a, b))
        worst = max(abs(x - y) for x, y in zip(first.tobytes(), second.tobytes(), strict=True))
        assert worst <= 1, "another batch may change the lowest bit, and no more"


def test_a_job_sent_over_http_is_rendered_and_its_events_tell_so(up):
    body = manifest("events", images=12, steps=20)
    first = up.ask("/v1/jobs/events", body, method="PUT")
    assert first.status in (200, 201), first.body
    assert up.ask("/v1/jobs/events", body, method="PUT").status == 200
    changed = up.ask("/v1/jobs/events", manifest("events", images=13, steps=20), method="PUT")
    assert changed.status == 409
    assert changed.error["code"] == "plan_changed"
    with up.connect("/v1/jobs/events/events") as stream:
        stream.settimeout(60)
        said = b""
        while some := stream.recv(65536):
            said += some
    assert b"text/event-stream" in said
    assert job_state(up, "events") == "done"
    assert up.ask("/v1/jobs/events").json["done"] == 12


# Asked badly


@pytest.mark.parametrize(
    ("body", "headers", "status", "param"),
    [
        (b"{", {}, 400, None),
        (b"[]", {}, 400, None),
        (b'"text"', {}, 400, None),
        (b"[" * 100_000, {}, 400, None),
        (b'{"prompt": "\xff\xfe"}', {}, 400, None),
        (json.dumps(picture(seed=-1)).encode(), {}, 400, "seed"),
        (json.dumps(picture(seed=10**400)).encode(), {}, 400, "seed"),
        (b'{"model": "sketch", "prompt": "x", "guidance_scale": NaN}', {}, 400, None),
        (json.dumps(picture(n=0)).encode(), {}, 400, "n"),
        (json.dumps(picture(n=10**9)).encode(), {}, 400, "n"),
        (json.dumps(picture(size="63x64")).encode(), {}, 400, "size"),
        (json.dumps(picture(stream=True)).encode(), {}, 400, "stream"),
        (json.dumps(picture(prompt="")).encode(), {}, 400, "prompt"),
        (json.dumps(picture()).encode(), {"Content-Type": "text/plain"}, 415, None),
        (json.dumps(picture()).encode(), {"Origin": "http://evil.example"}, 403, None),
        (json.dumps(picture()).encode(), {"Host": "evil.example"}, 403, None),
        (json.dumps(picture()).encode(), {"Authorization": "Bearer farm-nobody-0000"}, 401, None),
    ],
)
def test_a_request_that_cannot_be_is_refused_by_name(up, body, headers, status, param):
    answer = up.ask(GENERATIONS, body, headers=headers)
    assert answer.status == status, answer.body[:500]
    assert answer.error["param"] == param


def test_an_oversized_body_is_refused_before_it_is_read(up):
    before = up.resident_bytes()
    declared = request_bytes(GENERATIONS, {}, "Content-Type: application/json").split(b"\r\nContent-Length")[0]
    started = time.monotonic()
    answer = up.raw(declared + b"\r\nContent-Length: 10000000000\r\n\r\n" + b"x" * MB)
    assert b" 413 " in answer.split(b"\r\n")[0]
    chunk = b"%x\r\n%b\r\n" % (MB, b"x" * MB)
    answer = up.raw(declared + b"\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk * 80)
    assert b" 413 " in answer.split(b"\r\n")[0]
    assert time.monotonic() - started < 10
    assert up.resident_bytes() - before < 64 * MB


def test_what_is_no_http_is_hung_up_on(up):
    for data in (b"GARBAGE\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET / HTTP/9.9\r\n\r\n"):
        first = up.raw(data + b"\r\n\r\n", timeout=10).split(b"\r\n")[0]
        assert first == b"" or b" 4" in first or b" 505 " in first, first
    long = up.raw(request_bytes("/v1/models", None, "X-Long: " + "x" * 200_000), timeout=10).split(b"\r\n")[0]
    assert long == b"" or b" 4" in long, long


# Gone, slow, and a thousand at once


def test_a_client_that_hangs_up_frees_the_renderer_within_a_step_and_touches_nobody_else(up):
    gone = up.connect(GENERATIONS, sleepy(60))
    until(lambda: up.urgent() == 1)
    thread, replies = later(up, sleepy(6, seed=3))
    until(lambda: up.urgent() == 2)
    gone.close()
    until(lambda: up.urgent() == 1, seconds=3)
    assert not replies, "it is the other one that is still drawn"
    thread.join()
    assert replies[0].status == 200
    assert replies[0].json["data"][0]["seed"] == 3


def test_a_thousand_requests_at_once_are_drawn_or_told_when_to_come_again(up):
    up.ask(GENERATIONS, sleepy(0.01))
    before = up.resident_bytes()
    started = time.monotonic()
    with many_files(4096):
        replies = asyncio.run(ask_all(up.port, [sleepy(0.02, seed=i) for i in range(1000)], seconds=100))
    assert {reply.status for reply in replies} <= {200, 503}
    drawn = [reply for reply in replies if reply.status == 200]
    assert len(drawn) >= MAX_WAITING
    for reply in replies:
        if reply.status == 503:  # by the dispatcher, or by the proxy where the gateway is too busy to be reached
            assert reply.error["code"] in ("busy", "farm_unavailable")
            assert int(reply.headers["retry-after"]) >= 1
    assert len({reply.json["data"][0]["seed"] for reply in drawn}) == len(drawn)
    assert up.resident_bytes() - before < 150 * MB
    assert up.ask(GENERATIONS, sleepy(0.01)).status == 200
    assert time.monotonic() - started < 100


def test_slow_readers_cost_nobody_else_time_and_no_memory_without_end(up):
    up.ask("/v1/jobs/slow", manifest("slow", images=200, steps=5), method="PUT")
    before = up.resident_bytes()
    large = {"width": 1024, "height": 1024, "n": 2}  # 8 MB each: more than sockets take in
    with ExitStack() as stack:
        for _ in range(50):
            stack.enter_context(up.connect("/v1/jobs/slow/events", buffer=4096))
        for seed in range(4):
            stack.enter_context(up.connect(GENERATIONS, sleepy(0.01, seed=seed * 2, **large), buffer=4096))
        until(lambda: job_state(up, "slow") == "done", seconds=60)
        until(lambda: up.urgent() == 0, seconds=60)
        for _ in range(5):
            asked = time.monotonic()
            assert up.ask(GENERATIONS, sleepy(0.01)).status == 200
            assert time.monotonic() - asked < 2
        assert up.resident_bytes() - before < 200 * MB


# Killed


def test_images_whose_renderer_is_killed_are_drawn_by_another(up):
    thread, replies = later(up, sleepy(4, seed=9, n=2))
    until(lambda: [renderer["urgent"] for renderer in up.ask("/v1/renderers").json["data"]] == [1, 1])
    first = {process.pid for process in up.find("ray::Renderer")}
    end(min(first))
    thread.join()
    assert replies[0].status == 200, replies[0].body
    assert [image["seed"] for image in replies[0].json["data"]] == [9, 10]
    until(lambda: len({process.pid for process in up.find("ray::Renderer")} - first) == 1, seconds=60)
    until(lambda: len(up.ask("/v1/renderers").json["data"]) == 2, seconds=60)


def test_a_killed_dispatcher_comes_back_and_loses_no_job_and_no_image(up):
    assert up.ask("/v1/jobs/headless", manifest("headless", images=40, steps=20), method="PUT").status in (200, 201)
    thread, replies = later(up, sleepy(3))
    until(lambda: up.urgent() == 1)
    end(up.find("ray::Dispatcher")[0].pid)
    asked = up.ask(GENERATIONS, sleepy(0.05))
    assert asked.status == 200, asked.body
    thread.join()
    assert replies[0].status == 200, replies[0].body
    until(lambda: job_state(up, "headless") == "done", seconds=60)
    ledger = Ledger(open_store(str(up.store), load_settings()))
    rows = list(ledger.rows(ledger.plan("headless")))
    assert [row.index for row in rows] == list(range(40))
    assert {row.status for row in rows} == {"ok"}


def test_a_killed_gateway_is_replaced_its_seats_are_freed_and_its_jobs_go_on(up):
    assert up.ask("/v1/jobs/orphan", manifest("orphan", images=40, steps=20), method="PUT").status in (200, 201)
    gone = up.connect(GENERATIONS, sleepy(90))
    until(lambda: up.urgent() == 1)
    for replica in up.find("ray::ServeReplica"):
        end(replica.pid)
    gone.settimeout(30)
    assert b" 200 " not in gone.recv(65536).split(b"\r\n")[0]
    gone.close()
    until(lambda: answers(up), seconds=30)
    until(lambda: up.urgent() == 0, seconds=45)
    until(lambda: job_state(up, "orphan") == "done", seconds=60)


def answers(up: Endpoint) -> bool:
    try:
        return up.ask(GENERATIONS, sleepy(0.01), timeout=20).status == 200
    except OSError:
        return False


# What the README says


def snippets(section: str) -> list[tuple[str, str]]:
    """Language and text of the code blocks of the README's sections whose heading has this word."""
    found, inside = [], False
    for part in re.split(r"(?m)^(?=#+ )", README.read_text()):
        inside = section in part.split("\n", 1)[0].lower()
        if inside:
            found += re.findall(r"```(sh|python|toml)\n(.*?)```", part, re.DOTALL)
    return found


def test_every_snippet_of_the_readme_on_the_endpoint_runs(up, tmp_path, monkeypatch):
    shown = snippets("endpoint")
    assert shown, "the README has no section on the endpoint"
    (tmp_path / "manifests").symlink_to(README.parent / "manifests")
    env = up.env | {"FARM_URL": up.url, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for language, text in shown:
        text = re.sub(r"http://(127\.0\.0\.1|localhost):8000", up.url, text)
        if language == "toml":
            (tmp_path / "settings").mkdir(exist_ok=True)
            monkeypatch.chdir(tmp_path / "settings")
            Path("farm.toml").write_text(text)
            assert load_settings().model_fields_set, "a farm takes these settings"
            continue
        if language == "sh":  # the farm is up already, and stays up for the other snippets
            text = "".join(
                line for line in text.splitlines(True) if not re.match(r"([A-Z_]+=\S+ )*farm (up|down)\b", line)
            )
        command = ["bash", "-euo", "pipefail", "-c", text] if language == "sh" else [sys.executable, "-c", text]
        done = subprocess.run(
            command,
            env=env,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
