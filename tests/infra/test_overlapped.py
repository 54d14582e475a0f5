"""Work that overlaps keeps its order, and as much of it is under way as was asked for."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from infra.overlapped import overlapped


def test_results_come_in_the_order_of_the_inputs_and_few_are_under_way() -> None:
    lock, running, most, begun = threading.Lock(), [0], [0], list[int]()

    def slow(number: int) -> int:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.02 if number % 3 else 0.05)
        with lock:
            running[0] -= 1
        return number**2

    def inputs() -> Iterator[int]:
        for number in range(12):
            begun.append(number)
            yield number

    for place, (number, square) in enumerate(overlapped(slow, inputs(), 4)):
        assert (number, square) == (place, place**2) and len(begun) <= place + 4
    assert 1 < most[0] <= 4


def test_an_error_comes_out_where_its_result_would_have() -> None:
    found = list[int]()
    with pytest.raises(ZeroDivisionError):
        for number, _ in overlapped(lambda number: 1 // (5 - number), range(100), 3):
            found.append(number)
    assert found == [0, 1, 2, 3, 4]
