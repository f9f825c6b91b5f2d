"""Unit tests open no connections and never import Ray."""

import builtins
import socket
from typing import Any

import pytest


@pytest.fixture(autouse=True)
def _no_sockets_and_no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def refusing_import(name: str, *args: Any, **kwargs: Any) -> Any:
        level = args[3] if len(args) > 3 else kwargs.get("level", 0)
        if level == 0 and name.partition(".")[0] == "ray":
            raise AssertionError("a unit test imports ray: move it to tests/integration")
        return real_import(name, *args, **kwargs)

    def refuse(method: str) -> None:
        real = getattr(socket.socket, method)

        def connect(self: socket.socket, address: Any) -> Any:
            if self.family != socket.AF_UNIX:
                raise AssertionError(f"a unit test connects to {address}: move it to tests/integration")
            return real(self, address)

        monkeypatch.setattr(socket.socket, method, connect)

    monkeypatch.setattr(builtins, "__import__", refusing_import)
    refuse("connect")
    refuse("connect_ex")
