"""Which engine draws what, and who leaves to make room."""

import threading
from typing import Any

import pytest

from farm.engines import GIB, Engines
from farm.errors import ModelCardError, PlacementError
from farm.meters import Meters
from farm.modelcard import ModelCard
from farm.queue import SWAPS_WORTH, Queue, Waiting
from farm.records import WorkingMemory
from tests.drawing import FakeFamily, card, numerics


class Weighty(FakeFamily):
    """Takes 8 GiB of host memory, and counts."""

    host_bytes = 8 * GIB

    def __init__(self) -> None:
        super().__init__()
        self.loads = self.unloads = 0

    def load(self) -> None:
        super().load()
        self.loads += 1

    def unload(self) -> None:
        super().unload()
        self.unloads += 1


@pytest.fixture
def families(monkeypatch: pytest.MonkeyPatch) -> list[Weighty]:
    """Every family that is opened, in order."""
    opened: list[Weighty] = []

    def open_fake(*_: Any, **__: Any) -> Weighty:
        opened.append(Weighty())
        return opened[-1]

    monkeypatch.setattr("farm.engine.open_family", open_fake)
    return opened


def engines(device: str = "cpu", **options: Any) -> Engines:
    options = {"meters": Meters("r", "i"), "free_bytes": lambda: 100 * GIB} | options
    return Engines(device, 16.0, **options)


def gpu_engines(**options: Any) -> Engines:
    return engines("cuda:0", **options)


def other(name: str = "other") -> ModelCard:
    return card(name=name, max_sequence_length=len(name))


GPU = numerics(device="cuda")


def test_a_family_learns_how_many_renderers_share_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    def open_fake(*_: Any, **given: Any) -> Weighty:
        told.append(given["renderers"])
        return Weighty()

    monkeypatch.setattr("farm.engine.open_family", open_fake)
    engines(renderers=3).take(card(), numerics())
    assert told == [3]


def test_an_engine_that_was_given_back_is_taken_again(families: list[Weighty]) -> None:
    some = engines()
    first = some.take(card(), numerics())
    assert some.loaded_model == "sketch"
    some.give_back(first)
    assert some.take(card(), numerics()) is first
    assert len(families) == 1


def test_an_engine_in_use_is_nobody_elses_and_two_draw_side_by_side(families: list[Weighty]) -> None:
    some = engines()
    first, second = some.take(card(), numerics()), some.take(card(), numerics())
    assert first is not second
    assert [family.loaded for family in families] == [True, True]


def test_idle_engines_of_other_models_leave_a_gpu_and_those_in_use_stay(families: list[Weighty]) -> None:
    some = gpu_engines()
    used, idle = some.take(card(), GPU), some.take(card(), GPU)
    some.give_back(idle)
    some.take(other(), GPU)
    assert [family.loaded for family in families] == [True, False, True]
    assert (used.loaded, some.loaded_model, len(some)) == (True, "other", 0)
    assert some.kept == ("sketch",)


def test_an_engine_that_was_there_tells_of_no_load(families: list[Weighty]) -> None:
    some = engines()
    first, second = some.take(card(), numerics()), some.take(other(), numerics())
    for engine in (first, second):
        some.give_back(engine)
    some.load_s = 7.0  # what loading the other took
    some.take(card(), numerics())
    assert (some.loaded_model, some.load_s) == ("sketch", 0.0)


def test_a_model_that_fits_nowhere_makes_nobody_leave(families: list[Weighty], monkeypatch: pytest.MonkeyPatch) -> None:
    some = gpu_engines()
    some.give_back(some.take(card(), GPU))

    def refuse(self: Weighty) -> None:
        raise PlacementError("too big")

    monkeypatch.setattr(Weighty, "place", refuse)
    with pytest.raises(PlacementError):
        some.take(other(), GPU)
    assert [family.loads for family in families] == [1, 0]
    assert (len(some), some.kept, families[0].loaded) == (1, (), True)


