"""Fixtures of the integration tests: real servers, started once a session."""

import actors.cluster  # before any test module imports Ray, which reads once what is set there
from tests.integration.servers import ignoring_server, moto_server, s3_server

__all__ = ["actors", "ignoring_server", "moto_server", "s3_server"]
