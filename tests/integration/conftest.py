"""Fixtures of the integration tests: real servers, started once a session."""

from pathlib import Path

import pytest

import actors.cluster  # before any test module imports Ray, which reads once what is set there
from tests.integration.servers import ignoring_server, moto_server, s3_server

__all__ = ["actors", "ignoring_server", "moto_server", "s3_server"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Try a test of real processes twice: it kills and times them on a machine that others use. The report tells of it."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.flaky(reruns=1))
