"""Goodput where machines fail: formulas against simulation, and the page that is made of both. About 5 s."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from infra.repository import DOCS
from train.experiments import scale
from train.planning.failures import Job, daly, expected, interval, simulate, simulated, young

DAY = 86400.0


def test_young_and_daly_are_what_their_papers_say() -> None:
    job = Job(between_failures=24 * 3600.0, stall=300.0, write=0.0, restart=600.0)
    assert young(job) == pytest.approx(math.sqrt(2 * 300 * 86400))
    assert daly(job) == pytest.approx(young(job) * (1 + math.sqrt(300 / 172800) / 3 + 300 / 172800 / 9) - 300)
    assert daly(Job(100.0, 250.0, 0.0, 0.0)) == 100.0, "where a save takes twice the time between failures"
    assert interval(Job(3600.0, 0.001, 40.0, 0.0)) == 40.0 > daly(Job(3600.0, 0.001, 40.0, 0.0)), "saves come one at a time"


@pytest.mark.parametrize(
    "job", [Job(20_000.0, 30.0, 0.0, 300.0), Job(50_000.0, 2.0, 60.0, 400.0), Job(500_000.0, 10.0, 120.0, 100.0)], ids=["often", "usual", "seldom"]
)
def test_the_simulation_agrees_with_the_formula_and_daly_s_interval_is_the_best_of_many(job: Job) -> None:
    work = interval(job)
    found, error = simulated(job, work, 60 * DAY, 60)
    assert abs(found - expected(job, work)) < 4 * error + 0.004, (found, expected(job, work), error)
    others = [simulated(job, factor * work, 60 * DAY, 60)[0] for factor in (0.1, 0.3, 3.0, 10.0)]
    assert max(others) < found


def test_a_run_is_the_same_for_a_seed_and_loses_nothing_without_failures() -> None:
    job = Job(30_000.0, 5.0, 30.0, 200.0)
    assert simulate(job, 900.0, 10 * DAY, 3) == simulate(job, 900.0, 10 * DAY, 3) != simulate(job, 900.0, 10 * DAY, 4)
    calm = Job(1e15, 0.0, 0.0, 0.0)
    assert simulate(calm, 900.0, 10 * DAY, 0) == pytest.approx(1.0)
    assert simulate(Job(1e15, 100.0, 0.0, 0.0), 900.0, 10 * DAY, 0) == pytest.approx(0.9, abs=1e-3)
    assert simulate(Job(10.0, 0.0, 0.0, 1e6), 900.0, 10 * DAY, 0) == 0.0, "it never comes up"
    assert expected(Job(10.0, 0.0, 0.0, 1e6), 900.0) == 0.0


def test_more_gpus_are_faster_and_never_more_than_in_proportion_at_a_fixed_batch() -> None:
    for preset in ("1.2B", "12B"):
        rows = scale.rows(preset, weak=False)
        assert [row.gpus for row in rows] == list(scale.SIZES) and all(row.fits for row in rows)
        assert all(b.tokens_s <= 2.01 * a.tokens_s for a, b in pairwise(rows))
        weak = scale.rows(preset, weak=True)
        assert all(row.batch == scale.WEAK_SAMPLES * row.gpus for row in weak) and weak[-1].tokens_s > 50 * weak[0].tokens_s


def test_the_page_and_its_plot_are_those_that_the_formulas_give() -> None:
    text = (DOCS / "scale.md").read_text()
    assert scale.page(text) == text, "run: python -m train.experiments.scale"
    picture = (DOCS / "pictures" / scale.PICTURE).read_text()
    assert "1,024 GPUs" in picture and picture.startswith("<svg ")
