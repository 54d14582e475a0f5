"""docs/data_faults.md says what comes of odd and damaged raw data, and that is what comes of it. About 3 s."""

from __future__ import annotations

import pytest

from tests.support.odd_inputs import HEADING, INPUTS, PAGE, Odd, outcome


@pytest.mark.parametrize("odd", INPUTS, ids=lambda odd: odd.what)
def test_what_comes_of_an_odd_input_is_right_and_stands_in_the_page(odd: Odd) -> None:
    assert f"| {odd.what} | {outcome(odd)} |\n" in PAGE.read_text().partition(HEADING)[2]
