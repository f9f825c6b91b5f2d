"""Which run is next, on owners' shares and loaded models."""

import pytest

from farm.queue import SWAPS_WORTH, UNKNOWN_SWAP_S, FairShare, Queue, Waiting

WORTH = SWAPS_WORTH * UNKNOWN_SWAP_S


def waiting(run: str, *, owner: str = "ann", model: str = "sketch", priority: int = 50, created_at: str = "2026-01-01"):
    return Waiting(created_at, run, priority, owner, model)


def queue(*runs: Waiting, **shares: float) -> Queue:
    made = Queue(shares)
    for one in runs:
        made.put(one)
    return made


def choose(made: Queue, loaded: str | None = None, *, unfit: tuple[str, ...] = (), renderers: int = 4) -> str | None:
    found = made.choose(loaded, fits=lambda run: run not in unfit, renderers=renderers)
    return found.run if found else None


def test_higher_priority_goes_first_whatever_is_loaded_and_whoever_used_more():
    made = queue(waiting("low", owner="ann"), waiting("high", owner="bob", model="flux", priority=90))
    made.share.charge("bob", 1e6)
    assert choose(made, "sketch") == "high"


def test_of_one_owner_the_loaded_model_goes_first_then_age():
    made = queue(
        waiting("old", created_at="2026-01-01"),
        waiting("older", created_at="2025-01-01"),
        waiting("other", model="flux", created_at="2026-02-01"),
    )
    assert choose(made) == "older"
    assert choose(made, "flux") == "other"
    assert choose(made, "flux", unfit=("other",)) == "older"
    assert choose(made, "flux", unfit=("other", "older", "old")) is None


def test_the_owner_with_the_least_use_for_the_share_goes_first():
    made = queue(waiting("a", owner="ann"), waiting("b", owner="bob"), bob=2.0)
    made.share.charge("ann", 100)
    made.share.charge("bob", 150)
    assert choose(made, "sketch") == "b"
    made.share.charge("bob", 60)
    assert choose(made, "sketch") == "a"


def test_what_leases_in_hand_are_expected_to_take_counts_before_it_is_measured():
    made = queue(waiting("a", owner="ann"), waiting("b", owner="bob"))
    made.share.expect("ann", 60)
    assert choose(made) == "b"
    made.share.expect("ann", -60)
    assert choose(made) == "a"


def test_a_renderer_keeps_its_model_until_the_deficit_is_worth_several_swaps():
    made = queue(waiting("a", owner="ann"), waiting("b", owner="bob", model="flux"))
    made.share.charge("ann", WORTH - 1)
    assert choose(made, "sketch") == "a"
    made.share.charge("ann", 1)
    assert choose(made, "sketch") == "b"
    assert choose(made, "flux") == "b"


def test_a_measured_load_decides_what_a_swap_is_worth():
    made = queue(waiting("a", owner="ann"), waiting("b", owner="bob", model="flux"))
    made.loaded("flux", 100.0)
    made.loaded("flux", 0.01)
    assert made.swap_s("flux") == 100.0
    made.share.charge("ann", SWAPS_WORTH * 100.0 - 1)
    assert choose(made, "sketch") == "a"
    made.loaded("flux", 50.0)
    assert made.swap_s("flux") == 75.0
    assert choose(made, "sketch") == "b"


def test_no_owner_gets_more_renderers_by_swaps_than_its_share_of_them():
    made = queue(waiting("a", owner="ann"), waiting("b", owner="bob", model="flux"))
    made.share.charge("ann", 10 * WORTH)
    made.serve("ann", 2)
    made.serve("bob", 2)
    assert choose(made, "sketch", renderers=4) == "a"
    made.serve("bob", -1)
    assert choose(made, "sketch", renderers=4) == "b"


def test_a_renderer_whose_model_nobody_wants_swaps_at_once():
    made = queue(waiting("a", owner="ann"), waiting("b", owner="bob"))
    made.share.charge("ann", 1)
    assert choose(made, "flux") == "b"


def test_time_in_which_nothing_was_wanted_earns_no_credit():
    share = FairShare({})
    share.charge("ann", 1000)
    share.join("bob", ["ann"])
    assert share.used("bob") == 1000
    share.join("cy", [])
    assert share.used("cy") == 1000
    share.join("ann", ["bob"])
    assert share.used("ann") == 1000


def test_an_owner_who_is_still_served_keeps_its_place_when_its_next_run_comes():
    made = queue(waiting("a", owner="ann"), waiting("b", owner="bob"))
    made.share.charge("bob", 500)
    made.serve("ann", 1)
    made.remove("a")
    made.put(waiting("a2", owner="ann"))
    assert made.share.used("ann") == 0
    made.serve("ann", -1)
    made.remove("a2")
    made.put(waiting("a3", owner="ann"))
    assert made.share.used("ann") == 500


def test_a_run_that_waits_already_moves_to_its_new_priority():
    made = queue(waiting("a"), waiting("b", created_at="2026-02-01"))
    made.put(waiting("b", created_at="2026-02-01", priority=60))
    assert (choose(made), len(made)) == ("b", 2)
    made.remove("b")
    made.remove("b")
    assert (choose(made), "b" in made, "a" in made) == ("a", False, True)


@pytest.mark.parametrize("swaps", [1, 4])
def test_two_owners_on_one_renderer_take_turns_of_several_swaps_each(swaps):
    made = queue(waiting("a", owner="ann"), waiting("b", owner="bob", model="flux"))
    for model in ("sketch", "flux"):
        made.loaded(model, 10.0 * swaps)
    loaded, used, loads = "sketch", {"a": 0.0, "b": 0.0}, 0
    for _ in range(2000):
        run = choose(made, loaded, renderers=1)
        model = "sketch" if run == "a" else "flux"
        seconds = 20.0 + 10.0 * swaps * (model != loaded)
        loads += model != loaded
        loaded = model
        made.share.charge("ann" if run == "a" else "bob", seconds)
        used[run] += seconds
    assert used["a"] / used["b"] == pytest.approx(1.0, rel=0.05)
    assert loads * 10.0 * swaps < sum(used.values()) / SWAPS_WORTH
