"""When training hears a stop: an update is saved before anything else, and what has nothing to lose is left at once."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from infra import signals
from infra.errors import StopRequested
from infra.run_folder import RunFolder
from infra.signals import StopFlag
from infra.world import World
from tests.train.loop.test_trainer import APPLIED, Counting, Nothing, Scripted
from train.config import FitSection
from train.loop.metrics import read_metrics
from train.loop.trainer import Loss, Trainer
from train.ranks.leaving import Between
from train.weights import checkpoint


class Struck(Counting):
    """A task during whose n-th update the signal comes, and which notes when it is evaluated."""

    def __init__(self, stop: StopFlag, at: int = -1, at_evaluation: int = -1) -> None:
        super().__init__([1.0])
        self.stop, self.at, self.at_evaluation, self.evaluated = stop, at, at_evaluation, list[int]()

    def loss(self, engine: Any, batch: Any, step: int, at: Any, denominators: Any) -> Loss:
        if step == self.at:
            self.stop.handle(signal.SIGUSR2, None)
        return super().loss(engine, batch, step, at, denominators)

    def evaluate(self, engine: Any, step: int, writer: Any, between: Between) -> dict[str, float]:
        """Of three batches; ``at_evaluation`` is the update after whose second one the signal comes."""
        for batch in range(3):
            between()
            if step == self.at_evaluation and batch == 1:
                self.stop.handle(signal.SIGUSR2, None)
        self.evaluated.append(step)
        return {"quality": float(step)}


def trainer(folder: Path, at: int = -1, at_evaluation: int = -1) -> tuple[Trainer, Struck]:
    stop, engine = StopFlag(), Scripted([APPLIED] * 8)
    section = FitSection(steps=6, save_every=100, eval_every=2, log_every=1)
    task, made = Struck(stop, at, at_evaluation), engine
    return Trainer("toy", task, made, Nothing(), section, RunFolder(str(folder)), World.single(), stop, torch.device("cpu")), task  # type: ignore[arg-type]


def test_an_evaluation_that_is_due_with_a_stop_is_made_by_the_next_start(tmp_path: Path) -> None:
    first, task = trainer(tmp_path, at=3)
    with pytest.raises(StopRequested, match="stopped by a signal after update 4 of 6; saved"):
        first.run_to_end()
    assert task.evaluated == [2], "the save comes first"
    second, task = trainer(tmp_path)
    second.run_to_end()
    assert task.evaluated == [4, 6], "and the one at the fourth update is made up for, with its weights"
    assert [(point.step, point.value) for point in read_metrics(str(tmp_path), "toy")["eval/quality"]] == [(2, 2.0), (4, 4.0), (6, 6.0)]


@pytest.mark.parametrize("at", [4, 6], ids=["in the middle", "the last"])
def test_an_evaluation_is_left_between_two_batches_and_made_again_by_the_next_start(tmp_path: Path, at: int) -> None:
    first, task = trainer(tmp_path, at_evaluation=at)
    with pytest.raises(StopRequested, match=f"stopped by a signal after update {at} of 6; saved"):
        first.run_to_end()
    assert task.stop.struck == "an evaluation" and checkpoint.complete(str(tmp_path / "toy")) == [at]
    assert at not in task.evaluated and not [point for point in read_metrics(str(tmp_path), "toy")["eval/quality"] if point.step == at]
    again, task = trainer(tmp_path, at_evaluation=at)  # what was to be made again may be left again
    with pytest.raises(
        StopRequested, match=f"stopped by a signal during the evaluation of update {at}; nothing was lost|during the end, after the last"
    ):
        again.run_to_end()
    third, task = trainer(tmp_path)
    outcome = third.run_to_end()
    assert task.evaluated == list(range(at, 7, 2)) and outcome.evaluation == {"quality": 6.0}
    assert [point.step for point in read_metrics(str(tmp_path), "toy")["eval/quality"]] == [2, 4, 6]


def test_a_stop_during_a_short_first_update_is_saved_after_it(tmp_path: Path) -> None:
    first, _ = trainer(tmp_path, at=0)
    with pytest.raises(StopRequested, match="after update 1 of 6; saved"):
        first.run_to_end()
    assert checkpoint.complete(str(tmp_path / "toy")) == [1]
    series = read_metrics(str(tmp_path), "toy")
    assert series["perf/save_s"][-1].step == 1 and series["perf/save_s"][-1].value > 0


def test_a_first_update_that_goes_on_compiling_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "PATIENCE_S", 0.1)
    first, task = trainer(tmp_path)
    signals.install(task.stop)

    def compiles(*_: Any) -> Loss:
        os.kill(os.getpid(), signal.SIGUSR2)
        with contextlib.suppress(Exception):  # as torch's compiler catches what its steps raise
            time.sleep(30)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            time.sleep(0.01)  # handlers run between steps of Python
        raise AssertionError("it goes on")

    monkeypatch.setattr(task, "loss", compiles)
    with pytest.raises(StopRequested, match="stopped by SIGUSR2 during the first update, which compiles; nothing was lost"):
        first.run_to_end()
    assert checkpoint.complete(str(tmp_path / "toy")) == []
    time.sleep(2 * signals._AGAIN_S)  # and no more, once training is left


def test_a_stop_before_or_during_a_restore_reads_nothing(tmp_path: Path) -> None:
    first, task = trainer(tmp_path)
    task.stop.received = signal.SIGTERM
    with pytest.raises(StopRequested, match="stopped by SIGTERM during the restoring of a checkpoint; nothing was lost"):
        first.run_to_end()
    assert not (tmp_path / "toy").exists()
