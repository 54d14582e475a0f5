"""What the loop does at a change point, with an evaluation that a stop left to the next start, and with what a checkpoint took: from notes, without a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from infra import storage
from infra.config import to_json
from infra.errors import StopRequested
from infra.signals import STOP_SIGNALS, StopFlag
from infra.world import World
from tests.train.loop.test_trainer_updates import Task, make, points
from train.config import load_run
from train.loop.metrics import MetricsWriter
from train.loop.plateau import Plateau
from train.loop.trainer import Loss, Trainer
from train.run.change_points import Curve


class NotedPlateau(Plateau):
    """A plateau that notes how its warm-up begins anew."""

    def __init__(self) -> None:
        super().__init__(1, 1, 0.0, 1, 0, at=(5,))
        self.notes: list[tuple[str, int]] = []

    def restart(self, step: int) -> None:
        self.notes.append(("restart", step))

    def begin_at(self, step: int) -> None:
        self.notes.append(("begin at", step))


def configured(folder: Path, steps: int, how: str = "recomputed", *words: str) -> tuple[Trainer, Any, Task, NotedPlateau]:
    """A stage 'dalle' with a configuration, as a run has one."""
    fit, engine, task, _ = make(folder, steps=steps, on_change=how)
    config = json.loads(to_json(load_run("tiny", [f"dalle_fit.steps={steps}", *words])))
    plateau = NotedPlateau()
    fit.stage, fit.meta, fit.plateau = "dalle", {"config": config}, plateau
    return fit, engine, task, plateau


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str, str]]:
    found: list[tuple[int, str, str]] = []
    monkeypatch.setattr(MetricsWriter, "text", lambda writer, step, name, text: found.append((step, name, text)))
    return found


@pytest.mark.parametrize(
    ("how", "curve", "notes"),
    [("recomputed", Curve(0, 9), ("begin at", 0)), ("kept", Curve(0, 4), ("begin at", 0)), ("restarted", Curve(4, 9), ("restart", 4))],
)
def test_a_change_point_is_written_down_shown_once_and_followed_by_the_schedule(
    how: str, curve: Curve, notes: tuple[str, int], tmp_path: Path, texts: list[tuple[int, str, str]]
) -> None:
    first, _, task, plateau = configured(tmp_path, 4)
    first.run_to_end()
    assert task.curve is None and plateau.notes == [] and not (tmp_path / "dalle/changes.json").exists()
    assert {name for _, name, _ in texts} == {"configuration", "lineage"}
    texts.clear()
    stop = StopFlag()
    second, _, task, plateau = configured(tmp_path, 9, how, "dalle_fit.lr=1e-3")
    second.stop = stop
    _stop_at(task, stop, 4)
    with pytest.raises(StopRequested, match="after update 5 of 9"):
        second.run_to_end()
    (point,) = storage.read_json(str(tmp_path / "dalle/changes.json"))
    assert point["step"] == 4 and set(point["changed"]) == {"dalle_fit.lr", "dalle_fit.steps"} and point["schedule"] == how
    assert task.curve == curve and plateau.notes == [notes]
    assert [(step, name) for step, name, _ in texts] == [(5, "configuration"), (5, "lineage"), (4, "change point")]
    assert "dalle_fit.lr: 0.003 -> 0.001" in texts[-1][2]
    texts.clear()
    third, _, task, plateau = configured(tmp_path, 9, how, "dalle_fit.lr=1e-3")
    third.run_to_end()
    assert task.curve == curve and plateau.notes == [("begin at", curve.start)], "later starts follow it and begin none"
    assert texts == [] and len(storage.read_json(str(tmp_path / "dalle/changes.json"))) == 1


def _stop_at(task: Task, stop: StopFlag, at: int) -> None:
    plain = task.loss

    def stopping(engine: Any, batch: Any, step: int, *rest: Any) -> Loss:
        if step == at:
            stop.handle(STOP_SIGNALS[0], None)
        return plain(engine, batch, step, *rest)

    task.loss = stopping  # type: ignore[assignment, method-assign]


def test_the_main_rank_alone_says_that_a_run_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, *_ = configured(tmp_path, 4)
    for rank in (0, 1):
        second, *_ = configured(tmp_path, 9)
        second.world = World(rank, 2, rank, 2)
        second._go_on({"config": first.meta["config"], "step": 4})
    assert [record.message for record in caplog.records] == ["dalle: goes on from update 4 on: dalle_fit.steps: 4 -> 9; schedule recomputed"]


@pytest.mark.parametrize(("at", "before", "after"), [(3, [], [3, 6, 7]), (4, [3], [6, 7]), (6, [3], [6, 7])])
def test_an_evaluation_that_a_stop_left_out_is_made_first_by_the_next_start(at: int, before: list[int], after: list[int], tmp_path: Path) -> None:
    stop = StopFlag()
    fit, _, task, _ = make(tmp_path, stop)
    _stop_at(task, stop, at - 1)
    with pytest.raises(StopRequested, match=f"after update {at} of 7"):
        fit.run_to_end()
    assert task.evaluated == before
    again, _, second, _ = make(tmp_path)
    again.run_to_end()
    assert second.evaluated == after


def test_tensors_are_named_to_be_loaded_at_a_start_and_to_be_saved_after_it(tmp_path: Path) -> None:
    fit, engine, *_ = make(tmp_path)
    plain, asked = engine.fragments, list[bool]()

    def noted(*, to_load: bool) -> Any:
        asked.append(to_load)
        return plain(to_load=to_load)

    engine.fragments = noted
    fit.run_to_end()
    assert asked == [True, False, False]


def test_what_loading_and_saving_took_is_logged(tmp_path: Path) -> None:
    fit, *_ = make(tmp_path, log_every=1, save_every=2)
    fit.run_to_end()
    waits = [value for _, value in points(tmp_path, "data/wait_s")]
    ((step, waited),) = points(tmp_path, "goodput/data_s")
    assert step == 7 and waited == pytest.approx(sum(waits)) and waited > 0
    saves = points(tmp_path, "perf/save_s")
    assert [step for step, _ in saves] == [4, 6, 7] and all(0 < seconds < 60 for _, seconds in saves), "each of the one before, the last of its own"
