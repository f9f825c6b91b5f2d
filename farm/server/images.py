"""`POST /v1/images/generations`: OpenAI's call for pictures, drawn by the farm's renderers.

The answer is put together as bytes, since megabytes of base64 go through no validation; its schema is declared beside it and
a test holds the two together.
"""

import asyncio
import base64
import contextlib
import json
import logging
import secrets
from collections.abc import Awaitable
from datetime import UTC, datetime
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from farm.devices import DeviceInfo
from farm.errors import BusyError, FarmError, FarmUnavailableError, RequestError, error_of
from farm.keys import Key
from farm.lint import prompt_codes
from farm.modelcard import ModelCard
from farm.portion import Drawn, PoolView
from farm.server.body import JsonRoute
from farm.server.caller import Painter
from farm.server.errors import answers, told
from farm.server.gateway import AWAY_RETRY_S, Errand, Result, answered
from farm.server.generation import Drawing, ImagesRequest, advice_on, drawing_of
from farm.server.links import LINK_S, base_url, single_url
from farm.server.services import POOL_S, Served, Services
from farm.server.warned import Warned, warned
from farm.singles import Single, single_id, until

log = logging.getLogger(__name__)

router = APIRouter(tags=["images"], route_class=JsonRoute)

MACHINE_S = 60.0
"""How old what is known of the renderers' devices may be: they change when a farm is started, and by whole machines."""
SENDING_BYTES = 512 * 2**20
"""Bytes of answers that one gateway may hold for clients who read slowly; who comes then is told to come later."""
SEND_S = 60.0
SEND_BYTES_PER_S = 32 * 1024
"""A client may take SEND_S to read its answer, and longer where it is long; then it is given up."""
CLOSED = 499
"""What a request counts as whose client went away."""


class PictureError(BaseModel):
    """Why one image of several could not be drawn."""

    code: str
    message: str


class Picture(BaseModel):
    """One picture. Of `b64_json` and `url` there is the one that was asked for, or neither beside an `error`."""

    b64_json: str | None = Field(default=None, description="the picture file, base64")
    url: str | None = Field(default=None, description="where the picture file is")
    id: str | None = Field(default=None, description="names it below /v1/images, where it is from soon after on")
    seed: int = Field(description="draws this picture again")
    seconds: float = Field(description="its share of its batch's time on the device")
    renderer: str = Field(description="who drew it")
    flag: str | None = Field(default=None, description="`black` or `flat` where the picture looks wrong")
    error: PictureError | None = None


class ImagesAnswer(BaseModel):
    """OpenAI's answer, and the farm's own fields beside."""

    created: int = Field(description="Unix seconds")
    data: list[Picture]
    model: str
    output_format: str
    size: str = Field(description="WIDTHxHEIGHT")
    warnings: tuple[Warned, ...] | None = Field(
        default=None, description="what is known against the prompts or the model; none where there is nothing"
    )


@router.post(
    "/v1/images/generations",
    summary="Draw pictures",
    response_model=ImagesAnswer,
    response_model_exclude_none=True,
    responses=answers(404),
)
async def generate(asked: ImagesRequest, request: Request, caller: Painter, services: Served) -> Response:
    """Draw pictures and wait for them. They go ahead of jobs; going away ends the drawing within a step."""
    if services.sending.bytes > SENDING_BYTES:
        raise BusyError("too many answers wait for clients that read slowly; ask again in some seconds", AWAY_RETRY_S)
    return await while_connected(request, _generate(asked, request, caller, services))


async def _generate(asked: ImagesRequest, request: Request, caller: Key, services: Services) -> Response:
    by_link = asked.response_format == "url"
    if by_link and not services.settings.images_days:
        raise RequestError("this farm keeps no images that a link could lead to; ask for b64_json", "response_format")
    machine, pool = await answered(lambda: _started(services, max_age_s=MACHINE_S if asked.model else POOL_S))
    model = asked.model or _loaded(pool)
    ready = await services.cards.ready(model, machine, len(pool.renderers))
    drawing = drawing_of(asked, ready.card, bits=secrets.randbits)
    results = await services.gateway.run(
        Errand(
            owner=caller.owner,
            key=caller.id,
            allowance=caller.allowance,
            ready=ready,
            specs=drawing.specs,
            output=asked.output,
        )
    )
    if all(result.drawn.error_code for result in results):
        raise _fault(results[0].drawn)
    now = services.wall()
    singles = [
        _single(asked, drawing, at, result, caller, ready.card, services, now) for at, result in enumerate(results)
    ]
    kept = [(single, result.drawn.data) for single, result in zip(singles, results, strict=True) if single is not None]
    await (services.keeping.now(kept) if by_link else services.keeping.soon(kept))
    head: dict[str, Any] = {
        "created": int(now),
        "model": ready.card.name,
        "output_format": asked.output.format,
        "size": f"{drawing.params.width}x{drawing.params.height}",
    }
    advice = await asyncio.to_thread(advice_on, asked, ready.card, drawing.preset)
    if advice:
        head["warnings"] = [one.model_dump() for one in warned(advice)]
    pictures = []
    for single, result in zip(singles, results, strict=True):
        link = await asyncio.to_thread(_link, request, services, single) if by_link and single else None
        pictures.append(_picture(result, single, link))
        await asyncio.sleep(0)  # others get a turn between pictures of megabytes
    body = b'%s,"data":[%s]}' % (json.dumps(head).encode()[:-1], b",".join(pictures))
    return Sending(body, services)


