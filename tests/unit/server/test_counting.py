"""What a farm does shows at /metrics: jobs, urgent images, refusals, losses, HTTP."""

import asyncio
from pathlib import Path
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from farm.engine import Engine
from farm.errors import RenderError, StoreUnavailableError
from farm.ledger import Ledger
from farm.portion import Allowance, Entry
from tests.unit.server.farm_in_process import FarmInProcess

IMAGE = {"model": "sketch", "prompt": "a red circle", "size": "64x64", "num_inference_steps": 2}
JOB = {
    "name": "three",
    "model": "sketch",
    "prompts": ["a red circle", "a blue square", "a green star"],
    "params": {"width": 64, "height": 64, "num_inference_steps": 2},
}
DRAWN = 'farm_images_total{class="urgent",model="sketch",status="ok"}'


@pytest.fixture(autouse=True)
def _told_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farm.renderer.REPORT_S", 0.05)
    monkeypatch.setattr("farm.server.gateway.HOLD_S", 0.05)


async def scrape(client: httpx2.AsyncClient) -> dict[str, float]:
    """What /metrics shows, as `name{label="value",...}` by Prometheus's own spelling."""
    answer = await client.get("/metrics")
    assert answer.status_code == 200
    found = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            labels = ",".join(f'{name}="{value}"' for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


async def until(client: httpx2.AsyncClient, expected: dict[str, float], *, told: str | None = None) -> dict[str, float]:
    """Scrape until everyone has told what it counted and these numbers show, and `told` at all: fractions of a second."""
    shown: dict[str, float] = {}
    for _ in range(300):
        shown = await scrape(client)
        if expected.items() <= shown.items() and (told is None or told in shown):
            return shown
        await asyncio.sleep(0.1)
    raise AssertionError(f"{ {name: shown.get(name) for name in expected} } after 30 s, expected {expected}")


async def ended(client: httpx2.AsyncClient, job: str) -> None:
    """Wait for a job's end, with which its events end."""
    async with asyncio.timeout(60), client.stream("GET", f"/v1/jobs/{job}/events") as events:
        await events.aread()


def test_urgent_images_are_counted_by_who_draws_and_who_stores_them(tmp_path: Path):
    async def main() -> None:
        async with FarmInProcess(tmp_path) as farm, farm.http() as client:
            answer = await client.post("/v1/images/generations", json=IMAGE | {"n": 2})
            assert answer.status_code == 200, answer.text
            await farm.services.keeping.close()
            generations = 'farm_http_requests_total{method="POST",route="/v1/images/generations",status="200"}'
            expected = {DRAWN: 2, generations: 1, 'farm_renderers{state="idle"}': 1, "farm_seats": 0}
            shown = await until(client, expected, told='farm_stored_bytes_total{class="urgent"}')
            for stage in ("encode", "denoise", "decode"):
                assert shown[f'farm_stage_seconds_total{{class="urgent",model="sketch",stage="{stage}"}}'] > 0
            assert shown['farm_stored_bytes_total{class="urgent"}'] > 2 * 1000
            assert shown['farm_urgent_wait_seconds_count{kind="idle"}'] == 1
            assert shown['farm_model_load_seconds_count{kind="load",model="sketch"}'] == 1
            assert shown['farm_model_load_seconds_sum{kind="load",model="sketch"}'] > 0
            idle = 'farm_idle_seconds_total{renderer="renderer-0"}'
            await asyncio.sleep(0.5)
            assert (await scrape(client))[idle] > shown[idle] > 0

    asyncio.run(main())


def test_a_jobs_images_are_counted_by_its_receipts(tmp_path: Path):
    async def main() -> None:
        async with FarmInProcess(tmp_path) as farm, farm.http() as client:
            answer = await client.put("/v1/jobs/three", json=JOB)
            assert answer.status_code in (200, 201), answer.text
            await ended(client, "three")
            rendered = 'farm_images_total{class="bulk",model="sketch",status="ok"}'
            shown = await until(client, {rendered: 3, 'farm_queue_images{class="bulk"}': 0})
            assert shown['farm_stored_bytes_total{class="bulk"}'] > 3 * 1000
            for stage in ("encode", "denoise", "decode", "write"):
                assert shown[f'farm_stage_seconds_total{{class="bulk",model="sketch",stage="{stage}"}}'] > 0

    asyncio.run(main())


def test_failures_are_counted_by_code_and_shards_that_come_back_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawing, committing, away = Engine.render_batch, Ledger.commit, iter((True,))

    def render_batch(self: Engine, batch: Any, **arguments: Any) -> Any:
        if any(spec.prompt == "trouble" for spec in batch.specs):
            raise RenderError("the kernel is not amused")
        return drawing(self, batch, **arguments)

    def commit(self: Ledger, *arguments: Any) -> bool:
        if next(away, False):
            raise StoreUnavailableError("the bucket does not answer")
        return committing(self, *arguments)

    monkeypatch.setattr(Engine, "render_batch", render_batch)
    monkeypatch.setattr(Ledger, "commit", commit)

    async def main() -> None:
        async with FarmInProcess(tmp_path) as farm, farm.http() as client:
            await client.post("/v1/images/generations", json=IMAGE | {"prompt": "trouble"})
            await client.put("/v1/jobs/three", json=JOB | {"prompts": ["a red circle", "trouble"]})
            await ended(client, "three")
            expected = {'farm_retries_total{code="store_unavailable"}': 1.0}
            for kind in ("urgent", "bulk"):
                expected[f'farm_failures_total{{class="{kind}",code="render"}}'] = 1
                expected[f'farm_images_total{{class="{kind}",model="sketch",status="failed"}}'] = 1
            await until(client, expected)

    asyncio.run(main())


def test_a_job_that_waits_shows_in_the_queue(tmp_path: Path):
    async def main() -> None:
        async with FarmInProcess(tmp_path) as farm, farm.http() as client:
            await farm.drain("renderer-0", True)
            await client.put("/v1/jobs/three", json=JOB)
            waiting = {'farm_queue_images{class="bulk"}': 3, 'farm_jobs{state="waiting"}': 1}
            await until(client, waiting | {'farm_renderers{state="drained"}': 1})
            await asyncio.sleep(1.0)  # a job's submission is known to the second
            assert 1 <= (await scrape(client))['farm_queue_age_seconds{class="bulk"}'] < 60

    asyncio.run(main())


def test_refusals_seats_and_lost_renderers_are_counted_by_the_dispatcher(tmp_path: Path):
    async def main() -> None:
        async with FarmInProcess(tmp_path) as farm, farm.http() as client:
            await client.post("/v1/images/generations", json=IMAGE)
            entry = Entry("a", "gateway-x", "ann", "key", Allowance(images_at_once=2), "sketch", images=2, steps=4)
            assert (await farm.enter(entry)).refusal is None
            refused = Entry("b", "gateway-x", "ann", "key", Allowance(images_at_once=2), "sketch", images=1, steps=2)
            assert (await farm.enter(refused)).refusal is not None
            waiting = {"farm_seats": 1, 'farm_queue_images{class="urgent"}': 2}
            shown = await until(client, waiting | {DRAWN: 1, 'farm_refusals_total{code="at_once"}': 1})
            assert shown['farm_queue_age_seconds{class="urgent"}'] > 0
            assert (shown["farm_gateways"], shown["farm_seats_expired_total"]) == (1, 0)
            farm.kill("renderer-0")
            await farm.until(lambda: "renderer-0" in farm.renderers)
            again = {"farm_renderer_losses_total": 1, "farm_seats": 0}
            await until(client, again | {DRAWN: 1})  # the dead renderer's count stays

    asyncio.run(main())


def test_a_seat_whose_gateway_is_silent_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("farm.places.SEAT_S", 0.2)

    async def main() -> None:
        async with FarmInProcess(tmp_path) as farm, farm.http() as client:
            await farm.enter(Entry("a", "gateway-x", "ann", "", Allowance(), "sketch", images=1, steps=2))
            await until(client, {"farm_seats_expired_total": 1, "farm_seats": 0})

    asyncio.run(main())


def test_http_requests_are_counted_by_route_and_status(tmp_path: Path):
    async def main() -> None:
        async with FarmInProcess(tmp_path) as farm, farm.http() as client:
            for path in ("/healthz", "/healthz", "/v1/models/none-such", "/v1/jobs/none-such", "/what"):
                await client.get(path)
            await client.post("/v1/images/generations", json=IMAGE | {"n": 0})
            bad = 'farm_http_requests_total{method="POST",route="/v1/images/generations",status="400"}'
            shown = await until(client, {bad: 1})
            assert shown['farm_http_requests_total{method="GET",route="/healthz",status="200"}'] == 2
            assert shown['farm_http_request_seconds_count{method="GET",route="/healthz"}'] == 2
            assert 0 < shown['farm_http_request_seconds_sum{method="GET",route="/healthz"}'] < 2
            assert sum(value for name, value in shown.items() if 'status="404"' in name) == 3
            assert not any("none-such" in name or "what" in name for name in shown), "labels are bounded"
            assert shown["farm_http_in_flight"] <= 1

    asyncio.run(main())


def test_openmetrics_is_given_to_who_asks(tmp_path: Path):
    async def main() -> None:
        async with FarmInProcess(tmp_path) as farm, farm.http() as client:
            answer = await client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
            assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
            assert answer.text.endswith("# EOF\n")

    asyncio.run(main())
