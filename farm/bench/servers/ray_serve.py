"""Ray Serve with `@serve.batch` and its usual proxy, on a Ray of its own."""

import os
import signal
import threading
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read once, at Ray's import

import ray
from ray import serve

from farm.bench.peers import Stock
from farm.bench.servers.drawing import HOST, draw, flags

MAX_ONGOING = 256
"""Requests that a replica takes at once; Serve's own 5 would never fill a batch."""


def run(port: int, batch: int, replicas: int, threads: int) -> None:
    """Serve until SIGTERM."""

    class Draw:
        def __init__(self) -> None:
            self._stock = Stock(threads)

        async def __call__(self, request: Any) -> dict[str, str]:
            answer: dict[str, str] = await self.draw(await request.json())
            return answer

        @serve.batch(max_batch_size=batch)  # type: ignore[untyped-decorator]
        async def draw(self, requests: list[dict[str, Any]]) -> list[dict[str, str]]:
            return draw(self._stock, requests)

    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    ray.init(address="local", include_dashboard=False, log_to_driver=False, object_store_memory=128 * 1024**2)
    serve.start(http_options={"host": HOST, "port": port})
    deployment = serve.deployment(
        num_replicas=replicas, max_ongoing_requests=MAX_ONGOING, ray_actor_options={"num_cpus": 0.1}
    )
    serve.run(deployment(Draw).bind(), route_prefix="/draw")
    ended.wait()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    given = flags()
    run(given.port, given.batch, given.replicas, given.threads)
