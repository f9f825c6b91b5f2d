"""Pictures over HTTP, by the openai client and by hand, from a real farm in this process."""

import asyncio
import base64
import hashlib
import io
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from PIL import Image

from farm.errors import StoreUnavailableError
from farm.keys import create_key
from farm.portion import Allowance, Portion
from farm.server import images
from farm.server.gateway import TRIES
from farm.server.images import ImagesAnswer
from tests.unit.server.farm_in_process import URL, FarmInProcess

Test = Callable[[FarmInProcess, Any], Awaitable[None]]
PATH = "/v1/images/generations"
ASK = {"model": "sketch", "prompt": "a red circle", "num_inference_steps": 1, "guidance_scale": 0.0}

ASK_OPENAI: Any = {"model": "sketch", "prompt": "a red circle", "quality": "low"}


def with_farm(folder: Path, test: Test, *, key: str = "not-needed", **options: Any) -> None:
    async def main() -> None:
        async with FarmInProcess(folder, **options) as farm, farm.http() as http:
            client = openai.AsyncOpenAI(base_url=f"{URL}/v1", api_key=key, http_client=http, max_retries=0)
            await test(farm, client)

    asyncio.run(main())


@asynccontextmanager
async def by_hand(farm: FarmInProcess, **headers: str) -> AsyncIterator[httpx2.AsyncClient]:
    async with farm.http(headers=headers) as http:
        yield http


def test_warnings_come_with_the_answer(tmp_path):
    async def test(farm: FarmInProcess, _client: Any) -> None:
        async with by_hand(farm) as http:
            plain = await http.post(PATH, json=ASK)
            assert "warnings" not in plain.json()
            asked = {**ASK, "prompt": None, "prompts": ["a red circle", "nike shoes", "nike shoes"]}
            warned = (await http.post(PATH, json=asked)).json()
        assert warned["warnings"] == [
            {
                "code": "brand",
                "text": "names a brand (nike), which tends to be drawn as a logo; take it out",
                "where": "prompts.1",
            }
        ]
        assert len(warned["data"]) == 3
        ImagesAnswer.model_validate(warned)
        await farm.services.keeping.close()
        kept = [farm.services.singles.get(one["id"], now=farm.services.wall()) for one in warned["data"]]
        assert [one.warnings for one in kept] == [None, "brand", "brand"]

    with_farm(tmp_path, test)


def test_the_openai_client_draws_a_picture_with_a_seed(tmp_path):
    async def test(farm: FarmInProcess, client: openai.AsyncOpenAI) -> None:
        first = await client.images.generate(
            model="sketch", prompt="a red circle", size="64x64", extra_body={"seed": 7}
        )
        data = base64.b64decode(first.data[0].b64_json)
        picture = Image.open(io.BytesIO(data))
        assert (picture.format, picture.size) == ("PNG", (64, 64))
        assert first.data[0].seed == 7
        assert first.data[0].url is None
        assert first.created > 1_700_000_000
        again = await client.images.generate(model="sketch", prompt="a red circle", extra_body={"seed": 7})
        assert again.data[0].b64_json == first.data[0].b64_json

    with_farm(tmp_path, test)


def test_a_farm_that_keeps_no_images_answers_without_ids_and_refuses_links(tmp_path):
    async def test(farm: FarmInProcess, client: openai.AsyncOpenAI) -> None:
        answer = await client.images.generate(**ASK_OPENAI)
        assert base64.b64decode(answer.data[0].b64_json).startswith(b"\x89PNG")
        assert not hasattr(answer.data[0], "id")
        assert list(farm.ledger.store.list("singles/")) == []
        with pytest.raises(openai.BadRequestError, match="keeps no images that a link could lead to; ask for b64_json"):
            await client.images.generate(**ASK_OPENAI, response_format="url")

    with_farm(tmp_path, test, images_days=0)


def test_every_field_of_openais_and_of_ours_has_its_effect(tmp_path):
    async def test(farm: FarmInProcess, client: openai.AsyncOpenAI) -> None:
        answer = await client.images.generate(
            model="sketch",
            prompt="",
            n=2,
            size="auto",
            quality="low",
            output_format="webp",
            output_compression=50,
            response_format="b64_json",
            user="eve",
            extra_body={"prompts": ["a red circle", "a blue star"], "negative_prompt": "green", "seed": 3},
        )
        assert [one.seed for one in answer.data] == [3, 4, 3, 4]
        assert answer.output_format == "webp"
        assert answer.size == "64x64"
        portion = farm.drawn[0][1]
        assert (portion.output.format, portion.output.quality) == ("webp", 50)
        assert {spec.prompt for _, one in farm.drawn for spec in one.specs} == {"a red circle", "a blue star"}
        assert portion.specs[0].params.num_inference_steps == 4
        assert portion.specs[0].params.negative_prompt == "green"
        assert Image.open(io.BytesIO(base64.b64decode(answer.data[3].b64_json))).format == "WEBP"
        await farm.services.keeping.close()
        single = farm.services.singles.get(answer.data[3].id, now=farm.services.wall())
        assert (single.user, single.prompt, single.seed, single.owner) == ("eve", "a blue star", 4, "me")
        assert single.sha256 == hashlib.sha256(base64.b64decode(answer.data[3].b64_json)).hexdigest()

    with_farm(tmp_path, test, renderers=2)


