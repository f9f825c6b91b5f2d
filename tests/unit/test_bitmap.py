import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farm.bitmap import Bitmap


@given(st.lists(st.booleans(), max_size=200))
def test_it_holds_the_flags_it_was_made_of(flags):
    array = np.array(flags, dtype=bool)
    bitmap = Bitmap.of(array)
    assert (bitmap.flags() == array).all()
    assert (bitmap.size, bitmap.count) == (len(flags), sum(flags))
    assert [bitmap[place] for place in range(len(flags))] == flags


@given(st.lists(st.booleans(), min_size=1, max_size=3000), st.integers(0, 3000))
def test_the_next_clear_bit_is_the_first_from_there_on(flags, start):
    bitmap = Bitmap.of(np.array(flags, dtype=bool))
    clear = [place for place in range(start, len(flags)) if not flags[place]]
    assert bitmap.next_clear(start) == (clear[0] if clear else len(flags))


def test_setting_a_bit_twice_counts_once_and_a_copy_is_its_own():
    bitmap = Bitmap(9)
    assert bitmap.set(8)
    assert not bitmap.set(8)
    other = bitmap.copy()
    other.set(0)
    assert (bitmap.count, other.count, bitmap[0]) == (1, 2, False)
    for place in range(9):
        other.set(place)
    assert other.full


@pytest.mark.parametrize("place", [-1, 9])
def test_a_bit_that_is_not_there_is_refused(place):
    with pytest.raises(IndexError, match=f"bit {place} of 9"):
        Bitmap(9)[place]


def test_what_one_has_beyond_another():
    one, other = Bitmap(20), Bitmap(20)
    for place in (1, 9, 19):
        one.set(place)
    other.set(9)
    assert one.beyond(other) == [1, 19]
    assert other.beyond(one) == []
