"""When training hears a stop: an update is saved before anything else, and what has nothing to lose is left at once."""

from __future__ import annotations

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
from train.weights import checkpoint


class Struck(Counting):
    """A task during whose n-th update the signal comes, and which notes when it is evaluated."""

    def __init__(self, stop: StopFlag, at: int = -1) -> None:
        super().__init__([1.0])
        self.stop, self.at, self.evaluated = stop, at, list[int]()

    def loss(self, engine: Any, batch: Any, step: int, at: Any, denominators: Any) -> Loss:
        if step == self.at:
            self.stop.handle(signal.SIGUSR2, None)
        return super().loss(engine, batch, step, at, denominators)

    def evaluate(self, engine: Any, step: int, *_: Any) -> dict[str, float]:
        self.evaluated.append(step)
        return {"quality": float(step)}


def trainer(folder: Path, at: int = -1) -> tuple[Trainer, Struck]:
    stop, engine = StopFlag(), Scripted([APPLIED] * 8)
    section = FitSection(steps=6, save_every=100, eval_every=2, log_every=1)
    task, made = Struck(stop, at), engine
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
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            time.sleep(0.01)  # handlers run between steps of Python
        raise AssertionError("it goes on")

    monkeypatch.setattr(task, "loss", compiles)
    with pytest.raises(StopRequested, match="stopped by SIGUSR2 during the first update, which compiles; nothing was lost"):
        first.run_to_end()
    assert checkpoint.complete(str(tmp_path / "toy")) == []


def test_a_stop_before_or_during_a_restore_reads_nothing(tmp_path: Path) -> None:
    first, task = trainer(tmp_path)
    task.stop.received = signal.SIGTERM
    with pytest.raises(StopRequested, match="stopped by SIGTERM during the restoring of a checkpoint; nothing was lost"):
        first.run_to_end()
    assert not (tmp_path / "toy").exists()
