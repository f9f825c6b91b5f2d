import threading
from collections.abc import Iterator

import pytest

from farm.prefetch import IN_HAND, in_order


def test_results_come_in_the_order_of_their_items() -> None:
    gate = threading.Event()

    def slow_first(item: int) -> int:
        if item == 0:
            gate.wait(5)
        else:
            gate.set()
        return item * 10

    assert list(in_order(slow_first, range(5), threads=2)) == [0, 10, 20, 30, 40]


def test_items_are_taken_only_as_results_are() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in range(1000):
            taken.append(item)
            yield item

    results = in_order(lambda item: item, items(), threads=2)
    assert next(results) == 0
    assert len(taken) == 2 * IN_HAND
    results.close()


def test_an_error_stands_where_its_result_would_have() -> None:
    def fails_at_three(item: int) -> int:
        if item == 3:
            raise ValueError("three")
        return item

    results = in_order(fails_at_three, range(100), threads=2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)
