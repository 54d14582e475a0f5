"""A run that goes on with fewer ranks, and then with more: the same batches and losses as undisturbed. Real ranks; about two minutes of CPU."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

from infra import storage
from infra.errors import ConfigError, StopRequested
from infra.run_folder import RunFolder
from infra.signals import StopFlag
from infra.world import World
from tests.support.ranks import run_in_ranks
from tests.system.test_training import StopAfter, copy_of, losses, run_stage
from train import launch
from train.config import load_run
from train.loop.metrics import read_metrics
from train.run import elastic
from train.run.stage_table import STAGES
from train.weights import checkpoint


def train(world: World, root: str, stage: str, until: int, zero: int = 2) -> int:
    """One attempt, as a launcher's rank makes it; stopped by a signal at an update. Returns its accumulation."""
    run = RunFolder(f"{root}/tiny")
    cfg = elastic.adapted(load_run(run.config_url, [f"zero.stage={zero}"]), run, stage, world)
    stop = StopAfter(until)
    stop.left -= 1  # a launcher would have asked once before
    with contextlib.suppress(StopRequested):
        STAGES[stage].function()(cfg, run, world, stop)
    return int(getattr(cfg, f"{stage}_fit").accumulation)


@pytest.mark.parametrize("stage", ["dvae", "dalle"])
def test_a_run_on_two_ranks_one_and_two_again_takes_the_same_steps(prepared: Path, tmp_path: Path, stage: str) -> None:
    """dalle on ZeRO's stages 2, 3 and 1."""
    calm, moved = (copy_of(prepared, tmp_path / name, without=stage if stage == "dvae" else "") for name in ("calm", "moved"))
    assert run_in_ranks(train, 2, str(moved), stage, 3) == [1, 1]
    assert checkpoint.complete(str(moved / "tiny" / stage))[-1] == 3
    assert storage.read_json(str(moved / "tiny" / stage / "rows.json")) == {"ranks": 2, "rows": 4}
    assert train(World.single(), str(moved), stage, 4, 3) == 2, "half as many ranks take twice as many micro-batches"
    assert checkpoint.complete(str(moved / "tiny" / stage))[-1] == 7
    assert run_in_ranks(train, 2, str(moved), stage, 100, 1) == [1, 1]
    run_stage(stage, str(calm), [])
    assert len(losses(moved, stage)) == 10
    assert losses(moved, stage) == pytest.approx(losses(calm, stage), rel=1e-4, abs=1e-5)
    rates = [[point.value for point in read_metrics(str(root / "tiny"), stage)["optim/lr"]] for root in (calm, moved)]
    assert rates[0] == rates[1], "schedules count updates, which have the same batch throughout"


def test_ranks_that_do_not_divide_the_batch_are_refused(prepared: Path, tmp_path: Path) -> None:
    root = copy_of(prepared, tmp_path)
    cfg, run = load_run(str(root / "tiny"), []), RunFolder(str(root / "tiny"))
    with pytest.raises(ConfigError, match=r"dvae_fit\.batch = 8 does not divide over 3 processes x dvae_fit\.accumulation = 1; use a multiple of 3"):
        from train.run.inputs import micro_batch

        micro_batch(elastic.adapted(cfg, run, "dvae", World(0, 3, 0, 3)).dvae_fit, "dvae_fit", World(0, 3, 0, 3))


def submit(stage: str, *overrides: str) -> None:
    given: dict[str, Any] = {"on": "slurm", "nproc": 0, "dry_run": True, "stop": StopFlag()}
    if stage == "demo":
        launch.demo("tiny", list(overrides), **given)
    else:
        launch.stage(stage, "tiny", list(overrides), worker=False, **given)


def test_a_submission_is_refused_as_the_start_would_be(tmp_path: Path) -> None:
    """The job waited in the queue, and died at its start with 78."""
    three = (f"run.root={tmp_path}", "cluster.nodes=3")
    for stage, batch, *more in (("dvae", 8), ("dalle", 8), ("clip", 8), ("align", 8, "align_fit.steps=5")):
        refusal = rf"^{stage}_fit\.batch = {batch} does not divide over 3 processes x {stage}_fit\.accumulation = 1; use a multiple of 3\.$"
        with pytest.raises(ConfigError, match=refusal):
            submit(stage, *three, "cluster.gpus=1", *more)
    with pytest.raises(ConfigError, match=r"clip_fit\.batch = 8 does not divide over 3 processes"):  # of a chain every stage is looked at
        submit("demo", *three, "cluster.gpus=1", "dvae_fit.batch=9", "dalle_fit.batch=9")
    with pytest.raises(ConfigError, match=r"dvae_fit\.batch = 9 does not divide over 6 processes"):  # two ranks on a node without GPUs
        submit("dvae", *three, "dvae_fit.batch=9")
    submit("dvae", *three, "dvae_fit.batch=9", "cluster.cpus=1")
    submit("encode", *three)  # which has no batch to divide


def test_a_stage_that_was_begun_is_refused_by_the_ranks_alone(tmp_path: Path) -> None:
    """Its start adapts the micro-batches."""
    cfg, run = load_run("tiny", ["dvae_fit.accumulation=4"]), RunFolder(str(tmp_path / "tiny"))
    with pytest.raises(ConfigError, match=r"4 processes x dvae_fit\.accumulation = 4; use a multiple of 16"):
        elastic.check(cfg, run, "dvae", 4)
    storage.write_json(run.at("dvae", "rows.json"), {"rows": 2, "ranks": 1})
    elastic.check(cfg, run, "dvae", 4)
    assert elastic.adapted(cfg, run, "dvae", World(0, 4, 0, 4)).dvae_fit.accumulation == 1
    with pytest.raises(ConfigError, match=r"dvae_fit\.batch = 8 does not divide over 3 processes"):
        elastic.check(cfg, run, "dvae", 3)
