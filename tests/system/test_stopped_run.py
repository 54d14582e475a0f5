"""A run outlives an update: one that an earlier commit stopped goes on with the losses that it would have had."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from infra import storage
from tests.support.stopped_run import FIXTURE, STEPS, STOPPED, TRAINED, StopAfter, losses, run_stage
from train.launch import StageFailed


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


def test_a_run_that_moves_to_s3_and_back_is_renamed_and_named_from_elsewhere_is_bit_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3: str
) -> None:
    """An undisturbed run, and one that is stopped after each update and lies somewhere else each time."""
    still, moved = stopped(tmp_path / "still", "clip"), stopped(tmp_path / "moved", "clip")
    run_stage("clip", [str(still)])

    def one_more(place: str) -> None:
        with pytest.raises(StageFailed, match="stopped by a signal"):
            run_stage("clip", [place], StopAfter(1))

    storage.upload_folder(moved, f"{s3}/on s3 [1]", last=["config.json"])
    shutil.rmtree(moved)
    one_more(f"{s3}/on s3 [1]/")
    storage.download_folder(f"{s3}/on s3 [1]", tmp_path / "back" / "renamed")
    monkeypatch.chdir(tmp_path / "back")
    one_more("renamed")
    (tmp_path / "back" / "renamed").rename(tmp_path / "again 100%")
    monkeypatch.chdir(tmp_path / "still")
    run_stage("clip", ["../again 100%"])
    last = Path("clip", "checkpoints", f"step-{STEPS:08d}", "rank-0.bin")
    assert (tmp_path / "again 100%" / last).read_bytes() == (still / last).read_bytes()
    assert losses(str(tmp_path / "again 100%"), "clip") == losses(str(still), "clip")
    places = json.loads((tmp_path / "again 100%" / "provenance.json").read_text())["places"]
    assert [place["url"] for place in places] == [f"{s3}/on s3 [1]", str(tmp_path / "back" / "renamed"), str(tmp_path / "again 100%")]
