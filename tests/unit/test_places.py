"""Seats for urgent images: who draws them, how long they wait, and when there is no room."""

import pytest

from farm.errors import RequestError
from farm.places import (
    DOUBT_S,
    ENTRIES_KEPT,
    ENTRIES_KEPT_S,
    RENDERER_START_S,
    UNFIT_S,
    UNKNOWN_STEP_S,
    URGENT_SHARE,
    Place,
    Places,
    split,
)
from farm.portion import SEAT_S, Allowance, Entry, Seat


def entry(token="t", images=1, *, model="m", steps=10, key="", again=False) -> Entry:
    """`steps`: of each image."""
    return Entry(token, "gateway-0", "alice", key, Allowance(), model, images, images * steps, again)


def place(name: str, *, busy: bool = False, load_s: float = 0.0) -> Place:
    return Place(name, f"{name}-i", busy, load_s)


AB = (place("a"), place("b"))


def measured(places: Places, step_s: float, model: str = "m") -> None:
    """Let the places know what a step of a model takes."""
    places.enter(entry("measured", model=model, steps=1), [place("far")], now=0.0)
    places.leave("measured-0", seconds=step_s, now=0.0)


def shares(places: Places, asked: Entry, given, now: float = 0.0) -> dict[str, int]:
    placing = places.enter(asked, given, now=now)
    assert placing.refusal is None
    return {seat.renderer: seat.images for seat in placing.seats}


def test_a_seat_names_renderer_process_and_images():
    placing = Places(10).enter(entry("t", 3), [place("a")], now=0.0)
    assert placing.seats == (Seat("t-0", "a", 3, "a-i"),)
    assert placing.wait_s == 0.0


def test_images_are_split_evenly_over_equal_renderers():
    assert shares(Places(10), entry("t", 5), AB) == {"a": 3, "b": 2}
    assert shares(Places(10), entry("t", 2), [*AB, place("c")]) == {"a": 1, "b": 1}


def test_one_after_another_goes_to_who_has_the_fewest():
    places = Places(10)
    given = [places.enter(entry(f"t{n}"), AB, now=0.0).seats[0].renderer for n in range(4)]
    assert given == ["a", "b", "a", "b"]
    places.leave("t0-0", seconds=1.0, now=1.0)
    places.leave("t2-0", seconds=1.0, now=1.0)
    assert places.enter(entry("next"), AB, now=1.0).seats[0].renderer == "a"


def test_expected_seconds_count_and_not_images():
    places = Places(100)
    measured(places, 0.1)
    places.enter(entry("long", steps=100), [place("a")], now=0.0)
    places.enter(entry("s0", steps=4), [place("b")], now=0.0)
    places.enter(entry("s1", steps=4), [place("b")], now=0.0)
    assert shares(places, entry("t", 1), AB) == {"b": 1}


def test_the_renderer_with_the_model_is_taken_until_waiting_is_worse_than_loading():
    places = Places(100)
    measured(places, 0.1)
    given = [place("a", load_s=5.0), place("b")]
    assert shares(places, entry("t0", 4), given) == {"b": 4}
    places.enter(entry("t1", 2), [place("b")], now=0.0)
    assert shares(places, entry("t2", 1), given) == {"a": 1}, "six images of a second are more than to load it"


def test_a_further_renderer_loads_a_model_only_where_that_saves_twice_the_load():
    measured(places := Places(100), 0.1)
    cold = [place("a", load_s=4.0), place("b", load_s=4.0)]
    assert shares(places, entry("few", 4), cold) == {"a": 4}
    measured(places := Places(100), 0.1)
    assert shares(places, entry("many", 12), cold) == {"a": 8, "b": 4}


def test_a_model_that_a_seat_brings_to_a_renderer_counts_as_loaded_there():
    measured(places := Places(100), 0.1)
    cold = [place("a", load_s=4.0), place("b", load_s=4.0)]
    places.enter(entry("first"), cold, now=0.0)
    assert shares(places, entry("second"), cold) == {"a": 1}