def test_a_batch_is_split_over_the_renderers_and_comes_back_in_order(tmp_path):
    async def test(farm: FarmInProcess, _: Any) -> None:
        async with by_hand(farm) as http:
            ask = ASK | {"prompt": None, "prompts": [f"shape {n}" for n in range(32)], "seed": 1}
            del ask["prompt"]
            first = (await http.post(PATH, json=ask)).json()["data"]
            assert len({name for name, _ in farm.drawn}) == 2
            assert {one["renderer"] for one in first} == {"renderer-0", "renderer-1"}
            alone = (await http.post(PATH, json=ASK | {"prompt": "shape 31", "seed": 1})).json()["data"][0]
            assert (
                Image.open(io.BytesIO(base64.b64decode(alone["b64_json"]))).tobytes()
                == Image.open(io.BytesIO(base64.b64decode(first[31]["b64_json"]))).tobytes()
            )

    with_farm(tmp_path, test, renderers=2)


def test_a_link_is_good_before_it_is_told(tmp_path):
    async def test(farm: FarmInProcess, client: openai.AsyncOpenAI) -> None:
        answer = await client.images.generate(model="sketch", prompt="a red circle", response_format="url")
        link = answer.data[0].url
        assert link == f"{URL}/v1/images/{answer.data[0].id}/content"
        assert answer.data[0].b64_json is None
        async with by_hand(farm) as http:
            picture = await http.get(link)
            assert picture.headers["content-type"] == "image/png"
            assert Image.open(io.BytesIO(picture.content)).size == (64, 64)

    with_farm(tmp_path, test)


def test_what_is_answered_is_what_the_schema_says(tmp_path):
    async def test(farm: FarmInProcess, _: Any) -> None:
        async with by_hand(farm) as http:
            for more in ({}, {"response_format": "url"}, {"n": 3}):
                body = (await http.post(PATH, json=ASK | more)).json()
                assert ImagesAnswer.model_validate(body).model_dump(exclude_none=True) == body

    with_farm(tmp_path, test)


def test_a_request_without_a_model_means_the_one_that_is_loaded(tmp_path):
    async def test(farm: FarmInProcess, _: Any) -> None:
        async with by_hand(farm) as http:
            nameless = {name: value for name, value in ASK.items() if name != "model"}
            refusal = await http.post(PATH, json=nameless)
            assert refusal.json()["error"]["message"] == (
                "model is missing, and none is loaded; name one, GET /v1/models lists them"
            )
            assert (await http.post(PATH, json=ASK)).status_code == 200
            async with asyncio.timeout(10):
                while (await http.post(PATH, json=nameless)).status_code != 200:  # noqa: ASYNC110
                    await asyncio.sleep(0.1)

    with_farm(tmp_path, test)


