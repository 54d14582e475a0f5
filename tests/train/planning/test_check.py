"""`plan --check` runs a rank of a world that is not there: on each ZeRO stage the plan is right, and where it is made wrong that is said. About 20 s, one process."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from infra.errors import ConfigError, ReportedError
from tests.support.root import ROOT
from train.config import load_run
from train.planning import check
from train.planning.check import Finding
from train.planning.estimate import Setting
from train.planning.states import Cluster
from train.verbs import plan

SMALL = ["dalle.layers=2", "dalle.width=512", "dalle.heads=4", "dalle_fit.batch=64", "evaluate.batch=2", "zero.reduce_bucket_size=1000000"]
SMALL += ["zero.stage3_prefetch_bucket_size=500000", "zero.stage3_max_live_parameters=4000000", "zero.stage3_max_reuse_distance=4000000"]
CONTRAST = ["dalle_fit.objective=caption_contrast", "dalle_fit.init_from=export"]
CASES = {
    "stage 3, by node": [],
    "stage 3, flat": ["zero.sharding=flat"],
    "stage 2, two micro-batches": ["zero.stage=2", "dalle_fit.accumulation=2"],
    "stage 1": ["zero.stage=1"],
    "machines of one GPU, precision decided there": ["zero.stage=2", "zero.sharding=flat", "dalle_fit.precision=auto", "dalle_fit.moments=fp32"],
    "Muon on stage 3, by node": ["dalle_fit.optimizer=muon"],
    "stage 3, captions contrasted": [*CONTRAST, "dalle_fit.accumulation=2"],
    "stage 2, flat, captions contrasted": [*CONTRAST, "zero.stage=2", "zero.sharding=flat"],
    "step sizes by width, stage 1": ["dalle.base_width=128", "dalle.base_heads=2", "zero.stage=1", "zero.sharding=flat"],
    "step sizes by width, stage 2, fp32": ["dalle.base_width=128", "zero.stage=2", "dalle_fit.precision=fp32", "dalle_fit.moments=fp32"],
    "step sizes by width, stage 3, Muon": ["dalle.base_width=128", "dalle_fit.optimizer=muon"],
    "stage 2, a bucket larger than the model": ["zero.reduce_bucket_size=50000000", "zero.stage=2"],
    "stage 2, flat, bf16": ["zero.stage=2", "zero.sharding=flat", "dalle_fit.precision=bf16", "dalle_fit.moments=fp32"],
}
WHOLE = {"tiny on stage 3, shards on one GPU": (32, 1), "tiny on stage 3, shards on four": (8, 4)}
"""Clusters. A bucket takes the whole model, which is reduced once."""
PROGRAM = """
import json, sys
from unittest import mock
from train.config import load_run
from train.planning import check, estimate, states, wire
from train.planning.estimate import Setting
from train.planning.states import Cluster

def wrong(words, cluster=Cluster(8, 4), preset="12B"):
    setting = Setting.configured(load_run(preset, words), cluster)
    return [(f.what, f.planned, f.found) for f in check.findings(setting) if not f.is_right]

cases, small, whole = map(json.loads, sys.argv[1:])
found = {name: wrong([*small, *words], Cluster(32, 1) if "one GPU" in name else Cluster(8, 4)) for name, words in cases.items()}
tiny = ["zero.stage=3", "zero.sharding=node", "dalle_fit.batch=64"]
found |= {name: wrong(tiny, Cluster(*cluster), "tiny") for name, cluster in whole.items()}
memory, traffic, fragments = estimate.memory, estimate.traffic, estimate.fragments
def more(setting):
    seen = memory(setting)
    return estimate.replace(seen, states=estimate.replace(seen.states, moments=1.06 * seen.states.moments))
more_sent = lambda setting: estimate.replace(traffic(setting), outside=1.01 * traffic(setting).outside)
with (
    mock.patch.object(estimate, "memory", more),
    mock.patch.object(estimate, "traffic", more_sent),
    mock.patch.object(estimate, "fragments", lambda setting: [fragments(setting)[at] for at in (1, 0, 2, 3)]),
):
    found["off"] = wrong(small)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, list[tuple[str, float, float]]]:
    """What is wrong, by case: a process of its own, for process groups are a process's."""
    words = [sys.executable, "-c", PROGRAM, json.dumps(CASES), json.dumps(SMALL), json.dumps(WHOLE)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    result: dict[str, list[tuple[str, float, float]]] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("case", [*CASES, *WHOLE])
def test_the_plan_is_what_the_engine_does(found: dict[str, list[tuple[str, float, float]]], case: str) -> None:
    assert found[case] == []


def test_a_plan_that_is_off_is_named(found: dict[str, list[tuple[str, float, float]]]) -> None:
    assert [what for what, *_ in found["off"]] == [
        "of them planned or held otherwise",
        "tensors of a checkpoint held otherwise",
        "moments",
        "sent in an update, to other machines",
    ]


def test_a_figure_may_be_off_by_its_tolerance_and_below_by_more() -> None:
    assert Finding("x", 100, 105, tolerance=0.05).is_right and not Finding("x", 100, 105.1, tolerance=0.05).is_right
    assert Finding("x", 100, 90, tolerance=0.05, below=0.05).is_right and not Finding("x", 100, 89, tolerance=0.05, below=0.05).is_right
    assert Finding("x", 0, 0).is_right and not Finding("x", 0, 1).is_right
    assert Finding("x", 2e9, 1e9, "GB").line.endswith("-50.00%   WRONG")


def test_what_differs_ends_the_command_with_its_name(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    setting = Setting.configured(load_run("12B", SMALL), Cluster(8, 4))
    with pytest.raises(ConfigError, match=r"zero\.offload_optimizer=false"):
        check.findings(Setting.configured(load_run("12B", [*SMALL, "zero.offload_optimizer=true"]), Cluster(8, 4)))
    monkeypatch.setattr(check, "findings", lambda _: [Finding("masters", 1e9, 2e9, "GB"), Finding("moments", 1, 1)])
    with pytest.raises(ReportedError, match="the engine does otherwise than planned: masters"):
        plan.compare(setting)
    said = capsys.readouterr().out
    assert "rank 0 of 32" in said and "as planned" not in said
    monkeypatch.setattr(check, "findings", lambda _: [Finding("masters", 1e9, 0.97e9, "GB", 0.05), Finding("moments", 1, 1), Finding("none", 0, 0)])
    plan.compare(setting)
    assert capsys.readouterr().out.endswith("as planned: all 3 figures; of those that may differ, 'masters' does most, by -3.00%\n")


def test_what_cannot_fit_is_refused_before_minutes_of_checking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "compare", lambda _: pytest.fail("it was checked"))
    with pytest.raises(ConfigError, match=r"12B as configured .* needs .* on each GPU"):
        plan.main("12B", [], nodes=128, gpus=8, memory=4, gpu="H100-80GB", tokens=0, rank=0, check=True)


def test_without_the_engine_s_package_a_line_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "train.planning.check")
    monkeypatch.delattr(sys.modules["train.planning"], "check")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    for name in [name for name in sys.modules if name.startswith("train.engines")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ConfigError, match=r"plan --check computes with deepspeed, which is not installed: pip install -r requirements\.txt"):
        plan.compare(Setting.configured(load_run("12B", SMALL), Cluster(8, 4)))