def test_an_idle_renderer_goes_before_one_with_a_shard_and_gets_more():
    measured(places := Places(100), 0.1)
    given = [place("a", busy=True), place("b")]
    assert shares(places, entry("t"), given) == {"b": 1}
    places = Places(100)
    measured(places, 0.1)
    assert shares(places, entry("t", 9), given) == {"a": 4, "b": 5}


def test_loading_beside_a_shard_is_paid_twice():
    measured(places := Places(100), 0.1)
    assert shares(places, entry("t"), [place("a", busy=True, load_s=3.0), place("b", load_s=5.0)]) == {"b": 1}


def test_the_wait_is_that_of_the_first_image_to_begin():
    measured(places := Places(100), 0.1)
    places.enter(entry("t0", 4), [place("a")], now=0.0)
    assert places.enter(entry("t1"), [place("a")], now=0.0).wait_s == pytest.approx(4.0)
    assert places.wait_s(place("a"), "m") == pytest.approx(5.0)
    assert places.wait_s(place("a", busy=True), "m") == pytest.approx(5.0 / URGENT_SHARE + 0.1)
    assert places.wait_s(place("b", load_s=3.0), "m") == pytest.approx(3.0)


def test_a_token_that_asks_again_is_answered_the_same_and_counted_once():
    places = Places(10)
    assert places.answer_to("t") is None
    placing = places.enter(entry("t", 3), AB, now=0.0)
    assert places.answer_to("t") is placing
    assert (places.waiting, places.seats) == (3, 2)


def test_the_answer_is_known_for_a_while_after_the_last_seat_was_left_and_then_forgotten():
    places = Places(10)
    placing = places.enter(entry("t", 2), AB, now=0.0)
    places.leave("t-0", seconds=1.0, now=1.0)
    places.expire(now=2.0)
    places.leave("t-1", seconds=1.0, now=3.0)
    places.expire(now=3.0 + ENTRIES_KEPT_S)
    assert places.answer_to("t") is placing
    places.expire(now=3.1 + ENTRIES_KEPT_S)
    assert places.answer_to("t") is None
    assert not places._answers
    assert not places._left
    assert not places._of


def test_leaving_twice_or_what_is_not_known_changes_nothing():
    places = Places(10)
    places.enter(entry("t", 2), [place("a")], now=0.0)
    assert [one.seat.token for one in places.leave("t-0", seconds=1.0, now=1.0)] == ["t-0"]
    assert places.leave("t-0", seconds=1.0, now=1.0) == ()
    assert places.leave("t", seconds=1.0, now=1.0) == ()
    assert places.leave("stranger", seconds=1.0, now=1.0) == ()
    assert places.waiting == 0


def test_an_entrys_token_names_all_its_seats():
    places = Places(10)
    places.enter(entry("t", 4), AB, now=0.0)
    places.hold(["t", "stranger"], now=SEAT_S)
    assert places.expire(now=SEAT_S + 1) == ()
    assert len(places.leave("t", seconds=0.0, now=SEAT_S + 1)) == 2
    assert (places.waiting, places.seats) == (0, 0)


def test_speeds_are_learnt_from_what_seats_took():
    places = Places(100)
    assert places.steps_s("m", 10) == 10 * UNKNOWN_STEP_S
    measured(places, 0.2)
    assert places.steps_s("m", 10) == pytest.approx(2.0)
    places.enter(entry("t", 2, steps=10), [place("a")], now=0.0)
    places.leave("t-0", seconds=2.0, now=1.0)
    assert places.steps_s("m", 10) == pytest.approx(2.0 + 0.3 * (1.0 - 2.0))
    assert places.steps_s("other", 10) == 10 * UNKNOWN_STEP_S


def test_a_seat_that_was_left_with_nothing_drawn_teaches_nothing():
    measured(places := Places(100), 0.2)
    places.enter(entry("t", steps=10), [place("a")], now=0.0)
    places.leave("t-0", seconds=0.0, now=1.0)
    assert places.steps_s("m", 10) == pytest.approx(2.0)


