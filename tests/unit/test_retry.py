"""What follows a failure."""

import math

import pytest

from farm.retry import (
    DEATHS_BEFORE_CAUTION,
    ELSEWHERE_S,
    ERRORS_BEFORE_ELSEWHERE,
    STORE_PATIENCE_S,
    WAIT_S,
    Blame,
    after_failure,
)


@pytest.mark.parametrize(
    ("code", "in_a_row", "failing_for_s", "action", "delay_s"),
    [
        ("store_unavailable", 1, 0.0, "again", WAIT_S[0]),
        ("store_unavailable", 99, 10.0, "again", WAIT_S[-1]),
        ("store_unavailable", 3, STORE_PATIENCE_S, "elsewhere", ELSEWHERE_S),
        ("store_denied", 1, 0.0, "elsewhere", math.inf),
        ("store_full", 1, 0.0, "elsewhere", math.inf),
        ("numerics", 1, 0.0, "elsewhere", math.inf),
        ("does_not_fit", 1, 0.0, "elsewhere", math.inf),
        ("internal", ERRORS_BEFORE_ELSEWHERE - 1, 0.0, "again", WAIT_S[3]),
        ("internal", ERRORS_BEFORE_ELSEWHERE, 0.0, "elsewhere", ELSEWHERE_S),
    ],
)
def test_each_kind_of_failure_has_its_answer(code, in_a_row, failing_for_s, action, delay_s):
    decision = after_failure(code, in_a_row=in_a_row, failing_for_s=failing_for_s)
    assert (decision.action, decision.delay_s) == (action, delay_s)


def test_deaths_in_different_batches_blame_none_of_them():
    blame = Blame()
    for batch in [(0, 1), (2, 3), (0, 1), (4, 5), (2, 3)]:
        blame.died(batch, cautious=False)
    assert blame.alone == set()


def test_an_innocent_image_of_a_suspect_batch_is_not_skipped():
    blame = Blame()
    for _ in range(3):
        blame.died((0, 1, 2), cautious=False)
    assert blame.alone == {0, 1, 2}
    blame.died((0,), cautious=False)
    blame.died((1,), cautious=False)
    blame.died((1,), cautious=False)
    assert blame.skip == {1}


def test_deaths_with_nothing_in_hand_make_the_shard_be_drawn_with_caution_and_then_single_images_count():
    blame = Blame()
    for _ in range(DEATHS_BEFORE_CAUTION):
        assert not blame.cautious
        blame.died((), cautious=False)
    assert blame.cautious
    for _ in range(2):
        blame.died((7,), cautious=True)
    assert blame.skip == {7}
