"""What follows a failure."""

import pytest

from farm.retry import ERRORS_BEFORE_STALL, STORE_PATIENCE_S, STORE_WAIT_S, Blame, after_failure


@pytest.mark.parametrize(
    ("code", "in_a_row", "failing_for_s", "action", "delay_s"),
    [
        ("store_unavailable", 1, 0.0, "again", STORE_WAIT_S[0]),
        ("store_unavailable", 99, 10.0, "again", STORE_WAIT_S[-1]),
        ("store_unavailable", 3, STORE_PATIENCE_S, "stall", 0.0),
        ("store_denied", 1, 0.0, "stall", 0.0),
        ("store_full", 1, 0.0, "stall", 0.0),
        ("numerics", 1, 0.0, "elsewhere", 0.0),
        ("does_not_fit", 1, 0.0, "elsewhere", 0.0),
        ("internal", ERRORS_BEFORE_STALL - 1, 0.0, "again", 0.0),
        ("internal", ERRORS_BEFORE_STALL, 0.0, "stall", 0.0),
    ],
)
def test_each_kind_of_failure_has_its_answer(code, in_a_row, failing_for_s, action, delay_s):
    decision = after_failure(code, in_a_row=in_a_row, failing_for_s=failing_for_s)
    assert (decision.action, decision.delay_s) == (action, delay_s)


def test_deaths_in_different_batches_blame_none_of_them():
    blame = Blame()
    for batch in [(0, 1), (2, 3), (0, 1), (4, 5), (2, 3)]:
        blame.died(batch)
    assert blame.alone == set()


def test_an_innocent_image_of_a_suspect_batch_is_not_skipped():
    blame = Blame()
    for _ in range(3):
        blame.died((0, 1, 2))
    assert blame.alone == {0, 1, 2}
    blame.died((0,))
    blame.died((1,))
    blame.died((1,))
    assert blame.skip == {1}