def test_a_full_farm_refuses_and_says_when_enough_should_be_drawn():
    measured(places := Places(4), 0.1)
    places.enter(entry("t0", 2), [place("a")], now=10.0)  # due at 12
    places.enter(entry("t1", 2, steps=30), [place("b")], now=10.0)  # due at 16
    one = places.enter(entry("t2", 1), AB, now=10.5).refusal
    assert (one.code, one.retry_after_s) == ("busy", pytest.approx(1.5))
    assert one.message == "4 images wait already, of 4 that may"
    assert places.enter(entry("t3", 3), AB, now=10.5).refusal.retry_after_s == pytest.approx(5.5)
    assert places.enter(entry("t4", 1), AB, now=99.0).refusal.retry_after_s == 1.0
    assert places.waiting == 4
    places.leave("t0-0", seconds=2.0, now=12.0)
    assert places.enter(entry("t2", 2), AB, now=12.0).refusal is None


def test_a_refused_token_may_be_given_a_seat_later():
    places = Places(1)
    places.enter(entry("first"), AB, now=0.0)
    assert places.enter(entry("t"), AB, now=0.0).refusal is not None
    assert places.answer_to("t") is None
    places.leave("first-0", seconds=1.0, now=1.0)
    assert places.enter(entry("t"), AB, now=1.0).refusal is None


def test_more_than_can_ever_wait_is_an_error_and_no_refusal():
    with pytest.raises(RequestError, match="5 images at once are more than this farm takes, which is 4; ask for fewer"):
        Places(4).enter(entry("t", 5), AB, now=0.0)


def test_without_renderers_images_are_refused_until_one_may_have_started():
    refusal = Places(4).enter(entry("t"), (), now=0.0).refusal
    assert (refusal.code, refusal.retry_after_s) == ("no_renderer", RENDERER_START_S)


def test_images_that_lost_their_renderer_are_not_refused_for_want_of_room():
    places = Places(2)
    places.enter(entry("t0", 2), [place("a")], now=0.0)
    assert places.enter(entry("t1", 1, again=True), AB, now=0.0).refusal is None
    assert places.waiting == 3


def test_images_that_lost_their_renderer_go_to_another_where_there_is_one():
    places = Places(10)
    places.enter(entry("t0"), AB, now=0.0)
    places.leave("t0-0", seconds=0.0, end="lost", now=1.0)
    assert shares(places, entry("t1", again=True), AB, now=1.0) == {"b": 1}
    assert shares(places, entry("t2", again=True), [place("a")], now=1.0) == {"a": 1}
    places.leave("t1-0", seconds=1.0, now=2.0)
    places.leave("t2-0", seconds=1.0, now=2.0)
    assert shares(places, entry("t3", again=True), AB, now=1.0 + DOUBT_S) == {"a": 1}


def test_a_model_that_does_not_fit_a_renderers_device_goes_to_others_for_a_while():
    places = Places(100)
    places.enter(entry("t0"), AB, now=0.0)
    places.leave("t0-0", seconds=0.0, end="unfit", now=1.0)
    assert shares(places, entry("t1", images=4), AB, now=1.0) == {"b": 4}
    assert shares(places, entry("t2", model="other"), AB, now=1.0) == {"a": 1}
    assert shares(places, entry("t3"), [place("a")], now=1.0) == {"a": 1}  # where there is no other, it says so itself
    anew = Place("a", "a-j", False, 0.0)
    assert shares(places, entry("t4", images=9), [anew, place("b")], now=1.0)["a"] > 0
    assert "a" in shares(places, entry("t6", images=20, again=True), AB, now=1.0 + UNFIT_S)
    places.lost("a", now=400.0)
    assert places._unfit_at == {}


def test_a_seat_that_its_gateway_gave_back_undrawn_casts_no_doubt_on_its_renderer():
    places = Places(10)
    places.enter(entry("t0"), AB, now=0.0)
    places.leave("t0-0", seconds=0.0, now=1.0)
    assert shares(places, entry("t1", again=True), AB, now=1.0) == {"a": 1}