@pytest.mark.parametrize(
    ("body", "status", "message", "param", "code"),
    [
        (
            b"{",
            400,
            "the body:1: not JSON: Expecting property name enclosed in double quotes in column 2;",
            None,
            "request",
        ),
        (b"", 400, "the body is missing; give it", None, "request"),
        (b"[]", 400, "body: should be a valid dictionary or object to extract fields from, got []", None, "request"),
        (b'{"prompt": 1}', 400, "prompt: should be a valid string, got 1", "prompt", "request"),
        (
            b'{"prompt": "x", "background": "transparent"}',
            400,
            "background is not a field of this endpoint: pictures have no transparency here",
            "background",
            "request",
        ),
        (b'{"prompt": "x", "model": "sketsh"}', 404, "no model card is called 'sketsh'", "model", "unknown_model"),
        (
            b'{"prompt": "x", "model": "sketch", "size": "63x64"}',
            400,
            "63x64 is not a size of sketch",
            "size",
            "request",
        ),
        (b'{"prompt": "x", "model": "sketch", "n": 65}', 400, "n: should be less than or equal to 64", "n", "request"),
        (b'{"prompt": "\\ud800", "model": "sketch"}', 400, "prompt: ", "prompt", "request"),
        (b"[" * 100_000, 400, "the body: nested too deep; a request needs a few levels only", None, "request"),
        (b'{"n":' + b"[" * 900 + b"]" * 900 + b"}", 400, "n: should be a valid integer", "n", "request"),
        (
            b'{"prompt": "x", "seed": 1' + b"0" * 5000 + b"}",
            400,
            "the body: a whole number has more than 4300 digits; write a smaller one",
            None,
            "request",
        ),
        (b'{"prompt": "caf\xe9"}', 400, "the body is not UTF-8 (byte 0xe9); send it as UTF-8", None, "request"),
        (
            b'{"n": 1, "n": 2}',
            400,
            "the body: the key 'n' stands twice in one object; keep one of them",
            None,
            "request",
        ),
        (b'{"prompt": "x", "seed": NaN}', 400, "the body: NaN is no JSON number; write a finite one", None, "request"),
        (b'{"prompt": "x", "n": true}', 400, "n: should be a valid integer, got true", "n", "request"),
        (b'{"prompt": "x", "seed": "1"}', 400, 'seed: should be a valid integer, got "1"', "seed", "request"),
        (b'{"size": "big"}', 400, "size: write WIDTHxHEIGHT such as 1024x1024, or auto, got 'big'", "size", "request"),
    ],
)
def test_what_cannot_be_is_refused_by_name(tmp_path, body, status, message, param, code):
    async def test(farm: FarmInProcess, _: Any) -> None:
        async with by_hand(farm) as http:
            answer = await http.post(PATH, content=body, headers={"content-type": "application/json"})
            error = answer.json()["error"]
            assert answer.status_code == status
            assert error["message"].startswith(message)
            if code:
                assert (error["param"], error["code"]) == (param, code)
            assert farm.drawn == []

    with_farm(tmp_path, test)


def test_the_openai_client_raises_its_own_errors(tmp_path):
    async def test(farm: FarmInProcess, client: openai.AsyncOpenAI) -> None:
        with pytest.raises(openai.NotFoundError, match="no model card is called 'dall-e-3'"):
            await client.images.generate(model="dall-e-3", prompt="a red circle")
        with pytest.raises(openai.BadRequestError) as refused:
            await client.images.generate(model="sketch", prompt="a red circle", size="1024x1024")
        assert (refused.value.param, refused.value.code) == ("size", "request")

    with_farm(tmp_path, test)


def test_a_key_without_the_right_may_not_draw_and_one_without_is_let_in_nowhere(tmp_path):
    async def test(farm: FarmInProcess, client: openai.AsyncOpenAI) -> None:
        now = datetime.now(UTC)
        with pytest.raises(openai.AuthenticationError, match="this is no key of a farm"):
            await client.images.generate(model="sketch", prompt="a red circle")
        reader = create_key(farm.ledger.store, owner="ann", scopes=("read",), at=now)
        with pytest.raises(openai.PermissionDeniedError, match="this needs the scope render"):
            await client.with_options(api_key=reader.text).images.generate(model="sketch", prompt="a red circle")
        limited = create_key(
            farm.ledger.store, owner="bob", scopes=("render",), at=now, allowance=Allowance(images_per_minute=1)
        )
        bob = client.with_options(api_key=limited.text)
        answer = await bob.images.generate(model="sketch", prompt="a red circle")
        await farm.services.keeping.close()
        single = farm.services.singles.get(answer.data[0].id, now=farm.services.wall())
        assert (single.owner, single.key) == ("bob", limited.key.id)
        with pytest.raises(openai.RateLimitError) as refused:
            await bob.images.generate(model="sketch", prompt="a red circle")
        assert int(refused.value.response.headers["retry-after"]) >= 1

    with_farm(tmp_path, test, public_url="https://farm.example.org")


def test_a_full_farm_says_when_to_come_back(tmp_path):
    async def test(farm: FarmInProcess, _: Any) -> None:
        async with by_hand(farm) as http:
            asks = [http.post(PATH, json=ASK | {"num_inference_steps": 30}) for _ in range(12)]
            answers = await asyncio.gather(*asks)
            statuses = [one.status_code for one in answers]
            assert statuses.count(200) == 4
            assert statuses.count(503) == 8
            refused = next(one for one in answers if one.status_code == 503)
            assert refused.json()["error"]["code"] == "busy"
            assert int(refused.headers["retry-after"]) >= 1
            assert (await http.post(PATH, json=ASK)).status_code == 200
            pool = await farm.pool()
            assert pool.waiting == 0

    with_farm(tmp_path, test, max_waiting=4)


