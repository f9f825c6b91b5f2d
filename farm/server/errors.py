"""Every error as an answer: OpenAI's shape, and the one place where our errors get their HTTP status.

    {"error": {"message": ..., "type": ..., "param": ..., "code": ...}}

`message` says what is wrong and what to do, `code` is the error's own (farm/errors.py), `param` the field to mend.
"""

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import Response

from farm.errors import (
    BusyError,
    ControlError,
    FarmError,
    FarmUnavailableError,
    ForbiddenError,
    InputError,
    LaterError,
    LimitedError,
    ManifestError,
    ModelCardError,
    NumericsError,
    PlacementError,
    PlanChangedError,
    PromptError,
    RendererDiedError,
    RequestError,
    StoreDeniedError,
    StoreFullError,
    StoreUnavailableError,
    UnauthorizedError,
    UnknownImageError,
    UnknownJobError,
    UnknownModelError,
    UnknownRendererError,
    WaitingError,
)
from farm.modelcard import HOW_TO_ADD

log = logging.getLogger(__name__)

RETRY_S = 5.0
"""What is told where it is not known when trying again will help."""
MESSAGE_MAX = 2000
_FOLDERS = re.compile(r"""(?<![\w.:/])/(?!v1/)(?:[^\s:;,'"()/]+/)+""")
"""The folders of a file of this machine; an address of this endpoint is none."""
VALUE_MAX = 100

STATUSES: tuple[tuple[type[FarmError], int], ...] = (
    (UnauthorizedError, 401),
    (ForbiddenError, 403),
    (UnknownModelError, 404),
    (UnknownJobError, 404),
    (UnknownRendererError, 404),
    (UnknownImageError, 404),
    (PlanChangedError, 409),
    (ControlError, 409),
    (WaitingError, 409),
    (NumericsError, 409),
    (PlacementError, 400),
    (ModelCardError, 503),
    (InputError, 400),
    (LimitedError, 429),
    (BusyError, 503),
    (FarmUnavailableError, 503),
    (RendererDiedError, 503),
    (StoreUnavailableError, 503),
    (StoreFullError, 503),
    (StoreDeniedError, 503),
    (FarmError, 500),
)
"""The first class that an error is one of counts."""

_STORE = "the farm's store cannot be written at the moment; tell its operator"
OPERATORS: Mapping[type[FarmError], str] = {
    StoreDeniedError: _STORE,
    StoreFullError: _STORE,
    ModelCardError: "the farm cannot use this model at the moment: its card or its weights are not to be had; ask again "
    "later, or tell the farm's operator",
}
"""What is told of errors that only the farm's operator can mend; the log has what they say."""

_MODEL_ERRORS = (UnknownModelError, ModelCardError, PlacementError)
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}
_CODES = {400: "request", 404: "not_found", 405: "method_not_allowed", 413: "too_large", 415: "unsupported_media_type"}


class ErrorBody(BaseModel):
    """What is wrong with a request, or with the farm."""

    message: str = Field(description="what is wrong, and what to do about it")
    type: str = Field(description="the kind of error, by its HTTP status")
    param: str | None = Field(description="the field to mend")
    code: str | None = Field(description="the error's own stable code")


class ErrorAnswer(BaseModel):
    """Every answer of 400 and above."""

    error: ErrorBody


def answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route that may answer these, besides those that every route may."""
    each: dict[int | str, dict[str, Any]] = {}
    for status in sorted({400, 401, 403, 413, 415, 429, 500, 503, *statuses}):
        each[status] = {"model": ErrorAnswer, "description": _TYPES.get(status, "server_error").replace("_", " ")}
    return each


def status_of(error: FarmError) -> int:
    """The HTTP status that an error is answered with."""
    return next(status for kind, status in STATUSES if isinstance(error, kind))


def told(error: FarmError, *, store: str | None = None) -> str:
    """What clients hear of an error; see `scrubbed`. Those that only the operator can mend say no more than that."""
    for kind, message in OPERATORS.items():
        if isinstance(error, kind):
            return message
    message = error.message.removesuffix(HOW_TO_ADD)
    # These repeat what the client wrote, and a manifest sent over HTTP reads no file of this machine.
    if isinstance(error, RequestError | ManifestError | PromptError):
        return message if store is None else message.replace(store, "the store")
    return scrubbed(message, store=store)


def scrubbed(text: str, *, store: str | None = None) -> str:
    """A text without what is the operator's affair: where the store lies, and the folders of this machine's files."""
    return _FOLDERS.sub("", text if store is None else text.replace(store, "the store"))


def answer_of(error: FarmError, *, store: str | None = None) -> Response:
    """An error of ours as an answer. `store`: the store's address, which is taken out."""
    status = status_of(error)
    if isinstance(error, tuple(OPERATORS)):
        log.error("only the operator can mend this", extra={"code": error.code, "reason": error.message})
    headers = {}
    if status in (429, 503):
        later = error.retry_after_s if isinstance(error, LaterError) else None
        headers["retry-after"] = str(max(1, math.ceil(RETRY_S if later is None else later)))
    if status == 401:
        headers["www-authenticate"] = 'Bearer realm="farm"'
    param = error.param if isinstance(error, RequestError) else "model" if isinstance(error, _MODEL_ERRORS) else None
    return error_answer(status, told(error, store=store), code=error.code, param=param, headers=headers)


def error_answer(
    status: int,
    message: str,
    *,
    code: str | None = None,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """An answer in OpenAI's error shape."""
    body = {
        "error": {
            "message": message if len(message) <= MESSAGE_MAX else f"{message[:MESSAGE_MAX]}...",
            "type": _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error"),
            "param": param,
            "code": code or _CODES.get(status),
        }
    }
    content = json.dumps(body, ensure_ascii=True).encode()
    return Response(content, status, headers=dict(headers or {}), media_type="application/json")


def install(app: FastAPI) -> None:
    """Have an app answer every error in that shape."""
    app.add_exception_handler(FarmError, _ours)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _unforeseen)


async def _ours(request: Request, exc: Exception) -> Response:
    error = cast(FarmError, exc)
    if status_of(error) == 500:
        log.error("a request failed", exc_info=exc, extra={"path": request.url.path})
    return answer_of(error, store=request.app.state.services.ledger.store.url)


async def _malformed(_request: Request, exc: Exception) -> Response:
    message, param = fault(cast(RequestValidationError, exc).errors())
    return error_answer(400, message, code="request", param=param)


async def _http(request: Request, exc: Exception) -> Response:
    error = cast(HTTPException, exc)
    if isinstance(error.__cause__, FarmError):  # FastAPI wraps what reading a body raises
        return await _ours(request, error.__cause__)
    message, allowed = str(error.detail), (error.headers or {}).get("Allow")
    if error.status_code == 404 and message == "Not Found":
        message = f"there is nothing at {_shown(request.url.path)}; /docs shows what there is"
    elif error.status_code == 405 and allowed:
        message = f"{request.method[:20]} is not for {_shown(request.url.path)}, which takes {allowed}"
    return error_answer(error.status_code, message, headers=error.headers)


async def _unforeseen(_request: Request, exc: Exception) -> Response:
    # Starlette raises it again after this, so that the server logs it with its traceback.
    return error_answer(
        500, f"the farm failed on this request ({type(exc).__name__}); its log has more", code="internal"
    )


def fault(errors: Sequence[Any]) -> tuple[str, str | None]:
    """Message and field of the first of pydantic's errors."""
    first = errors[0]
    place = [str(part) for part in first["loc"]]
    where = place[0] if place and place[0] in ("body", "query", "path", "header") else ""
    param = ".".join(part for part in place[1 if where else 0 :] if part) or None
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", first["msg"])
        return f"the body is no JSON: {reason}; mend it", None
    if first["type"] == "missing":
        what = f"{param} is missing" if param else "the body is missing"
        return f"{what}; give it", param
    context = first.get("ctx", {})
    if first["type"] == "too_long":
        return (
            f"{param}: has {context['actual_length']} items, at most {context['max_length']} are taken; send less",
            param,
        )
    if first["type"] == "too_short":
        return f"{param}: must not be empty; give it at least {context['min_length']}, or leave it out", param
    text = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return f"{param or where or 'request'}: {text}, got {_shown(first.get('input'))}", param


def _shown(value: Any) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= VALUE_MAX else f"{text[: VALUE_MAX - 3]}..."
