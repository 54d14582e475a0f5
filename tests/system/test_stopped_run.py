"""A run outlives an update: one that an earlier commit stopped goes on with the losses that it would have had."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.support.stopped_run import FIXTURE, STEPS, STOPPED, TRAINED, losses, run_stage


def stopped(place: Path, stage: str) -> Path:
    """The fixture's run as it was when this stage was stopped."""
    run = place / "runs" / "run"
    shutil.copytree(FIXTURE / "run", run)
    if stage == "dvae":
        shutil.rmtree(run / "dvae")
        shutil.copytree(FIXTURE / "dvae-stopped", run / "dvae")
    return run


@pytest.mark.parametrize("stage", TRAINED)
def test_a_stage_that_an_earlier_commit_stopped_goes_on_with_the_same_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    run = stopped(tmp_path, stage)
    before = {name: (run / stage / "checkpoints" / f"step-{STOPPED:08d}" / name).read_bytes() for name in ("rank-0.bin", "meta.json")}
    monkeypatch.chdir(tmp_path)
    run_stage(stage, [str(run)])
    assert (run / stage / "metrics" / "attempt-1.jsonl").exists(), "it went on, and did not begin anew"
    recorded = {int(step): loss for step, loss in json.loads((FIXTURE / "losses.json").read_text())[stage].items()}
    # Bit for bit on the processor that made the fixture; others sum in another order.
    assert losses(str(run), stage) == pytest.approx(recorded, rel=1e-4, abs=1e-5)
    assert max(recorded) == STEPS
    for name, content in before.items():
        assert (run / stage / "checkpoints" / f"step-{STOPPED:08d}" / name).read_bytes() == content
