"""JSON bodies, read strictly: UTF-8, no key twice in one object, and what is wrong said in words."""

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from farm.errors import RequestError
from farm.yamlfile import load_json


class JsonRoute(APIRoute):
    """A route whose body is read so."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return what answers a request."""
        answer = super().get_route_handler()

        async def strictly(request: Request) -> Response:
            return await answer(_JsonRequest(request.scope, request.receive))

        return strictly


class _JsonRequest(Request):
    async def json(self) -> Any:
        """Raises RequestError."""
        return read_json(await self.body())


def read_json(data: bytes) -> Any:
    """Parse a body. Raises RequestError."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise RequestError(f"the body is not UTF-8 (byte 0x{data[exc.start]:02x}); send it as UTF-8") from exc
    return load_json(text, "the body", RequestError, what="request")
