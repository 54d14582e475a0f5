"""The adviser: which verdict follows from which numbers, and that plan and the report say it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.fake_run import write_json, write_metrics
from train.config import DalleFit, RunConfig, load_run
from train.evaluation.data_limit import Facts, described
from train.planning.estimate import Setting
from train.planning.states import Cluster
from train.report.section_curves import section
from train.report.view import RunView
from train.verbs import plan


@pytest.mark.parametrize(
    ("facts", "verdict", "said"),
    [
        (Facts(19_327, 1.9, train=1.86, validation=1.85), "Computing time is the limit", "the training loss of 1.860 nats is 0.5% above"),
        (Facts(19_327, 6.5, train=2.35, validation=2.373), "Data may soon be the limit", "19,327 training pictures, each read 6.5 times"),
        (Facts(19_327, 6.5, train=2.0, validation=2.373), "Data is the limit: the model learns pictures by heart", "15.7% below"),
        (Facts(19_327, 1.0, train=2.0, validation=2.373), "Data is the limit", "15.7% below"),
        (Facts(19_327, 6.5), "Data is likely to be the limit", "each read 6.5 times"),
        (Facts(19_327, 3.9), "Computing time is the limit", "each read 3.9 times"),
        (Facts(19_327, 6.5, train=2.0, validation=2.373, is_harder=True), "Data is likely", "its loss says nothing beside that of validation"),
        (
            Facts(1_024, 6.5, crops=4, entropy=3.4657359),
            "Data is likely",
            "in 4 crops, each read 6.5 times; telling them apart takes log2 1,024 = 10.0 bits",
        ),
        (Facts(1_024, 6.5, entropy=3.47), "Data is likely", "a code has 5.0: 2 codes may identify a picture"),
    ],
)
def test_the_verdict_follows_from_the_numbers_and_shows_them(facts: Facts, verdict: str, said: str) -> None:
    words = described(facts)
    assert words.startswith(verdict) and said in words, words
    assert ("encode.crops=4" in words) == ("Data" in verdict) and ("dalle_fit.steps" in words) == ("Computing" in verdict)


def test_the_report_and_the_plan_of_a_run_say_it(tmp_path: Path) -> None:
    run = tmp_path / "mine"
    write_json(run / "config.json", RunConfig().model_dump(mode="json") | {"dalle_fit": DalleFit(batch=8).model_dump(mode="json")})
    done = {"stage": "prepare", "seconds": 1.0, "world_size": 1, "commit": "c", "finished": 1.0}
    write_json(run / "prepare" / "done.json", done | {"summary": {"splits": {"train": 5, "validation": 1}}})
    write_metrics(run, "dalle", 100, 10, lambda step: {"train/loss_image": 3.0 if step < 100 else 2.0, "eval/loss_image": 2.5})
    shown = section(RunView(str(run)))
    assert shown is not None and "Data is the limit: the model learns pictures by heart" in shown.body
    assert "5 training pictures, each read 160.0 times" in shown.body and "20.0% below the validation loss of 2.500" in shown.body
    setting = Setting.configured(load_run("tiny", ["dalle_fit.steps=100", "dalle_fit.batch=8"]), Cluster(1, 1))
    assert plan.data("tiny", setting) == ""
    said = plan.data(str(run), setting)
    assert said.startswith("data                 Data is likely to be the limit") and "5 training pictures, each read 160.0 times" in said
    odds: tuple[Any, ...] = ([], {"train": "x"}, {"train": [5]}, {"train": -5}, None)
    for odd in odds:  # a foreign run's
        write_json(run / "prepare" / "done.json", done | {"summary": {"splits": odd}})
        assert plan.data(str(run), setting) == ""
