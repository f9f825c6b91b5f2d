"""The order of urgent images, their share of the device, and what becomes of a portion."""

import threading
from typing import Any

import pytest

from farm.engine import weights_of
from farm.errors import CancelledError, ModelCardError, RendererDiedError
from farm.manifest import Output
from farm.portion import Answer, Drawn, Portion
from farm.urgent import GATHER_S, InHand, Share, UrgentImage, UrgentQueue
from tests.drawing import card, numerics, spec

WEIGHTS = weights_of(card(), numerics())


def portion(token: str, images: int = 1, *, owner: str = "ann", **changes: Any) -> Portion:
    """A portion; `changes` are those of the images."""
    specs = tuple(spec(i, f"{token} {i}", **changes) for i in range(images))
    return Portion(token, owner, card(), numerics(), specs, Output())


def other_model(token: str, owner: str = "ann") -> Portion:
    return Portion(token, owner, card(family="sleep"), numerics(), (spec(0, f"{token} 0"),), Output())


def queue(**options: Any) -> UrgentQueue:
    return UrgentQueue(threading.Condition(), **options)


def prompts(images: list[UrgentImage]) -> list[str]:
    return [image.spec.prompt for image in images]


def answer(hand: InHand) -> Answer:
    return Answer("r", "cpu", tuple(hand.drawn[i] for i in sorted(hand.drawn)), 0.0, hand.load_s, hand.engine_s)


def drawn(image: UrgentImage) -> Drawn:
    return Drawn(image.spec.index, image.spec.seed, 1.0, b"picture")


def test_owners_take_turns_and_each_ones_oldest_is_first() -> None:
    waiting = queue()
    for token, owner in (("a", "ann"), ("b", "ann"), ("c", "bob"), ("d", "ann"), ("e", "cid")):
        waiting.put(portion(token, owner=owner), now=0.0)
    assert prompts(waiting.take(WEIGHTS, 8)) == ["a 0", "c 0", "e 0", "b 0", "d 0"]


def test_who_was_served_last_comes_after_those_who_were_not() -> None:
    waiting = queue()
    waiting.put(portion("a", 3), now=0.0)
    waiting.begun(waiting.take(WEIGHTS, 1), now=0.0)
    waiting.put(portion("b", owner="bob"), now=1.0)
    assert prompts(waiting.take(WEIGHTS, 8)) == ["b 0", "a 1", "a 2"]


def test_a_flood_of_one_owner_delays_anothers_image_by_one_batch_at_most() -> None:
    waiting = queue()
    waiting.put(portion("flood", 100), now=0.0)
    waiting.begun(waiting.take(WEIGHTS, 4), now=0.0)
    waiting.put(portion("b", owner="bob"), now=1.0)
    assert "b 0" in prompts(waiting.take(WEIGHTS, 4))


def test_only_images_of_one_shape_and_model_are_taken_together() -> None:
    waiting = queue()
    waiting.put(portion("a"), now=0.0)
    waiting.put(portion("b", width=96), now=0.0)
    waiting.put(portion("c", num_inference_steps=5), now=0.0)
    waiting.put(other_model("d"), now=0.0)
    waiting.put(portion("e", negative_prompt="blue"), now=0.0)
    assert prompts(waiting.take(WEIGHTS, 8)) == ["a 0", "e 0"]
    assert prompts(waiting.take(weights_of(card(family="sleep"), numerics()), 8)) == ["d 0"]
    assert len(waiting) == 2


def test_a_plan_with_another_batch_is_drawn_with_the_same_weights_and_one_with_other_numerics_is_not() -> None:
    assert weights_of(card(batch={"cpu": 1}, title="Other"), numerics(batch=1)) == WEIGHTS
    for other in (numerics(threads=2), numerics(dtype="bfloat16"), numerics(versions={})):
        assert weights_of(card(), other) != WEIGHTS
    assert weights_of(card(max_sequence_length=32), numerics()) != WEIGHTS


def test_images_put_back_keep_their_place_and_those_that_were_dropped_do_not_come_back() -> None:
    waiting = queue()
    waiting.put(portion("a", 2), now=0.0)
    waiting.put(portion("b"), now=0.0)
    taken = waiting.take(WEIGHTS, 8)
    waiting.drop("b")
    waiting.put_back(reversed(taken))
    assert prompts(waiting.take(WEIGHTS, 8)) == ["a 0", "a 1"]


