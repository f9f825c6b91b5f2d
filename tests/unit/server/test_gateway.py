"""A gateway's errands with a farm that answers as the test says."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from farm.devices import DeviceInfo, numerics_for
from farm.errors import (
    BusyError,
    CancelledError,
    FarmUnavailableError,
    LimitedError,
    ModelCardError,
    PlacementError,
    RendererDiedError,
    RenderError,
)
from farm.manifest import Output
from farm.meters import Meters
from farm.modelcard import find_card
from farm.plan import ImageSpec
from farm.portion import Allowance, Answer, Drawn, Entry, Placing, Portion, Refusal, Seat, SeatEnd
from farm.server.cards import Ready
from farm.server.gateway import AWAY_S, MOST_UNFIT, TRIES, Errand, Gateway, Result
from farm.settings import Settings
from farm.tally import Snapshot
from tests.unit.virtual import run

CARD = find_card("sketch", Settings())
READY = Ready(CARD, numerics_for(CARD, device=DeviceInfo("cpu", "a CPU", (), 1), renderers=1))


def errand(images: int = 1) -> Errand:
    specs = tuple(ImageSpec(at, 0, None, "a red circle", at, CARD.defaults, {}) for at in range(images))
    return Errand("ann", "k", Allowance(), READY, specs, Output())


def drawn(portion: Portion, renderer: str) -> Answer:
    images = tuple(Drawn(spec.index, spec.seed, 0.1, b"png", "0" * 64) for spec in portion.specs)
    return Answer(renderer, "a CPU", images, 0.0, 0.0, 0.5)


class Farm:
    """Writes down what it is told. Each of `drawing` answers one portion: an error, or a wait and then the picture."""

    def __init__(self, *placings: Placing | Exception, drawing: Sequence[Exception | float] = ()):
        self.placings = list(placings)
        self.drawing = list(drawing)
        self.entries: list[Entry] = []
        self.told: list[tuple[Any, ...]] = []
        self.held: list[tuple[str, ...]] = []
        self.ended: list[tuple[str, str]] = []
        self.entering_s = 0.0

    async def enter(self, entry: Entry) -> Placing:
        self.entries.append(entry)
        await asyncio.sleep(self.entering_s)
        answer = self.placings.pop(0) if self.placings else seats(entry.images)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def draw(self, renderer: str, portion: Portion) -> Answer:
        self.told.append(("draw", renderer, portion.token, tuple(spec.index for spec in portion.specs)))
        how = self.drawing.pop(0) if self.drawing else 0.0
        if isinstance(how, Exception):
            raise how
        await asyncio.sleep(how)
        return drawn(portion, renderer)

    async def drop(self, renderer: str, token: str) -> None:
        self.told.append(("drop", renderer, token))

    async def leave(self, token: str, *, seconds: float, end: SeatEnd = "done") -> None:
        self.told.append(("leave", token, seconds))
        if end != "done":
            self.ended.append((token, end))

    async def hold(self, gateway: str, tokens: Sequence[str], snapshot: Snapshot) -> None:
        self.held.append(tuple(tokens))

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"a gateway has no business with {name}")


def seats(*images: int) -> Placing:
    return Placing(tuple(Seat(f"s{at}", f"renderer-{at}", count) for at, count in enumerate(images)))


def gateway(farm: Farm) -> Gateway:
    return Gateway("gateway-0/1", farm, Meters("gateway-0", "1"), token=lambda: "t")


def sent(farm: Farm, images: int = 1) -> list[Result]:
    async def main() -> list[Result]:
        one = gateway(farm)
        try:
            return await one.run(errand(images))
        finally:
            await one.close()

    return run(main())


def refusal_of(farm: Farm, error: type[Exception]) -> Any:
    with pytest.raises(error) as raised:
        sent(farm)
    return raised.value


def test_seats_are_filled_in_order_and_given_back_with_their_seconds():
    farm = Farm(seats(2, 1))
    results = sent(farm, 3)
    assert [(one.drawn.index, one.renderer) for one in results] == [
        (0, "renderer-0"),
        (1, "renderer-0"),
        (2, "renderer-1"),
    ]
    assert farm.entries[0] == Entry("t", "gateway-0/1", "ann", "k", Allowance(), "sketch", 3, 24)
    assert farm.told == [
        ("draw", "renderer-0", "s0", (0, 1)),
        ("draw", "renderer-1", "s1", (2,)),
        ("leave", "s0", 0.5),
        ("leave", "s1", 0.5),
    ]


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("rate", LimitedError),
        ("at_once", LimitedError),
        ("quota", LimitedError),
        ("busy", BusyError),
        ("stopping", BusyError),
    ],
)
def test_a_refusal_says_when_to_come_back(code, error):
    raised = refusal_of(Farm(Placing(refusal=Refusal(code, "not now", 7.5))), error)
    assert (raised.message, raised.retry_after_s) == ("not now", 7.5)


def test_a_farm_without_a_renderer_is_waited_for_and_then_given_up():
    nobody = Placing(refusal=Refusal("no_renderer", "no renderer is there", 15))
    assert len(sent(Farm(nobody, nobody))) == 1
    assert refusal_of(Farm(*[nobody] * 99), FarmUnavailableError).message == "no renderer is there"


def test_an_answer_that_was_lost_is_asked_for_with_the_same_token():
    farm = Farm(FarmUnavailableError("away"), FarmUnavailableError("away"))
    assert len(sent(farm)) == 1
    assert {(entry.token, entry.again) for entry in farm.entries} == {("t", False)}
    assert len(farm.entries) == 3


@pytest.mark.parametrize("lost", [RendererDiedError("gone"), CancelledError("dropped"), FarmUnavailableError("silent")])
def test_only_the_images_that_were_lost_are_drawn_again(lost):
    farm = Farm(seats(2, 1), drawing=[lost, 0.0])
    results = sent(farm, 3)
    assert [one.drawn.index for one in results] == [0, 1, 2]
    assert [(entry.images, entry.again) for entry in farm.entries] == [(3, False), (2, True)]
    assert ("leave", "s0", 0.0) in farm.told
    assert farm.ended == [("s0", "lost")]
    # One that does not answer may draw on; the others know that the portion is over.
    assert (("drop", "renderer-0", "s0") in farm.told) == isinstance(lost, FarmUnavailableError)


def test_images_that_end_one_renderer_after_another_are_given_up():
    raised = refusal_of(Farm(drawing=[RendererDiedError("gone")] * 9), RendererDiedError)
    assert raised.message == f"{TRIES} renderers ended while they drew this: gone"


def test_an_error_of_one_portion_ends_the_others():
    farm = Farm(seats(1, 1), drawing=[RenderError("a broken step"), 60.0])

    async def main() -> None:
        one = gateway(farm)
        with pytest.raises(RenderError, match="a broken step"):
            await one.run(errand(2))
        await one.close()
        assert asyncio.get_running_loop().time() < 50

    run(main())
    assert sorted(farm.told[2:]) == [
        ("drop", "renderer-0", "s0"),
        ("drop", "renderer-1", "s1"),
        ("leave", "s0", 0.0),
        ("leave", "s1", 0.0),
    ]


@pytest.mark.parametrize("trouble", [PlacementError("too big"), ModelCardError("flash is not installed here")])
def test_what_one_renderer_cannot_draw_is_drawn_by_another(trouble):
    small = Placing((Seat("small", "renderer-7", 1),))
    farm = Farm(small, drawing=[trouble, 0.0])
    assert [one.renderer for one in sent(farm)] == ["renderer-0"]
    assert farm.ended == [("small", "unfit")]
    assert [entry.again for entry in farm.entries] == [False, True]


def test_what_fits_no_device_is_told_once_all_were_asked():
    pool = [Placing((Seat(f"s{at}", f"renderer-{at}", 1),)) for at in (0, 1, 2, 3, 0)]
    farm = Farm(*pool, drawing=[PlacementError(f"too big for {at}") for at in range(9)])
    assert refusal_of(farm, PlacementError).message == "too big for 4"
    assert len(farm.entries) == 5


def test_what_is_wrong_everywhere_is_not_asked_of_everybody():
    pool = [Placing((Seat(f"s{at}", f"renderer-{at}", 1),)) for at in range(99)]
    farm = Farm(*pool, drawing=[ModelCardError("no weights")] * 99)
    assert refusal_of(farm, ModelCardError).message == "no weights"
    assert len(farm.entries) == MOST_UNFIT + 1


def gone_after(farm: Farm, seconds: float, then: Callable[[], None] = lambda: None) -> None:
    async def main() -> None:
        one = gateway(farm)
        running = asyncio.create_task(one.run(errand()))
        await asyncio.sleep(seconds)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await asyncio.sleep(5)
        await one.close()

    run(main())


def test_who_goes_away_has_the_portion_dropped_and_the_seat_given_back():
    farm = Farm(drawing=[60.0])
    gone_after(farm, 1)
    assert farm.told[1:] == [("drop", "renderer-0", "s0"), ("leave", "s0", 0.0)]
    assert farm.ended == []


def test_who_goes_away_while_seats_are_asked_for_leaves_none_behind():
    farm = Farm()
    farm.entering_s = 2
    gone_after(farm, 1)
    assert farm.told == [("leave", "s0", 0.0)]


def test_a_question_that_is_given_up_is_left_so_that_it_gets_no_seats_when_it_is_heard_later():
    farm = Farm(*[FarmUnavailableError("away")] * 99)
    assert refusal_of(farm, FarmUnavailableError).message == "away"
    assert farm.told == [("leave", "t", 0.0)]


def test_who_goes_away_before_the_farm_is_back_leaves_the_question_too():
    farm = Farm(*[FarmUnavailableError("away")] * 99)

    async def main() -> None:
        one = gateway(farm)
        running = asyncio.create_task(one.run(errand()))
        await asyncio.sleep(1)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await asyncio.sleep(AWAY_S)
        await one.close()

    run(main())
    assert farm.told == [("leave", "t", 0.0)]


def test_a_gateway_shows_life_with_the_seats_that_it_needs():
    farm = Farm(drawing=[12.0])

    async def main() -> None:
        one = gateway(farm)
        holding = asyncio.create_task(one.hold())
        await one.run(errand())
        await asyncio.sleep(5)
        holding.cancel()

    run(main())
    assert farm.held[:4] == [(), ("s0",), ("s0",), ()]