async def _started(services: Services, *, max_age_s: float) -> tuple[DeviceInfo, PoolView]:
    """What the farm renders on. Raises FarmUnavailableError while no renderer has started."""
    pool = await services.pool(max_age_s=max_age_s)
    if pool.machine is None:
        pool = await services.pool()
    if pool.machine is None:
        raise FarmUnavailableError("no renderer of the farm has started yet; ask again in some seconds")
    return pool.machine, pool


def _loaded(pool: PoolView) -> str:
    """The model of a request that names none: the one that most renderers have loaded."""
    loaded = [one.loaded for one in pool.renderers if one.loaded]
    if not loaded:
        raise RequestError("model is missing, and none is loaded; name one, GET /v1/models lists them", "model")
    return max(sorted(set(loaded)), key=loaded.count)


def _single(
    asked: ImagesRequest,
    drawing: Drawing,
    at: int,
    result: Result,
    caller: Key,
    card: ModelCard,
    services: Services,
    now: float,
) -> Single | None:
    drawn, spec = result.drawn, drawing.specs[at]
    if drawn.error_code or not services.settings.images_days:
        return None
    return Single(
        id=single_id(now),
        created_at=datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds"),
        keep_until=until(now, services.settings.images_days),
        owner=caller.owner,
        key=caller.id,
        user=asked.user,
        model=card.name,
        prompt=spec.prompt,
        seed=drawn.seed,
        params=spec.params,
        format=asked.output.format,
        size_bytes=len(drawn.data),
        sha256=drawn.sha256,
        seconds=drawn.seconds,
        renderer=result.renderer,
        device=result.device,
        flag=drawn.flag,
        warnings=prompt_codes(spec.prompt, family=card.family, max_tokens=card.max_sequence_length),
    )


def _link(request: Request, services: Services, single: Single) -> str:
    """A presigned link where the store has such a thing, else the gateway's own, for which a key is needed as here."""
    presigned = services.singles.link(single, LINK_S)
    return presigned or single_url(base_url(request, services.settings), single.id)


def _fault(drawn: Drawn) -> FarmError:
    return error_of(str(drawn.error_code), drawn.error_message or "the image could not be drawn")


def _picture(result: Result, single: Single | None, link: str | None) -> bytes:
    drawn = result.drawn
    rest: dict[str, Any] = {"seed": drawn.seed, "seconds": round(drawn.seconds, 4), "renderer": result.renderer}
    if drawn.error_code:
        rest["error"] = {"code": drawn.error_code, "message": told(_fault(drawn))}
    elif single is not None:
        rest["id"] = single.id
    if drawn.flag:
        rest["flag"] = drawn.flag
    if link is not None:
        rest["url"] = link
    fields = json.dumps(rest).encode()
    if drawn.error_code or link is not None:
        return fields
    return b'{"b64_json":"%s",%s' % (base64.b64encode(drawn.data), fields[1:])


class Sending(Response):
    """A finished answer that counts while it is being read, and gives its client up when it reads too slowly."""

    media_type = "application/json"

    def __init__(self, body: bytes, services: Services):
        super().__init__(body)
        self._sending = services.sending

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        size = len(self.body)
        self._sending.bytes += size
        try:
            async with asyncio.timeout(SEND_S + size / SEND_BYTES_PER_S):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            # The server closes a connection whose answer is left unfinished.
            log.info("a client did not read its answer", extra={"bytes": size})
        finally:
            self._sending.bytes -= size


async def while_connected(request: Request, work: Awaitable[Response]) -> Response:
    """Do work for as long as its client is there; when it goes, the work is cancelled, and the answer goes nowhere."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        return Response(status_code=CLOSED)
    finally:
        for task in (leaving, working):
            if not task.done():
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
