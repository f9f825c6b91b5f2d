"""A device that ends with its test, and families without torch."""

from collections.abc import Iterator
from typing import Any

import pytest

from farm.errors import RendererDiedError
from tests.drawing import FakeFamily
from tests.unit.cutin.cutting_in import TROUBLE, Device, trouble


@pytest.fixture
def device() -> Iterator[Device]:
    made = Device()
    yield made
    made.cutin.close(RendererDiedError("the test is over"))


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> list[FakeFamily]:
    """Every family that is opened, without torch; a test gives them trouble by TROUBLE."""
    opened: list[FakeFamily] = []

    def open_fake(*_: Any, **__: Any) -> FakeFamily:
        opened.append(FakeFamily(trouble))
        return opened[-1]

    monkeypatch.setattr("farm.engine.open_family", open_fake)
    monkeypatch.setitem(TROUBLE, 0, lambda specs: None)
    return opened
