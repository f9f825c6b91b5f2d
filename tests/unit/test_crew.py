"""Renderers kept at work, on virtual time."""

import asyncio

from farm.crew import START_S, Crew
from farm.errors import FarmUnavailableError, NodeDiedError, RendererDiedError
from tests.unit.virtual import run


class Slot:
    """One renderer that ends as it is told: after so many seconds, with an error or for good."""

    def __init__(self, *ends: tuple[float, Exception | None]):
        self.ends = list(ends)
        self.started: list[float] = []

    async def work(self, renderer: str) -> None:
        loop = asyncio.get_running_loop()
        self.started.append(loop.time())
        after, error = self.ends.pop(0)
        await asyncio.sleep(after)
        if error is not None:
            raise error


def keep(slot: Slot) -> tuple[list[str], str | None]:
    """Keep it until it was retired; returns the losses and the trouble in the end."""
    lost: list[str] = []
    crew = Crew(slot, ("a",), lost=lambda name, by_itself: lost.append(name if by_itself else f"{name}'s node"))  # type: ignore[arg-type]
    run(crew.keep("a"))
    return lost, crew.trouble


def test_a_retired_renderer_is_not_started_again():
    assert keep(slot := Slot((10.0, None))) == ([], None)
    assert slot.started == [0.0]


def test_one_that_worked_for_long_is_started_again_at_once():
    slot = Slot((START_S + 1, RendererDiedError("killed")), (1.0, None))
    assert keep(slot) == (["a"], None)
    assert slot.started == [0.0, START_S + 1]


def test_the_end_of_its_node_is_told_from_its_own():
    slot = Slot((START_S + 1, NodeDiedError("its node has died")), (1.0, None))
    assert keep(slot) == (["a's node"], None)


def test_one_that_dies_while_it_starts_is_started_again_ever_later_and_its_trouble_told_after_three():
    refused = FarmUnavailableError("GPU 0 is held by another farm")
    slot = Slot(*[(0.0, refused)] * 5, (0.0, None))
    assert keep(slot) == (["a"] * 5, "GPU 0 is held by another farm")
    assert slot.started == [0.0, 2.0, 7.0, 17.0, 27.0, 37.0]


def test_deaths_at_work_are_no_trouble_with_starting():
    slot = Slot(*[(1.0, RendererDiedError("killed"))] * 5, (0.0, None))
    assert keep(slot) == (["a"] * 5, None)
