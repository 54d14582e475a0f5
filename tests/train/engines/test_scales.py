"""The rules of the gradient scales (paper D.1) and of the plateau detector, as properties."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.config import ScaleSection
from train.engines.zero.scales import GradientScales
from train.loop.plateau import Plateau

RULES = ScaleSection()
HISTORIES = st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=60)
TIGHT = ScaleSection(initial=10, lowest=9, highest=10.01, window=7)


def run(scales: GradientScales, history: list[list[bool]], start: int = 0) -> list[list[float]]:
    out = []
    for step, bad in enumerate(history, start):
        scales.update(step, bad)
        out.append(scales.values())
    return out


def test_it_starts_at_m_times_two_to_the_13() -> None:
    assert GradientScales(4, 1024, RULES).values() == [2.0**23] * 4


def test_a_thousand_good_updates_double_a_scale() -> None:
    scales = GradientScales(1, 2, RULES)
    (first,) = run(scales, [[False]])[0]
    assert first == pytest.approx(2 * 2**13 * 2 ** (1 / 1000), rel=1e-12)
    run(scales, [[False]] * 999, 1)
    assert scales.values()[0] == pytest.approx(2 * 2**14, rel=1e-9)


def test_an_overflow_divides_by_the_square_root_of_two_and_moves_no_other_scale_down() -> None:
    scales = GradientScales(3, 1, RULES)
    found = run(scales, [[False, True, False]])[0]
    assert found[1] == pytest.approx(2**13 / math.sqrt(2), rel=1e-12)
    assert found[0] == found[2] == pytest.approx(2**13 * 2 ** (1 / 1000), rel=1e-12)
    assert scales.overflows == [0, 1, 0]


def test_the_same_scale_is_not_divided_again_within_its_window() -> None:
    scales = GradientScales(1, 1, RULES)
    found = [value for (value,) in run(scales, [[True]] * 126)]
    assert found[0] == found[124] == pytest.approx(2**12.5) and found[125] == pytest.approx(2**12)


def test_scales_are_clamped_after_each_change() -> None:
    low, high = GradientScales(1, 8, RULES), GradientScales(1, 8, RULES)
    run(low, [[True]] * (125 * 20))
    run(high, [[False]] * 12_000)
    assert low.values() == [8 * 2.0**7] and high.values() == [8 * 2.0**24]


@given(HISTORIES)
def test_every_history_keeps_the_rules(history: list[list[bool]]) -> None:
    """Against the rules said once more, for each scale alone."""
    found = run(GradientScales(3, 4, TIGHT), history)
    for block in range(3):
        exponent, last = TIGHT.initial, -(10**9)
        for step, bad in enumerate(history):
            if bad[block]:
                if step - last >= TIGHT.window:
                    exponent, last = max(exponent - 0.5, TIGHT.lowest), step
            else:
                exponent = min(exponent + 1 / 1000, TIGHT.highest)
            assert found[step][block] == pytest.approx(4 * 2**exponent, rel=1e-12)


@given(HISTORIES, HISTORIES)
def test_a_saved_state_goes_on_exactly_and_takes_up_another_number_of_shares(before: list[list[bool]], after: list[list[bool]]) -> None:
    whole = GradientScales(3, 2, TIGHT)
    run(whole, before)
    resumed, other = GradientScales(3, 2, TIGHT), GradientScales(3, 6, TIGHT)
    for scales in (resumed, other):
        scales.restore(json.loads(json.dumps(whole.state())))
    expected = run(whole, after, len(before))
    assert run(resumed, after, len(before)) == expected
    assert run(other, after, len(before)) == [[3 * value for value in row] for row in expected]


def test_one_global_scale_falls_with_any_resblock() -> None:
    scales = GradientScales(3, 1, ScaleSection(scope="global"))
    assert run(scales, [[False, True, False]])[0] == [pytest.approx(2**12.5)] * 3
    each = GradientScales(3, 1, RULES)
    each.restore(scales.state())
    assert each.values() == scales.values()


def test_one_scale_that_takes_over_from_many_is_as_small_as_their_smallest_and_divided_when_the_last_was() -> None:
    many, one = GradientScales(3, 1, RULES), GradientScales(3, 1, ScaleSection(scope="global"))
    many.update(10, [True, False, False])
    many.update(11, [False, True, False])
    many.update(12, [True, False, False])  # within its window: divided no further
    one.restore(many.state())
    assert one.exponents == [min(many.exponents)] and one.divided == [max(many.divided)] == [11] and one.overflows == [2, 1, 0]


def test_scale_exponents_must_be_in_order() -> None:
    with pytest.raises(ValueError, match=r"initial = 30.0 is not between lowest = 7 and highest = 24"):
        ScaleSection(initial=30.0)


def detector(**changes: object) -> Plateau:
    return Plateau(**({"window": 10, "patience": 2, "threshold": 0.01, "halvings": 5, "warmup": 5} | changes))  # type: ignore[arg-type]


def test_a_falling_loss_is_never_halved_and_a_flat_one_five_times() -> None:
    falling, flat = detector(), detector()
    assert not any(falling.observe(step, 5.0 * 0.99**step) for step in range(1, 200))
    halved = [step for step in range(1, 400) if flat.observe(step, 2.0)]
    assert halved == [35, 65, 95, 125, 155] and flat.halved == halved and flat.factor == 1 / 32


def test_progress_in_time_starts_the_count_again() -> None:
    plateau = detector()
    losses = {1: 3.0, 2: 3.0, 3: 2.9, 4: 2.9, 5: 2.9}  # by window: best, idle, better, idle, idle
    halved = [step for step in range(6, 56) if plateau.observe(step, losses[(step - 6) // 10 + 1])]
    assert halved == [55]


def test_it_resumes_in_the_middle_of_a_window_and_ignores_losses_that_are_not_finite() -> None:
    losses = [2.0 + 0.001 * (step % 7) if step % 13 else float("nan") for step in range(200)]
    whole, first = detector(), detector()
    expected = [whole.observe(step, losses[step]) for step in range(1, 200)]
    found = [first.observe(step, losses[step]) for step in range(1, 58)]
    second = detector()
    second.restore(json.loads(json.dumps(first.state())), 57)
    found += [second.observe(step, losses[step]) for step in range(58, 200)]
    assert found == expected and second.factor == whole.factor < 1


@pytest.mark.parametrize("stop", range(6, 26))
def test_a_window_that_a_restart_cuts_counts_whole(stop: int) -> None:
    """High losses at a window's start and low ones at its end: either part alone would have another mean, and another verdict."""
    losses = [{6: 9.0, 16: 8.9, 26: 8.8}.get(step, 1.0) for step in range(40)]
    plateau = detector(patience=1, threshold=0.002, halvings=1)
    for step in range(1, stop):
        plateau.observe(step, losses[step])
    again = detector(patience=1, threshold=0.002, halvings=1)
    again.restore(json.loads(json.dumps(plateau.state())), stop - 1)
    assert again.state() == plateau.state()
    for step in range(stop, 36):
        assert again.observe(step, losses[step]) == plateau.observe(step, losses[step])
        assert again.state() == plateau.state()
    assert again.state()["best"] == pytest.approx(1.78), "the third window's mean"


def test_halvings_by_hand_overrule_the_detector(caplog: pytest.LogCaptureFixture) -> None:
    plateau = detector(at=(40, 20))
    with caplog.at_level("INFO"):
        assert [step for step in range(1, 300) if plateau.observe(step, 1.0)] == [20, 40]
    assert "step size halved after update 20 (1 of 5): by hand" in caplog.text
    resumed = detector(at=(40, 20))
    with caplog.at_level("WARNING"):
        resumed.restore(detector().state() | {"halved": [10, 15]}, 30)
    assert "halved after [20], and no longer after [10, 15]: it is 2 times what it was" in caplog.text
    assert resumed.factor == 0.5 and resumed.observe(40, 1.0)


def test_a_restart_leaves_nothing_of_what_was_seen() -> None:
    fresh, seen = Plateau(4, 1, 0.5, 5, 0), Plateau(4, 1, 0.5, 5, 0)
    for step in range(1, 11):
        seen.observe(step, 1.0)
    assert seen.state() != fresh.state()
    seen.restart(10)
    assert seen.state() == fresh.state() and (seen.warmup, fresh.warmup) == (10, 0)
