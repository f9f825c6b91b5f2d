"""The app as a whole: health, metrics, the document, answers to what is not there."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from farm.server.docs import OPEN
from tests.unit.server.farm_in_process import FarmInProcess

Test = Callable[[FarmInProcess, httpx2.AsyncClient], Awaitable[None]]


def with_farm(folder: Path, test: Test, **settings: Any) -> None:
    async def main() -> None:
        async with FarmInProcess(folder, **settings) as farm, farm.http() as http:
            await test(farm, http)

    asyncio.run(main())


def test_the_endpoint_lives_though_the_farm_is_away(tmp_path):
    async def test(farm: FarmInProcess, http: httpx2.AsyncClient) -> None:
        ready = await http.get("/readyz")
        assert (ready.status_code, ready.json()) == (200, {"status": "ready", "version": "0.1.0", "renderers": 1})
        await asyncio.sleep(0.6)
        farm.away = True
        assert (await http.get("/healthz")).json() == {"status": "ok"}
        away = await http.get("/readyz")
        assert (away.status_code, away.json()["error"]["code"]) == (503, "farm_unavailable")
        assert away.headers["retry-after"] == "5"
        farm.away = False

    with_farm(tmp_path, test)


def test_metrics_are_for_who_may_read_and_name_the_gateway(tmp_path):
    async def test(farm: FarmInProcess, http: httpx2.AsyncClient) -> None:
        answer = await http.get("/metrics")
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/plain; version=")
        assert "farm_gateways 1.0" in answer.text
        asked = await http.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
        assert asked.headers["content-type"].startswith("application/openmetrics-text")

    with_farm(tmp_path, test)


def test_with_keys_only_health_and_documentation_are_open(tmp_path):
    async def test(farm: FarmInProcess, http: httpx2.AsyncClient) -> None:
        for path in sorted(OPEN):
            assert (await http.get(path)).status_code == 200
        for path in ("/metrics", "/v1/models", "/v1/jobs", "/v1/renderers", "/nothing"):
            assert (await http.get(path)).status_code == 401

    with_farm(tmp_path, test, public_url="https://farm.example.org")


def test_what_is_not_there_is_said_in_openais_shape(tmp_path):
    async def test(farm: FarmInProcess, http: httpx2.AsyncClient) -> None:
        nothing = await http.get("/v2/images")
        assert (nothing.status_code, nothing.json()["error"]) == (
            404,
            {
                "message": 'there is nothing at "/v2/images"; /docs shows what there is',
                "type": "not_found_error",
                "param": None,
                "code": "not_found",
            },
        )
        wrong = await http.delete("/v1/models")
        assert (wrong.status_code, wrong.headers["allow"]) == (405, "GET, HEAD")
        assert wrong.json()["error"]["message"] == 'DELETE is not for "/v1/models", which takes GET, HEAD'
        for method, path, takes in (
            ("DELETE", "/v1/jobs", "GET, HEAD, POST"),
            ("DELETE", "/v1/jobs/x", "GET, HEAD, PUT"),
            ("GET", "/v1/images/generations", "POST"),
            ("PUT", "/v1/images/x", "DELETE, GET, HEAD"),
            ("HEAD", "/v1/jobs/x/events", "GET"),
            ("PUT", "/v1/jobs/x/pause", "POST"),
        ):
            refused = await http.request(method, path)
            assert (refused.status_code, refused.headers["allow"]) == (405, takes), path


def test_head_is_answered_as_get_without_its_body(tmp_path):
    async def test(farm: FarmInProcess, http: httpx2.AsyncClient) -> None:
        for path in ("/healthz", "/v1/models", "/v1/models/sketch", "/openapi.json", "/v1/images"):
            got, head = await http.get(path), await http.head(path)
            assert (head.status_code, head.content) == (200, b""), path
            assert head.headers["content-length"] == str(len(got.content))
        missing = await http.head("/v1/images/x/content")
        assert (missing.status_code, missing.content) == (404, b"")

    with_farm(tmp_path, test)


def test_the_document_knows_every_route_its_errors_and_its_key(tmp_path):
    async def test(farm: FarmInProcess, http: httpx2.AsyncClient) -> None:
        document = (await http.get("/openapi.json")).json()
        assert {"/v1/images/generations", "/v1/models/{id}", "/v1/jobs/{id}/events", "/metrics"} <= set(
            document["paths"]
        )
        assert "HTTPValidationError" not in json.dumps(document)
        assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
        for path, methods in document["paths"].items():
            for route in methods.values():
                schema = route["responses"]["400"]["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/ErrorAnswer"}, path
        page = await http.get("/docs")
        assert page.headers["content-security-policy"].startswith("default-src 'none'")
        assert "num_inference_steps" in page.text
        assert "http://" not in page.text
        assert "https://" not in page.text

    with_farm(tmp_path, test)


@pytest.mark.parametrize("warm", [False, True])
def test_a_model_says_how_soon_it_draws(tmp_path, warm):
    async def test(farm: FarmInProcess, http: httpx2.AsyncClient) -> None:
        model = (await http.get("/v1/models/sketch")).json()
        assert (model["id"], model["object"], model["owned_by"]) == ("sketch", "model", "farm")
        assert list(model["presets"]) == ["draft", "standard", "final"]
        assert model["readiness"]["state"] in (("warm", "loaded") if warm else ("cold",))
        ask = {"model": "sketch", "prompt": "a red circle", "num_inference_steps": 1, "guidance_scale": 0}
        assert (await http.post("/v1/images/generations", json=ask)).status_code == 200
        async with asyncio.timeout(20):
            while (readiness := (await http.get("/v1/models/sketch")).json()["readiness"])["state"] != "loaded":  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        assert readiness["renderers"] == 1
        assert readiness["wait_seconds"] is not None
        listed = (await http.get("/v1/models")).json()
        assert listed["object"] == "list"
        assert {"sketch", "z-image-turbo"} < {one["id"] for one in listed["data"]}

    with_farm(tmp_path, test, reserve=[{"warm": ["sketch"]}] if warm else [])


def test_models_are_told_though_the_farm_is_away(tmp_path):
    async def test(farm: FarmInProcess, http: httpx2.AsyncClient) -> None:
        farm.away = True
        model = (await http.get("/v1/models/sketch")).json()
        assert model["readiness"]["state"] == "unknown"
        missing = await http.get("/v1/models/sketsh")
        assert (missing.status_code, missing.json()["error"]["param"]) == (404, "model")
        farm.away = False

    with_farm(tmp_path, test)
