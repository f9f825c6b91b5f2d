"""Which methods each path takes: HEAD wherever GET is; a wrong one is answered with all of them."""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from fastapi import APIRouter
from starlette.routing import compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from farm.server.errors import error_answer

STREAMS = ("/events",)
"""How the paths of event streams end: HEAD would wait for their end, and their seconds say nothing of the farm."""


class Methods:
    """Stands before the routes of `routers`: names every method of a path, and answers HEAD with the head of GET."""

    def __init__(self, app: ASGIApp, routers: Iterable[APIRouter]):
        self._app = app
        found: dict[str, set[str]] = {"/openapi.json": {"GET"}}
        for path, methods in _routes(routers):
            found.setdefault(path, set()).update(methods)
        # What is written out is meant before what a parameter could be.
        paths = sorted(found, key=lambda path: "{" in path)
        self._paths: list[tuple[re.Pattern[str], frozenset[str]]] = [
            (compile_path(path)[0], _with_head(path, found[path])) for path in paths
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path, method = scope["path"], scope["method"]
        allowed = next((methods for pattern, methods in self._paths if pattern.match(path)), None)
        if allowed is not None and method not in allowed:
            takes = ", ".join(sorted(allowed))
            said = f"{method[:20]} is not for {json.dumps(path[:100], ensure_ascii=False)}, which takes {takes}"
            await error_answer(405, said, headers={"Allow": takes})(scope, receive, send)
        elif method == "HEAD" and allowed is not None:
            asked = {**scope, "method": "GET"}
            try:
                await self._app(asked, receive, _without_body(send))
            finally:
                scope.update({name: asked[name] for name in ("route",) if name in asked})
        else:
            await self._app(scope, receive, send)


def _routes(routers: Iterable[APIRouter]) -> Iterator[tuple[str, set[str]]]:
    for router in routers:
        route: Any
        for route in router.routes:
            if hasattr(route, "original_router"):
                yield from _routes([route.original_router])
            else:
                yield route.path, route.methods


def _with_head(path: str, methods: set[str]) -> frozenset[str]:
    return frozenset(methods | ({"HEAD"} if "GET" in methods and not path.endswith(STREAMS) else set()))


def _without_body(send: Send) -> Send:
    async def head(message: Message) -> None:
        await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

    return head
