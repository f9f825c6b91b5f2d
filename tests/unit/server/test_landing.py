"""How far a reader of events has come."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farm.errors import RequestError
from farm.server.landing import MAX_LISTED, MAX_RUNS, Landed, Position
from tests.unit.finished_jobs import make_plan


def told(*shards: int, run: str = "0a1b2c3d", number: int = 1) -> Position:
    position = Position()
    for shard in shards:
        position.tell(Landed(run, number, shard))
    return position


def test_shards_in_order_are_one_number() -> None:
    assert str(told()) == ""
    assert str(told(0, 1, 2)) == "0a1b2c3d.1.3"


def test_shards_out_of_order_are_listed_until_the_gap_is_filled() -> None:
    assert str(told(0, 1, 5, 3)) == "0a1b2c3d.1.2-3,5"
    assert str(told(0, 1, 5, 3, 2)) == "0a1b2c3d.1.4-5"


def test_a_later_pass_begins_anew_and_an_earlier_one_is_passed_over() -> None:
    position = told(0, 1)
    position.tell(Landed("0a1b2c3d", 2, 0))
    assert str(position) == "0a1b2c3d.2.1"
    assert position.unseen("0a1b2c3d", 1, np.ones(3, bool), most=10) == []
    assert position.unseen("0a1b2c3d", 2, np.ones(3, bool), most=10) == [1, 2]
    assert position.unseen("0a1b2c3d", 3, np.ones(3, bool), most=2) == [0, 1]


def test_runs_before_the_first_that_is_named_count_as_told() -> None:
    plans = [make_plan(run=f"{number:08x}") for number in range(4)]
    position = Position.parse("00000001.1.4;00000002.1.0")
    assert [plan.run for plan in position.ahead(plans)] == ["00000001", "00000002", "00000003"]
    assert Position().ahead(plans) == plans
    assert Position.parse("ffffffff.1.4").ahead(plans) == plans  # of an earlier job of that name


@given(st.sets(st.integers(0, 300)), st.integers(1, 9))
def test_what_is_parsed_is_what_was_told(shards: set[int], number: int) -> None:
    position = told(*shards, number=number)
    again = Position.parse(str(position))
    assert str(again) == str(position)
    done = np.zeros(301, bool)
    done[list(shards)] = True
    left = again.unseen("0a1b2c3d", number, done, most=1000)
    if len(shards) <= MAX_LISTED:
        assert left == []
    assert set(left) <= shards  # what the text has no room for is told twice


def test_the_text_stays_short_however_shards_land() -> None:
    position = told(*range(0, 20_000, 2))
    for number in range(150):
        position.tell(Landed(f"{number:08x}", 1, 0))
    text = str(position)
    assert len(text.split(";")) == MAX_RUNS
    assert len(text) < 4096
    assert len(str(told(*range(1, 20_000, 2)))) < 1100
    assert str(Position.parse(text)) == text


@pytest.mark.parametrize(
    "text",
    ["x", "0a1b2c3d", "0a1b2c3d.1", "0a1b2c3d.1.x", "0a1b2c3d.1.٣", ";", "../etc.1.1", "a.1.1;;b.1.1", "a.1.1-", "\0"],
)
def test_what_is_no_id_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match="is none that this farm gave; send the last one as it came, or none"):
        Position.parse(text)


def test_what_is_done_already_can_be_passed_over() -> None:
    position = Position()
    position.skip("0a1b2c3d", 2, np.array([True, True, False, True]))
    assert str(position) == "0a1b2c3d.2.2-3"