def test_a_model_that_was_prepared_is_placed_once_and_makes_nobody_leave_before_it_is_taken(
    families: list[Weighty], monkeypatch: pytest.MonkeyPatch
) -> None:
    some, placed = gpu_engines(), list[Weighty]()

    def place(self: Weighty) -> None:
        placed.append(self)

    monkeypatch.setattr(Weighty, "place", place)
    some.give_back(some.take(card(), GPU))
    some.prepare(other(), GPU)
    some.prepare(other(), GPU)
    assert ([family.loads for family in families], len(some)) == ([1, 0], 1)
    taken = some.take_weights(other(), GPU)
    assert (taken.loaded, [family.loads for family in families], placed) == (True, [1, 1], families)
    some.give_back(taken)
    some.prepare(other(), GPU)
    assert len(families) == 2


def test_what_was_measured_of_a_models_memory_reaches_its_family(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    working = WorkingMemory(encode_gib=0.1, step_gib=0.2, decode_gib=0.3, identity="x")

    def open_fake(*_: Any, **given: Any) -> Weighty:
        told.append(given["measured"])
        return Weighty()

    monkeypatch.setattr("farm.engine.open_family", open_fake)
    engines(measured=lambda card, numerics: working if card.name == "other" else None).take(other(), numerics())
    engines().take(card(), numerics())
    assert told == [working, None]


def test_a_model_that_left_a_gpu_comes_back_by_a_copy_and_is_counted_as_a_swap(families: list[Weighty]) -> None:
    meters = Meters("r", "i")
    some = gpu_engines(meters=meters)
    for wanted in (card(), other(), card(), other()):
        some.give_back(some.take(wanted, GPU))
    assert [family.loads for family in families] == [2, 2]
    assert some.kept == ("sketch",)
    counted = {sample.labels: sample.value for sample in meters.snapshot().samples if sample.name.endswith("_count")}
    assert counted == {
        (("model", name), ("kind", kind)): 1.0 for name in ("sketch", "other") for kind in ("load", "swap")
    }


def test_kept_models_are_within_the_nodes_budget_and_the_one_not_used_for_longest_goes(families: list[Weighty]) -> None:
    some = gpu_engines(host_gib=40.0, renderers=2)  # 20 GiB for this one of two, and each model takes 8
    for name in ("a", "bb", "ccc"):
        some.give_back(some.take(other(name), GPU))
    assert some.kept == ("a", "bb")
    some.give_back(some.take(other("a"), GPU))
    assert some.kept == ("bb", "ccc")
    some.give_back(some.take(other("dddd"), GPU))
    assert some.kept == ("ccc", "a")
    assert [family.loads for family in families] == [2, 1, 1, 1]


def test_without_a_budget_kept_models_take_half_of_what_is_free(families: list[Weighty]) -> None:
    free = [40 * GIB]
    some = gpu_engines(free_bytes=lambda: free[0])
    for name in ("a", "bb", "ccc"):
        some.give_back(some.take(other(name), GPU))
    assert some.kept == ("a", "bb")
    free[0] = 12 * GIB
    some.give_back(some.take(other("ccc"), GPU))
    assert some.kept == ("a", "bb")  # it was loaded still: nobody made room
    some.give_back(some.take(other("dddd"), GPU))
    assert some.kept == ("ccc",)


def test_with_no_budget_a_model_that_leaves_is_let_go_of(families: list[Weighty]) -> None:
    some = gpu_engines(host_gib=0.0)
    some.give_back(some.take(card(), GPU))
    engine = some.take(other(), GPU)
    assert (some.kept, families[0].unloads) == ((), 1)
    some.leave(engine)
    assert (engine.loaded, engine.parked, families[1].unloads) == (False, False, 1)


def test_two_models_on_one_gpu_never_thrash(families: list[Weighty]) -> None:
    """The queue learns that coming back is cheap, and still lets each model stay for several swaps' worth of work."""
    some, queue, used, loading_s = gpu_engines(), Queue({}), {"ann": 0.0, "bob": 0.0}, [0.0]
    cards = {"sketch": card(), "other": other()}
    queue.put(Waiting("2026-01-01", "a", 50, "ann", "sketch"))
    queue.put(Waiting("2026-01-01", "b", 50, "bob", "other"))
    for _ in range(2000):
        run = queue.choose(some.loaded_model, fits=lambda run: True, renderers=1)
        assert run is not None
        before = [family.loads for family in families]
        some.give_back(some.take(cards[run.model], GPU))
        after = [family.loads for family in families]
        came_s = 0.0 if before == after else 30.0 if len(after) > len(before) else 2.0
        queue.loaded(run.model, came_s)
        queue.share.charge(run.owner, 5.0 + came_s)
        used[run.owner] += 5.0 + came_s
        loading_s[0] += came_s
    assert len(families) == 2  # each came from its files once
    assert all(family.loads > 10 for family in families)
    assert loading_s[0] < sum(used.values()) / SWAPS_WORTH
    assert 0.9 < used["ann"] / used["bob"] < 1.1


def test_a_cpu_keeps_models_loaded_beside_each_other_while_memory_holds_them(families: list[Weighty]) -> None:
    some = engines(host_gib=20.0)
    for name in ("a", "bb"):
        some.give_back(some.take(other(name), numerics()))
    engine = some.take(other("a"), numerics())
    assert (some.loaded_model, [family.loads for family in families]) == ("a", [1, 1])
    some.leave(engine)
    assert engine.loaded
    some.give_back(engine)
    some.give_back(some.take(other("ccc"), numerics()))
    some.take(other("dddd"), numerics())
    assert [family.loaded for family in families] == [True, False, True, True]


def test_a_cpu_without_room_for_a_second_model_swaps_them(families: list[Weighty]) -> None:
    some = engines(host_gib=4.0)
    some.give_back(some.take(card(), numerics()))
    engine = some.take(other(), numerics())
    assert [family.loaded for family in families] == [False, True]
    some.leave(engine)
    assert (engine.loaded, engine.parked) == (False, False)


def test_an_engine_in_use_that_made_room_comes_back_by_a_copy(families: list[Weighty]) -> None:
    some = gpu_engines()
    engine = some.take(card(), GPU)
    some.leave(engine)
    assert (engine.loaded, engine.parked) == (False, True)
    some.give_back(some.take_weights(other(), GPU))
    some.reload(engine)
    assert (engine.loaded, families[0].loads, some.kept) == (True, 2, ("other",))
    some.leave(engine)
    some.give_back(engine)
    assert some.kept == ("other", "sketch")


def test_a_shard_needs_its_own_batch_and_urgent_images_only_the_weights(families: list[Weighty]) -> None:
    some = engines()
    some.give_back(some.take(card(), numerics(batch=4)))
    assert some.take_weights(card(title="Another"), numerics(batch=2)).numerics.batch == 4
    assert some.take(card(), numerics(batch=2)).numerics.batch == 2


def test_an_engine_that_made_room_is_loaded_again_and_one_that_was_not_is_forgotten(families: list[Weighty]) -> None:
    some = engines()
    engine = some.take(card(), numerics())
    engine.unload()
    some.reload(engine)
    assert families[0].loaded
    engine.unload()
    some.give_back(engine)
    assert len(some) == 0


def test_that_an_urgent_image_took_the_room_of_a_shards_model_is_told_once(families: list[Weighty]) -> None:
    some = gpu_engines()
    mine, theirs = (card(), GPU), (other(), GPU)
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
    families: list[Weighty], monkeypatch: pytest.MonkeyPatch
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
    families: list[Weighty], monkeypatch: pytest.MonkeyPatch
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
