"""The unit tests' own fences stand."""

import socket

import pytest


def test_connecting_is_refused() -> None:
    with socket.socket() as one, pytest.raises(AssertionError, match=r"connects to .*: move it to tests/integration"):
        one.connect(("127.0.0.1", 9))


def test_ray_is_refused() -> None:
    with pytest.raises(AssertionError, match="imports ray: move it to tests/integration"):
        import ray  # noqa: F401