def test_what_waits_for_the_end_of_a_batch_is_passed_over_within_a_step() -> None:
    waiting = queue()
    waiting.put(portion("a", 2), now=0.0)
    taken = waiting.take(WEIGHTS, 1)
    taken[0].waits_for_batch = True
    waiting.put_back(taken)
    assert prompts(waiting.take(WEIGHTS, 8, within_step=True)) == ["a 1"]
    assert prompts(waiting.take(WEIGHTS, 8)) == ["a 0"]


def test_a_portion_is_answered_with_its_last_image_and_in_order() -> None:
    waiting = queue()
    future = waiting.put(portion("a", 2), now=0.0)
    images = waiting.take(WEIGHTS, 8)
    waiting.begun(images, now=3.0)
    waiting.spent(images, 5.0)
    waiting.settle(images[1], drawn(images[1]), answer)
    assert (future.done(), waiting.in_hand) == (False, 1)
    waiting.settle(images[0], drawn(images[0]), answer)
    assert [image.index for image in future.result(0).images] == [0, 1]
    assert (future.result(0).engine_s, images[0].hand.begun, waiting.in_hand) == (5.0, 3.0, 0)


def test_the_time_of_a_batch_is_charged_to_its_portions_by_their_share() -> None:
    waiting = queue()
    waiting.put(portion("a", 3), now=0.0)
    waiting.put(portion("b", owner="bob"), now=0.0)
    images = waiting.take(WEIGHTS, 8)
    waiting.spent(images, 8.0)
    assert {image.owner: image.hand.engine_s for image in images} == {"ann": 6.0, "bob": 2.0}


def test_a_token_in_hand_brings_the_same_answer_and_is_drawn_once() -> None:
    waiting = queue()
    assert waiting.put(portion("a"), now=0.0) is waiting.put(portion("a"), now=1.0)
    assert len(waiting) == 1


def test_a_dropped_portion_fails_and_others_stay() -> None:
    waiting = queue()
    first, second = waiting.put(portion("a", 2), now=0.0), waiting.put(portion("b"), now=0.0)
    assert waiting.drop("a")
    assert not waiting.drop("a")
    assert not waiting.drop("never heard of")
    with pytest.raises(CancelledError, match="the portion was dropped"):
        first.result(0)
    assert (second.done(), len(waiting)) == (False, 1)


def test_a_picture_that_comes_after_its_portion_was_dropped_is_let_go() -> None:
    waiting = queue()
    future = waiting.put(portion("a"), now=0.0)
    image = waiting.take(WEIGHTS, 1)[0]
    waiting.drop("a")
    waiting.settle(image, drawn(image), answer)
    assert isinstance(future.exception(0), CancelledError)


def test_a_model_that_does_not_load_fails_what_waits_for_it_alone() -> None:
    waiting = queue()
    first, second = waiting.put(portion("a"), now=0.0), waiting.put(other_model("b"), now=0.0)
    waiting.fail(WEIGHTS, ModelCardError("no weights"))
    assert isinstance(first.exception(0), ModelCardError)
    assert not second.done()


def test_a_closed_queue_fails_what_it_has_and_takes_nothing() -> None:
    waiting = queue()
    future = waiting.put(portion("a"), now=0.0)
    waiting.close(RendererDiedError("it ends"))
    assert isinstance(future.exception(0), RendererDiedError)
    with pytest.raises(RendererDiedError, match="it ends"):
        waiting.put(portion("b"), now=0.0)
    assert (len(waiting), waiting.closed) == (0, True)


def test_time_spent_loading_is_told_to_those_who_wait_for_that_model() -> None:
    waiting = queue()
    waiting.put(portion("a"), now=0.0)
    waiting.put(other_model("b"), now=0.0)
    waiting.loaded(WEIGHTS, 2.5, now=10.0)
    assert [image.hand.load_s for image in (waiting.next(WEIGHTS), waiting.next()) if image] == [2.5, 2.5]
    other = waiting.next(weights_of(card(family="sleep"), numerics()))
    assert other is not None
    assert other.hand.load_s == 0.0


def test_who_came_while_a_model_was_loaded_waited_for_the_rest_of_that_alone() -> None:
    waiting = queue()
    waiting.put(portion("a"), now=0.0)
    waiting.put(portion("b"), now=9.0)
    waiting.loaded(WEIGHTS, 2.5, now=10.0)
    assert [image.hand.load_s for image in waiting.take(WEIGHTS, 2)] == [2.5, 1.0]