def test_a_client_that_goes_away_frees_the_renderer_within_a_step(tmp_path):
    async def test(farm: FarmInProcess, _: Any) -> None:
        async with farm.live() as http:
            await http.post(PATH, json=ASK)
            asking = asyncio.create_task(
                http.post(PATH, json=ASK | {"num_inference_steps": 200, "guidance_scale": 2.0})
            )
            await farm.until(lambda: len(farm.drawn) == 2)
            await asyncio.sleep(0.3)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            await farm.until(lambda: farm.dropped, seconds=5)
            assert farm.dropped == [(farm.drawn[1][0], farm.drawn[1][1].token)]
            answer = await asyncio.wait_for(http.post(PATH, json=ASK), 2)
            assert answer.status_code == 200
            assert (await farm.pool()).waiting == 0

    with_farm(tmp_path, test)


def test_images_of_a_renderer_that_ends_are_drawn_by_another(tmp_path, monkeypatch):
    monkeypatch.setattr("farm.crew.START_AGAIN_S", (0.0,))

    async def test(farm: FarmInProcess, _: Any) -> None:
        async with by_hand(farm) as http:
            ask = ASK | {"num_inference_steps": 40, "seed": 5}
            whole = (await http.post(PATH, json=ask)).json()["data"][0]
            before = len(farm.drawn)
            asking = asyncio.create_task(http.post(PATH, json=ask))
            await farm.until(lambda: len(farm.drawn) > before)
            farm.kill(farm.drawn[before][0])
            answer = await asking
            assert answer.status_code == 200
            assert answer.json()["data"][0]["b64_json"] == whole["b64_json"]
            assert len(farm.drawn) == before + 2
            assert (await farm.pool()).waiting == 0

    with_farm(tmp_path, test, renderers=2)


def test_images_that_end_every_renderer_are_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr("farm.crew.START_AGAIN_S", (0.0,))

    async def test(farm: FarmInProcess, _: Any) -> None:
        real = farm.draw

        async def deadly(renderer: str, portion: Portion) -> Any:
            drawing = asyncio.create_task(real(renderer, portion))
            await asyncio.sleep(0)
            farm.kill(renderer)
            return await drawing

        farm.draw = deadly  # type: ignore[method-assign]
        async with by_hand(farm) as http:
            answer = await http.post(PATH, json=ASK)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] in ("renderer_died", "busy")
        assert 1 <= len(farm.drawn) <= TRIES

    with_farm(tmp_path, test, renderers=3)


def test_a_dispatcher_that_is_away_is_waited_for(tmp_path):
    async def test(farm: FarmInProcess, _: Any) -> None:
        async with by_hand(farm) as http:
            await http.post(PATH, json=ASK)
            farm.away = True
            asking = asyncio.create_task(http.post(PATH, json=ASK))
            await asyncio.sleep(0.3)
            assert not asking.done()
            farm.away = False
            assert (await asking).status_code == 200

    with_farm(tmp_path, test)


def test_a_dispatcher_that_stays_away_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("farm.server.gateway.AWAY_S", 0.2)

    async def test(farm: FarmInProcess, _: Any) -> None:
        async with by_hand(farm) as http:
            await http.post(PATH, json=ASK)
            farm.away = True
            answer = await http.post(PATH, json=ASK)
            assert answer.status_code == 503
            assert answer.json()["error"]["code"] == "farm_unavailable"
            assert answer.headers["retry-after"] == "5"
            farm.away = False

    with_farm(tmp_path, test)


def test_a_picture_is_answered_though_the_store_is_away_and_a_link_is_not(tmp_path, monkeypatch):
    async def test(farm: FarmInProcess, _: Any) -> None:
        def away(*_: object) -> None:
            raise StoreUnavailableError("the store is away")

        monkeypatch.setattr(farm.services.singles, "put", away)
        async with by_hand(farm) as http:
            assert (await http.post(PATH, json=ASK)).status_code == 200
            answer = await http.post(PATH, json=ASK | {"response_format": "url"})
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "store_unavailable")

    with_farm(tmp_path, test)


def test_answers_that_nobody_reads_are_bounded(tmp_path, monkeypatch):
    async def test(farm: FarmInProcess, _: Any) -> None:
        async with by_hand(farm) as http:
            assert (await http.post(PATH, json=ASK)).status_code == 200
            assert farm.services.sending.bytes == 0
            farm.services.sending.bytes = images.SENDING_BYTES + 1
            answer = await http.post(PATH, json=ASK)
            assert answer.status_code == 503
            assert answer.json()["error"]["message"].startswith("too many answers wait for clients that read slowly")
            farm.services.sending.bytes = 0

    with_farm(tmp_path, test)
