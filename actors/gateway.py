"""The endpoint's gateways as a Ray Serve application: each replica is one process with the app of `farm.server.app`."""

import os
import uuid
from typing import Any

from fastapi import FastAPI
from ray import serve

from actors.link import RayLink
from actors.logs import log_to_stderr
from actors.names import ON_HEAD
from farm.ledger import Ledger
from farm.server.app import create_app
from farm.server.services import build_services
from farm.settings import Settings
from farm.storage.opening import open_store

ONGOING = 10_000
"""Requests of one replica at a time: who is drawn for waits, and event streams stay open. The farm's own admission refuses
long before, with a reason."""
DRAIN_S = 10.0
"""How long a replica that is to end lets its requests finish."""
HEALTH_S = 5.0


def gateway_app(settings: Settings) -> Any:
    """Return the application for `serve.run`: `settings.gateways` replicas, which keep nothing.

    A replica that dies takes the requests that it was answering with it: their clients see the connection end, and the
    dispatcher frees their seats. Serve starts another. Requests are safe to repeat but for the seeds that they leave open.
    """

    def build() -> FastAPI:
        log_to_stderr()
        replica = serve.get_replica_context()
        rank = replica.rank.rank if replica.rank is not None else 0
        services = build_services(
            settings,
            name=f"gateway-{rank}",
            incarnation=f"{os.getpid()}-{uuid.uuid4().hex[:8]}",
            link=RayLink(),
            ledger=Ledger(open_store(settings.store, settings)),
        )
        return create_app(services)

    deployment = serve.deployment(
        serve.ingress(build)(),
        name="gateway",
        num_replicas=settings.gateways,
        max_ongoing_requests=ONGOING,
        ray_actor_options={"num_cpus": 0, "resources": ON_HEAD},  # within reach of HAProxy, which is there
        graceful_shutdown_timeout_s=DRAIN_S,
        health_check_period_s=HEALTH_S,
        health_check_timeout_s=30.0,
    )
    return deployment.bind()
