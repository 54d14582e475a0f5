"""A run that goes on with fewer ranks, and then with more: the same batches and losses as undisturbed. Real ranks; about 40 s of CPU."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest

from infra import storage
from infra.errors import ConfigError, StopRequested
from infra.run_folder import RunFolder
from infra.world import World
from tests.ranks import run_in_ranks
from tests.test_training import StopAfter, copy_of, losses, run_stage
from train import checkpoint, elastic
from train.config import load_run
from train.metrics import read_metrics
from train.stages import STAGES


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("prepared")
    run_stage("prepare", str(root), [])
    return root


def train(world: World, root: str, until: int) -> int:
    """One attempt, as a launcher's rank makes it; stopped by a signal at an update. Returns its accumulation."""
    run = RunFolder(f"{root}/tiny")
    cfg = elastic.adapted(load_run(run.config_url, []), run, "dvae", world)
    stop = StopAfter(until)
    stop.left -= 1  # a launcher would have asked once before
    with contextlib.suppress(StopRequested):
        STAGES["dvae"].function()(cfg, run, world, stop)
    return cfg.dvae_fit.accumulation


def test_a_run_on_two_ranks_one_and_two_again_takes_the_same_steps(prepared: Path, tmp_path: Path) -> None:
    calm, moved = (copy_of(prepared, tmp_path / name) for name in ("calm", "moved"))
    assert run_in_ranks(train, 2, str(moved), 3) == [1, 1]
    assert checkpoint.complete(str(moved / "tiny" / "dvae")) == [3]
    assert storage.read_json(str(moved / "tiny" / "dvae" / "rows.json")) == {"ranks": 2, "rows": 4}
    assert train(World.single(), str(moved), 4) == 2, "half as many ranks take twice as many micro-batches"
    assert checkpoint.complete(str(moved / "tiny" / "dvae"))[-1] == 7
    assert run_in_ranks(train, 2, str(moved), 100) == [1, 1]
    run_stage("dvae", str(calm), [])
    assert len(losses(moved, "dvae")) == 10
    assert losses(moved, "dvae") == pytest.approx(losses(calm, "dvae"), rel=1e-4, abs=1e-5)
    rates = [[point.value for point in read_metrics(str(root / "tiny"), "dvae")["optim/lr"]] for root in (calm, moved)]
    assert rates[0] == rates[1], "schedules count updates, which have the same batch throughout"


def test_ranks_that_do_not_divide_the_batch_are_refused(prepared: Path, tmp_path: Path) -> None:
    root = copy_of(prepared, tmp_path)
    cfg, run = load_run(str(root / "tiny"), []), RunFolder(str(root / "tiny"))
    with pytest.raises(ConfigError, match=r"dvae_fit\.batch = 8 does not divide over 3 processes x dvae_fit\.accumulation = 1; use a multiple of 3"):
        from train.common import micro_batch

        micro_batch(elastic.adapted(cfg, run, "dvae", World(0, 3, 0, 3)), "dvae_fit", World(0, 3, 0, 3))