def test_a_question_that_was_left_before_it_is_heard_gets_no_seats_for_a_while():
    places = Places(10)
    assert places.leave("t", seconds=0.0, now=1.0) == ()
    gone = places.answer_to("t").refusal
    assert (gone.code, gone.message) == ("busy", "this was given up before it was heard")
    places.leave("t", seconds=0.0, now=30.0)
    places.expire(now=1.1 + ENTRIES_KEPT_S)
    assert places.answer_to("t") is None
    assert not places._answers
    assert not places._left


def test_no_more_than_so_many_that_are_not_known_are_remembered():
    places = Places(10)
    for number in range(ENTRIES_KEPT + 5):
        places.leave(f"t{number}", seconds=0.0, now=1.0)
    assert len(places._answers) == len(places._left) == ENTRIES_KEPT


def test_a_silent_gateways_seats_are_given_up_and_named():
    places = Places(10)
    places.enter(entry("t0", 2), AB, now=0.0)
    places.enter(entry("t1"), [place("b")], now=0.0)
    places.hold(["t0-0"], now=SEAT_S)
    assert places.expire(now=SEAT_S) == ()
    gone = places.expire(now=SEAT_S + 0.1)
    assert sorted((one.seat.renderer, one.seat.token) for one in gone) == [("b", "t0-1"), ("b", "t1-0")]
    assert (places.seats, places.waiting, places.images_of("b")) == (1, 1, 0)


def test_time_in_which_the_dispatcher_stood_still_is_nobodys_silence():
    places = Places(10)
    places.enter(entry("t"), AB, now=0.0)
    assert places.expire(now=100.0, late=95.0) == ()
    assert len(places.expire(now=95.0 + SEAT_S + 0.1)) == 1


def test_a_lost_renderers_seats_go_and_others_stay():
    places = Places(10)
    places.enter(entry("t0", 4), AB, now=0.0)
    assert [one.seat.token for one in places.lost("a", now=1.0)] == ["t0-0"]
    assert places.lost("a", now=1.0) == ()
    assert (places.images_of("a"), places.images_of("b"), places.waiting) == (0, 2, 2)


def test_a_renderers_new_process_has_none_of_the_old_ones_seats():
    places = Places(10)
    places.enter(entry("old"), [Place("a", "1", False, 0.0)], now=0.0)
    places.enter(entry("new"), [Place("a", "2", False, 0.0)], now=0.0)
    assert [one.seat.token for one in places.lost("a", incarnation="2", now=1.0)] == ["old-0"]
    assert places.images_of("a") == 1


def test_a_keys_images_are_counted_and_when_they_are_drawn():
    measured(places := Places(100), 0.1)
    places.enter(entry("t0", 2, key="k"), [place("a")], now=0.0)
    places.enter(entry("t1", 2, key="other"), [place("a")], now=0.0)
    places.enter(entry("t2", 1, key="k"), [place("a")], now=0.0)
    assert (places.images_by("k"), places.images_by("other"), places.images_by("nobody")) == (3, 2, 0)
    assert places.freed_s("k", 1, now=0.5) == pytest.approx(1.5)
    assert places.freed_s("k", 3, now=0.5) == pytest.approx(4.5)


def test_the_age_is_that_of_the_oldest_seat():
    places = Places(10)
    assert places.age_s(now=5.0) == 0.0
    places.enter(entry("t0"), AB, now=5.0)
    places.enter(entry("t1"), AB, now=8.0)
    places.hold(["t0"], now=9.0)
    assert places.age_s(now=10.0) == 5.0


def test_every_image_is_given_out_once_whatever_the_farm_looks_like():
    for number in range(1, 60):
        found = [place(f"r{n}", busy=n % 3 == 0, load_s=float(n % 4) * 2) for n in range(1 + number % 7)]
        given = split(
            number, found, waits={one.renderer: float(n) for n, one in enumerate(found)}, has={"r0"}, image_s=0.7
        )
        assert sum(images for _, images in given) == number
        assert len({one.renderer for one, _ in given}) == len(given)
        assert all(images > 0 for _, images in given)
