"""The endpoint as one ASGI app: routes, doors, errors. What it serves comes as `Services`; it starts no process."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

from fastapi import FastAPI

from farm import __version__
from farm.server import docs, errors, events, health, images, jobs, models, renderers, singles
from farm.server.doors import Doors
from farm.server.methods import Methods
from farm.server.services import Services

THREADS = 32
"""Calls of the store at a time; they wait for the network."""

_DESCRIPTION = """Pictures now (`/v1/images/generations`, as OpenAI's API), jobs of many (`/v1/jobs`), and the farm itself.
Errors are `{"error": {"message", "type", "param", "code"}}`; 429 and 503 carry `Retry-After`."""


def create_app(services: Services) -> FastAPI:
    """Return the app. It shows life to the dispatcher from its start-up on, and waits at its end for what it was storing."""

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        threads = ThreadPoolExecutor(THREADS, thread_name_prefix="gateway")
        asyncio.get_running_loop().set_default_executor(threads)
        holding = asyncio.create_task(services.gateway.hold())
        try:
            yield
        finally:
            holding.cancel()
            await services.keeping.close()
            await services.gateway.close()

    app = FastAPI(
        title="Render farm",
        version=__version__,
        description=_DESCRIPTION,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
        redirect_slashes=False,
    )
    app.state.services = services
    app.openapi = lambda: docs.document(app)  # type: ignore[method-assign]
    errors.install(app)
    routers = [part.router for part in (images, models, jobs, events, singles, renderers, health, docs)]
    for router in routers:
        app.include_router(router)
    app.add_middleware(Methods, routers=routers)
    app.add_middleware(Doors, services=services)
    return app
