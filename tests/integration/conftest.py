"""Fixtures of the integration tests: real servers, started once a session."""

from tests.integration.servers import ignoring_server, moto_server, s3_server

__all__ = ["ignoring_server", "moto_server", "s3_server"]
