"""What ``bench plan`` makes of rates and seconds, without measuring any."""

from __future__ import annotations

import pytest
import torch

from train.bench import plan
from train.bench.harness import Result, start, to_json
from train.bench.plan import CASES, REFERENCE, Case, Rates, Turn
from train.machine.rates import Options

RATES = Rates(fp32=100.0, bf16=600.0, copies=8.0, passes=5.0, sums=1.0, message=100.0)


def _turns(case: Case, times: float) -> list[Turn]:
    """Updates that take so many times what full rates would allow, on a machine that is faster in every turn."""
    found = []
    for speed in (1.0, 2.0, 4.0):
        rates = Rates(speed * 100, speed * 600, speed * 8, speed * 5, speed, 100.0 / speed)
        seconds = times * plan.predicted(case, rates, 1.0)
        found.append(Turn(rates, seconds, 3 * seconds))
    return found


def test_one_number_is_fitted_on_one_size_and_the_machines_speed_does_not_matter() -> None:
    assert plan.fitted(REFERENCE, _turns(REFERENCE, 1.25)) == pytest.approx(0.8)
    assert plan.ratio(REFERENCE, _turns(REFERENCE, 1.25), 0.8) == pytest.approx(1.0, rel=0.001), "a message's latency is as it was measured"
    other = Case(256, 8, processes=2)
    assert plan.ratio(other, _turns(other, 2.0), 0.8) == pytest.approx(2 / 3.2, rel=0.01)
    assert [plan.is_met(value) for value in (0.79, 0.81, 1.0, 1.19, 1.21)] == [False, True, True, True, False]


def test_a_prediction_grows_with_what_an_update_does() -> None:
    def seconds(case: Case) -> float:
        return plan.predicted(case, RATES, 1.0)

    assert seconds(Case(512, 4)) < seconds(Case(512, 8)) < seconds(Case(1024, 8))
    assert seconds(Case(512, 4, "fp32")) > seconds(Case(512, 4)) > seconds(Case(512, 4, more="dalle_fit.logits=bf16"))
    assert seconds(Case(512, 4, processes=2)) > seconds(Case(512, 4)), "a core sends, and cannot compute meanwhile"
    assert len(set(CASES)) == len(CASES) and REFERENCE in CASES and len({case.name for case in CASES}) == len(CASES)


def test_either_goal_is_a_lower_limit_of_the_smaller_over_the_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = (REFERENCE, Case(256, 8), Case(768, 4))
    slow = {REFERENCE: 1.25, cases[1]: 1.25 * 1.3, cases[2]: 1.25 / 1.1}
    monkeypatch.setattr(plan, "measured", lambda chosen, processes, options: {case: _turns(case, slow[case]) for case in chosen})
    found: Result = plan.compare(cases, REFERENCE, Options("cpu", 1.0, 3))
    below, above = found.ratios[f"predicted below, {cases[1].name}"], found.ratios[f"predicted above, {cases[2].name}"]
    assert below.value == pytest.approx(1 / 1.3, rel=0.001) and below.goal == plan.LOWEST > below.value
    assert above.value == pytest.approx(1 / 1.1, rel=0.001) and above.goal == pytest.approx(1 / plan.HIGHEST)
    assert found.ratios[f"fitted, {REFERENCE.name}"].goal is None
    assert "1 of 2 within the goal" in found.notes[0] and found.measured[
        "seconds of the clock over those of the core, 1 process"
    ].value == pytest.approx(3)
    assert found.floor["passes in bf16, 1 process"].value == 10 and "sums, 1 process" not in found.floor and to_json(found)


def test_rates_are_measured_on_what_a_resblock_does() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        work, count = plan.passing(dtype)
        work()
        plan.products(dtype)()
        assert count == pytest.approx({torch.float32: 254, torch.bfloat16: 175}[dtype] * 1280 * 512, rel=0.2)
    assert start("plan", "", Options("cpu"))
