"""The endpoint held to its own OpenAPI document by schemathesis: no 5xx, and every answer as the schema says.

The app and the farm behind it are real, in this process and without Ray, which makes hundreds of questions cheap.
"""

import asyncio
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx2
import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from tests.integration.endpoint import free_port, until
from tests.unit.server.farm_in_process import FarmInProcess

CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
    negative_data_rejection,
    unsupported_method,
)
REFUSALS = [400, 401, 403, 404, 405, 409, 413, 415]
"""How what the document does not allow may be answered."""
EXAMPLES = 12
JOB = "done-job"
MANIFEST = {"model": "sketch", "prompts": ["a red circle"], "params": {"num_inference_steps": 1}}
FREE = ("seed", "response_format", "output_format", "negative_prompt", "guidance_scale", "user")
"""Fields of a request for images whose values no model restricts."""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The endpoint on loopback, with a finished job and a kept image."""
    port, running, ended = free_port(), threading.Event(), threading.Event()
    failed: list[BaseException] = []
    thread = threading.Thread(
        target=lambda: asyncio.run(_serve(tmp_path_factory.mktemp("openapi"), port, running, ended, failed))
    )
    thread.start()
    try:
        until(lambda: running.is_set() or failed, seconds=60)
        assert not failed, failed
        yield f"http://127.0.0.1:{port}"
    finally:
        ended.set()
        thread.join(30)
    assert not failed, failed


async def _serve(
    folder: Path, port: int, running: threading.Event, ended: threading.Event, failed: list[BaseException]
) -> None:
    try:
        async with FarmInProcess(folder) as farm:
            server = uvicorn.Server(uvicorn.Config(farm.app, port=port, lifespan="off", log_config=None))
            serving = asyncio.create_task(server._serve())
            await farm.until(lambda: server.started)
            running.set()
            await asyncio.to_thread(ended.wait)
            server.should_exit = True
            await serving
    except BaseException as exc:
        failed.append(exc)
        raise


@pytest.fixture(scope="module")
def known(url: str) -> dict[str, str]:
    """Ids of what is there, by the word of the path that they follow."""
    with httpx2.Client(base_url=url, timeout=60) as client:
        assert client.put(f"/v1/jobs/{JOB}", json=MANIFEST | {"name": JOB}).status_code in (200, 201)
        asked = {"model": "sketch", "prompt": "a red circle", "num_inference_steps": 1, "response_format": "url"}
        image = client.post("/v1/images/generations", json=asked).json()["data"][0]["id"]
        until(lambda: client.get(f"/v1/jobs/{JOB}").json()["state"] == "done")
        renderer = client.get("/v1/renderers").json()["data"][0]["name"]
    return {"jobs": JOB, "images": image, "renderers": renderer, "models": "sketch"}


@pytest.fixture(scope="module")
def document(url: str, known: dict[str, str]) -> Any:
    config = {"checks": {"negative_data_rejection": {"expected-statuses": REFUSALS}}}
    return schemathesis.openapi.from_url(f"{url}/openapi.json", config=schemathesis.Config.from_dict(config))


def test_every_answer_is_as_the_document_says_and_none_is_a_failure_of_the_farm(document, known, subtests):
    operations = [result.ok() for result in document.get_all_operations()]
    assert len(operations) > 20
    for operation in sorted(operations, key=lambda one: one.method == "delete"):
        with subtests.test(operation.label):
            ask(operation, GenerationMode.NEGATIVE, lambda case: case)
            ask(operation, GenerationMode.POSITIVE, partial(at_home, known=known))


def ask(operation: Any, mode: GenerationMode, change: Callable[[Any], Any]) -> None:
    """Ask in ways that the document allows, or in ways that it does not."""

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def check(case: Any) -> None:
        change(case).call_and_validate(checks=CHECKS, timeout=30)

    try:
        check()
    except Unsatisfiable:
        assert mode is GenerationMode.NEGATIVE, "a call without parameters cannot be made wrongly"


def at_home(case: Any, known: dict[str, Any]) -> Any:
    """Every other question is of what is there: made-up names and bodies alone get no further than a refusal."""
    if len(str(case.path_parameters) + str(case.query) + str(case.body)) % 2:
        kind = case.path.split("/")[2] if case.path.startswith("/v1/") else ""
        for name in case.path_parameters or {}:
            case.path_parameters[name] = 0 if name == "index" else known[kind]
        if case.path == "/v1/images/generations":
            kept = {name: value for name, value in case.body.items() if name in FREE}
            case.body = kept | {"model": "sketch", "prompt": "a red circle", "num_inference_steps": 1}
        elif case.method in ("POST", "PUT") and case.path in ("/v1/jobs", "/v1/jobs/{id}"):
            case.body = MANIFEST | {"name": JOB}
    return case
