"""A LitServer with a worker process for each replica."""

from typing import Any

import litserve

from farm.bench.peers import Stock
from farm.bench.servers.drawing import HOST, draw, flags

BATCH_WAIT_S = 0.01
"""How long a batch waits to be full: what `@serve.batch` waits too. LitServe's own 0 takes what is there."""


class Draw(litserve.LitAPI):  # type: ignore[misc]  # litserve is untyped
    """The stock pipeline behind a LitServer."""

    def __init__(self, threads: int, batch: int) -> None:
        super().__init__(max_batch_size=batch, batch_timeout=BATCH_WAIT_S, api_path="/draw")
        self._threads = threads

    def setup(self, device: str) -> None:
        """Load, once a worker."""
        self._stock = Stock(self._threads)

    def predict(self, requests: list[dict[str, Any]]) -> list[dict[str, str]]:
        """Draw a batch."""
        return draw(self._stock, requests)


if __name__ == "__main__":
    given = flags()
    server = litserve.LitServer(
        Draw(given.threads, given.batch), accelerator="cpu", workers_per_device=given.replicas, timeout=False
    )
    server.run(host=HOST, port=given.port, generate_client_file=False, log_level="warning")
