"""Which engine draws what, and who leaves to make room."""

import threading
from typing import Any

import pytest

from farm.engines import Engines
from farm.errors import ModelCardError
from farm.meters import Meters
from tests.drawing import FakeFamily, card, numerics


@pytest.fixture
def families(monkeypatch: pytest.MonkeyPatch) -> list[FakeFamily]:
    """Every family that is opened, in order."""
    opened: list[FakeFamily] = []

    def open_fake(*_: Any, **__: Any) -> FakeFamily:
        opened.append(FakeFamily())
        return opened[-1]

    monkeypatch.setattr("farm.engine.open_family", open_fake)
    return opened


def engines() -> Engines:
    return Engines("cpu", 16.0, meters=Meters("r", "i"))


def test_an_engine_that_was_given_back_is_taken_again(families: list[FakeFamily]) -> None:
    some = engines()
    first = some.take(card(), numerics())
    assert some.loaded_model == "sketch"
    some.give_back(first)
    assert some.take(card(), numerics()) is first
    assert len(families) == 1


def test_an_engine_in_use_is_nobody_elses_and_two_draw_side_by_side(families: list[FakeFamily]) -> None:
    some = engines()
    first, second = some.take(card(), numerics()), some.take(card(), numerics())
    assert first is not second
    assert [family.loaded for family in families] == [True, True]


def test_idle_engines_of_other_models_leave_and_those_in_use_stay(families: list[FakeFamily]) -> None:
    some = engines()
    used, idle = some.take(card(), numerics()), some.take(card(), numerics())
    some.give_back(idle)
    some.take(card(name="other"), numerics())
    assert [family.loaded for family in families] == [True, False, True]
    assert (used.loaded, some.loaded_model, len(some)) == (True, "other", 0)


def test_a_shard_needs_its_own_batch_and_urgent_images_only_the_weights(families: list[FakeFamily]) -> None:
    some = engines()
    some.give_back(some.take(card(), numerics(batch=4)))
    assert some.take_weights(card(title="Another"), numerics(batch=2)).numerics.batch == 4
    assert some.take(card(), numerics(batch=2)).numerics.batch == 2


def test_an_engine_that_made_room_is_loaded_again_and_one_that_was_not_is_forgotten(families: list[FakeFamily]) -> None:
    some = engines()
    engine = some.take(card(), numerics())
    engine.unload()
    some.reload(engine)
    assert families[0].loaded
    engine.unload()
    some.give_back(engine)
    assert len(some) == 0


def test_that_an_urgent_image_took_the_room_of_a_shards_model_is_told_once(families: list[FakeFamily]) -> None:
    some = engines()
    mine, theirs = (card(), numerics()), (card(name="other", max_sequence_length=32), numerics())
    some.give_back(some.take(*mine))
    some.give_back(some.take(*theirs))
    engine = some.take(*mine)
    assert not some.was_displaced(engine)
    some.give_back(engine)
    some.give_back(some.take_weights(*theirs))
    engine = some.take(*mine)
    assert some.was_displaced(engine)
    assert not some.was_displaced(engine)
    engine.unload()
    some.displaced(engine)
    assert some.was_displaced(some.take(*mine))


def test_a_model_that_does_not_load_leaves_none_and_the_next_one_loads(
    families: list[FakeFamily], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: FakeFamily) -> None:
        raise ModelCardError("no weights")

    some = engines()
    with monkeypatch.context() as patched:
        patched.setattr(FakeFamily, "load", broken)
        with pytest.raises(ModelCardError, match="no weights"):
            some.take(card(), numerics())
    assert (some.loaded_model, some.loading) == (None, False)
    assert some.take(card(), numerics()).loaded


def test_models_are_loaded_one_at_a_time_and_others_are_taken_meanwhile(
    families: list[FakeFamily], monkeypatch: pytest.MonkeyPatch
) -> None:
    some = engines()
    ready = some.take(card(), numerics())
    begun, go, most, now = threading.Event(), threading.Event(), [0], [0]

    def slow(self: FakeFamily) -> None:
        now[0] += 1
        most[0] = max(most[0], now[0])
        begun.set()
        go.wait(10)
        now[0] -= 1

    monkeypatch.setattr(FakeFamily, "load", slow)
    threads = [threading.Thread(target=some.take, args=(card(), numerics())) for _ in range(3)]
    for thread in threads:
        thread.start()
    assert begun.wait(10)
    assert some.loading
    some.give_back(ready)
    assert some.take(card(), numerics()) is ready
    go.set()
    for thread in threads:
        thread.join(10)
    assert most == [1]