def test_a_drop_that_overtakes_its_portion_is_remembered_and_for_so_many_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("farm.urgent.DROPPED_KEPT", 2)
    waiting = queue()
    for token in "abc":
        assert not waiting.drop(token)
    for token in "bc":
        with pytest.raises(CancelledError, match="dropped before it came"):
            waiting.put(portion(token), now=0.0)
    waiting.put(portion("a"), now=0.0)
    assert len(waiting) == 1


def test_steps_loads_and_pictures_are_progress() -> None:
    waiting = queue()
    waiting.put(portion("a", 2), now=0.0)
    assert (waiting.ticks, waiting.progressed()) == (0, 1)
    waiting.loaded(WEIGHTS, 2.5, now=10.0)
    for image in waiting.take(WEIGHTS, 2):
        waiting.settle(image, drawn(image), answer)
    assert waiting.ticks == 4


def test_the_first_that_is_told_of_an_image_counts() -> None:
    waiting = queue()
    future = waiting.put(portion("a", 2), now=0.0)
    first, second = waiting.take(WEIGHTS, 2)
    waiting.settle(first, Drawn(0, 1, 0.0, error_code="not_written", error_message="no"), answer)
    waiting.settle(first, drawn(first), answer)
    waiting.settle(second, drawn(second), answer)
    assert [image.error_code for image in future.result(0).images] == ["not_written", None]


def test_urgent_work_has_a_burst_and_then_four_seconds_for_each_of_a_shard() -> None:
    share = Share(bulk=0.2, burst_s=10.0)
    share.spent(9.9)
    assert share.allows()
    share.spent(4.1)
    assert not share.allows()
    share.worked(0.9)
    assert not share.allows()
    share.worked(0.2)
    assert share.allows()


def test_a_long_time_without_urgent_work_saves_up_no_more_than_the_burst() -> None:
    share = Share(bulk=0.2, burst_s=10.0)
    share.worked(1e6)
    share.spent(10.0)
    assert not share.allows()


@pytest.mark.parametrize("batch_s", [0.1, 1.0, 30.0])
def test_shards_keep_a_fifth_of_the_device_under_urgent_work_without_end(batch_s: float) -> None:
    share = Share(bulk=0.2, burst_s=10.0)
    urgent = bulk = 0.0
    while urgent + bulk < 10_000:
        while share.allows():
            share.spent(batch_s)
            urgent += batch_s
        share.worked(0.05)
        bulk += 0.05
    assert bulk >= 0.2 * (urgent + bulk - 10.0 - batch_s)
    assert urgent >= 0.7 * (urgent + bulk) - batch_s


def test_after_a_batch_its_clients_are_waited_for_until_there_are_enough_or_they_take_too_long() -> None:
    waiting = queue()
    waiting.put(portion("a"), now=0.0)
    waiting.gather(3, most=8, batch_s=0.2, now=10.0)
    assert waiting.gathers_s(now=10.005) == pytest.approx(0.015)  # a tenth of the batch's seconds
    waiting.put(portion("b", 2), now=10.01)
    assert waiting.gathers_s(now=10.01) > 0
    waiting.put(portion("c"), now=10.015)
    assert waiting.gathers_s(now=10.015) == 0  # all are back
    waiting.gather(3, most=8, batch_s=60.0, now=20.0)
    assert waiting.gathers_s(now=20.0) == pytest.approx(GATHER_S)
    assert waiting.gathers_s(now=20.0 + GATHER_S) == 0


def test_nobody_is_waited_for_where_a_batch_is_full_or_one_client_asks_again() -> None:
    waiting = queue()
    waiting.gather(1, most=8, batch_s=60.0, now=0.0)
    waiting.put(portion("a"), now=0.001)
    assert waiting.gathers_s(now=0.001) == 0
    waiting.put(portion("b", 3), now=0.001)
    waiting.gather(4, most=4, batch_s=60.0, now=1.0)
    assert waiting.gathers_s(now=1.0) == 0


def test_an_empty_queue_cuts_in_nowhere() -> None:
    waiting = queue(share=Share(burst_s=1.0))
    assert not waiting.may_cut_in()
    waiting.put(portion("a"), now=0.0)
    assert waiting.may_cut_in()
    waiting.charge(2.0)
    assert not waiting.may_cut_in()
    waiting.credit(1.0)
    assert waiting.may_cut_in()
