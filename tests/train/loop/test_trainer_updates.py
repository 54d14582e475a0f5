"""What the training loop does in each update, and what of it a restart brings back: seen from an engine, a task and a loader that write everything down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.shards.shard_set import id_hash
from infra.errors import StopRequested
from infra.run_folder import RunFolder
from infra.signals import STOP_SIGNALS, StopFlag
from infra.world import World
from tests.train.loop.test_trainer import Scripted
from train.config import FitSection
from train.engines.protocol import Update
from train.loop import watching
from train.loop.goodput import NAMES
from train.loop.metrics import MetricsWriter, read_metrics
from train.loop.plateau import Plateau
from train.loop.trainer import Loss, Trainer
from train.optimizer.loss_scale import LossScale
from train.ranks import watchdog
from train.weights import checkpoint

STEPS = 7


class Noted(Scripted):
    """An engine that measures, with a state of its own; every call is noted."""

    def __init__(self) -> None:
        super().__init__([])
        self.notes: list[Any] = []
        self.scale = LossScale(4.0)
        self.loss_scale: Any = self.scale
        self.inner = 0

    def micro_batch(self, *, last: bool) -> None:
        self.notes.append(last)

    def backward(self, loss: torch.Tensor) -> None:
        self.notes.append(float(loss))

    def measure(self) -> torch.Tensor:
        self.notes.append("measure")
        return torch.tensor([1.0, 2.0], dtype=torch.float64)

    def step(self, lr: float, measured: Any = None) -> Update:  # type: ignore[override]
        self.notes.append(("step", lr, measured))
        self.updates += 1
        self.inner += 10
        self.scale.update(finite=self.updates != 3)
        return Update(True, 0.5, numerics={"zero_share/000": 0.25} if self.updates == 4 else {})

    def state(self) -> dict[str, Any]:
        return {"inner": self.inner}

    def more_to_load(self, state: dict[str, Any]) -> Any:
        return iter(())

    def restore(self, state: dict[str, Any]) -> None:
        self.inner = state["inner"]

    def averaged(self) -> Any: ...


class Task:
    """Losses fall from 9 on by one an update, and are shared by micro-batches."""

    metrics: tuple[str, ...] = ("loss", "other")
    unit = "tokens"
    curve: Any = None

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.evaluated: list[int] = []

    def schedule(self, step: int) -> dict[str, float]:
        return {"lr": 0.1 * (step + 1), "temperature": float(step)}

    def denominators(self, batches: list[Any]) -> dict[str, float]:
        return {"all": float(len(batches))}

    def loss(self, engine: Any, batch: Any, step: int, at: Any, denominators: Any) -> Loss:
        self.asked.append((step, at["temperature"], denominators["all"]))
        share = torch.tensor((9.0 - step) / 2)
        return Loss(share, {"loss": share, "other": torch.tensor(1.0)})

    def evaluate(self, engine: Any, step: int, *_: Any) -> dict[str, float]:
        self.evaluated.append(step)
        return {"quality": float(step)}

    def units(self, batch: Any) -> int:
        return 50


class Numbered:
    """Batches of one sample, by its number."""

    def __init__(self) -> None:
        self.drawn = 0

    def next(self) -> dict[str, Any]:
        self.drawn += 1
        return {"ids": [f"id-{self.drawn}"]}

    def state(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def restore(self, state: dict[str, Any]) -> None:
        self.drawn = state["drawn"]


class Shown:
    """Instead of the progress line."""

    seen: list[Any]

    def __init__(self, total: int, title: str, *, every: int, timed: bool, start: int, enabled: bool) -> None:
        Shown.seen = [(total, title, start, enabled)]

    def update(self, done: int, *, loss: float, skipped: int) -> None:
        self.seen.append((done, loss))

    def finish(self) -> None:
        self.seen.append("finished")


def make(folder: Path, stop: StopFlag | None = None, steps: int = STEPS, **changes: Any) -> tuple[Trainer, Any, Task, Numbered]:
    given = {"log_every": 2, "eval_every": 3, "save_every": 4, "accumulation": 2, "keep": 9} | changes
    section = FitSection(steps=steps, **given)
    engine: Any = Noted()
    task, loader = Task(), Numbered()
    plateau = Plateau(1, 1, 0.0, 1, 0, at=(5,))
    fit = Trainer(
        "toy", task, engine, loader, section, RunFolder(str(folder)), World.single(), StopFlag() if stop is None else stop, torch.device("cpu")
    )
    fit.plateau, fit.flops_per_unit, fit.peak_flops = plateau, 3.0, 1000.0
    return fit, engine, task, loader


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> type[Shown]:
    monkeypatch.setattr(watching, "Progress", Shown)
    return Shown


def points(folder: Path, name: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in read_metrics(str(folder), "toy")[name]]


def test_an_update_announces_each_micro_batch_and_steps_once_with_what_was_measured(tmp_path: Path) -> None:
    fit, engine, task, _ = make(tmp_path)
    fit.run_to_end()
    rates = [0.1 * (step + 1) * (0.5 if step >= 5 else 1.0) for step in range(STEPS)]
    each = [[False, (9.0 - step) / 2, True, (9.0 - step) / 2, "measure", ("step", rates[step], [1.0, 2.0])] for step in range(STEPS)]
    assert engine.notes == [note for notes in each for note in notes]
    assert task.asked == [(step, float(step), 2.0) for step in range(STEPS) for _ in range(2)]


def test_what_is_logged_when_and_what_it_says(tmp_path: Path, shown: type[Shown]) -> None:
    fit, _, task, _ = make(tmp_path)
    outcome = fit.run_to_end()
    assert points(tmp_path, "train/loss") == [(2, 8.0), (4, 6.0), (6, 4.0), (7, 3.0)]
    assert points(tmp_path, "train/other") == [(step, 2.0) for step in (2, 4, 6, 7)]
    assert task.evaluated == [3, 6, 7] and points(tmp_path, "eval/quality") == [(3, 3.0), (6, 6.0), (7, 7.0)]
    assert outcome.evaluation == {"quality": 7.0}
    assert points(tmp_path, "optim/lr") == [(2, 0.2), (4, 0.4), (6, pytest.approx(0.3)), (7, pytest.approx(0.35))]
    assert points(tmp_path, "sched/temperature") == [(2, 1.0), (4, 3.0), (6, 5.0), (7, 6.0)]
    assert points(tmp_path, "sched/halvings") == [(2, 0.0), (4, 0.0), (6, 1.0), (7, 1.0)]
    assert points(tmp_path, "optim/loss_scale") == [(2, 4.0), (4, 2.0), (6, 2.0), (7, 2.0)]
    assert points(tmp_path, "optim/skipped_updates")[1] == (4, 1.0) and points(tmp_path, "optim/grad_norm")[0] == (2, 0.5)
    assert points(tmp_path, "numerics/zero_share/000") == [(4, 0.25)]
    names = [float(sum(id_hash(f"id-{number}") & 0xFFFFFFFF for number in (2 * step - 1, 2 * step))) for step in (2, 4, 6, 7)]
    assert [value for _, value in points(tmp_path, "data/samples")] == names
    waits = points(tmp_path, "data/wait_s")
    assert len(waits) == 4 and all(0 <= value < 60 for _, value in waits)
    assert checkpoint.complete(str(tmp_path / "toy")) == [4, 7]
    assert shown.seen == [(STEPS, "toy", 0, True), *((step, 10.0 - step) for step in range(1, STEPS + 1)), "finished"]


def test_the_writer_is_closed_once_at_the_end_and_waits_for_saves_are_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []
    close = MetricsWriter.close

    def closing(writer: MetricsWriter) -> None:
        closed.append(True)
        close(writer)

    monkeypatch.setattr(MetricsWriter, "close", closing)
    fit, *_ = make(tmp_path)
    fit.run_to_end()
    stalls = points(tmp_path, "perf/save_stall_s")
    assert closed == [True] and stalls and all(0 < value < 60 for _, value in stalls)


def test_rates_are_units_of_all_micro_batches_over_the_seconds_of_updates(tmp_path: Path) -> None:
    fit, *_ = make(tmp_path, log_every=1)
    fit.world = World(0, 2, 0, 2)  # whose other rank has as many units
    outcome = fit.run_to_end()
    seconds = [200 / value for _, value in points(tmp_path, "perf/tokens_per_s")]
    assert len(seconds) == STEPS and outcome.units_per_s == pytest.approx(200 * STEPS / sum(seconds))
    shares = [value for _, value in points(tmp_path, "perf/mfu")]
    assert shares == pytest.approx([3.0 * 200 / each / (1000.0 * 2) for each in seconds])
    assert sum(seconds) < outcome.seconds < sum(seconds) + 60
    parts = {name: points(tmp_path, f"goodput/{name}_s") for name in NAMES}
    assert all(len(part) == 1 and part[0][0] == STEPS and part[0][1] >= 0 for part in parts.values())
    assert parts["step"][0][1] + parts["data"][0][1] <= sum(seconds) + 1e-6 and parts["step"][0][1] > 0 and parts["lost"] == [(STEPS, 0.0)]


def test_a_stop_saves_says_so_and_a_restart_goes_on_with_everything_that_was_kept(tmp_path: Path, shown: type[Shown]) -> None:
    stop = StopFlag()
    fit, _engine, task, loader = make(tmp_path, stop)
    plain = task.loss

    def stopping(engine: Any, batch: Any, step: int, *rest: Any) -> Loss:
        if step == 5:
            stop.handle(STOP_SIGNALS[0], None)
        return plain(engine, batch, step, *rest)

    task.loss = stopping  # type: ignore[assignment, method-assign]
    with pytest.raises(StopRequested, match="toy: stopped by a signal after update 6 of 7; saved"):
        fit.run_to_end()
    assert checkpoint.complete(str(tmp_path / "toy")) == [4, 6] and loader.drawn == 12
    assert [step for step, _ in points(tmp_path, "goodput/step_s")] == [6], "a stopped attempt says where its time went"
    assert checkpoint.read_meta(checkpoint.folder(str(tmp_path / "toy"), 6))["bad_updates"] == {"forward_non_finite": 0, "gradient_overflow": 0}
    again, other, second, resumed = make(tmp_path)
    outcome = again.run_to_end()
    assert second.asked == [(6, 6.0, 2.0)] * 2 and resumed.drawn == 14 and other.updates == 7 and other.inner == 70
    assert other.notes[-1] == ("step", pytest.approx(0.35), [1.0, 2.0]), "the halving is remembered"
    assert other.scale.state() == {"value": 2.0, "good": 4, "skipped": 1}
    assert shown.seen[0] == (STEPS, "toy", 6, True) and outcome.seconds > again._elapsed > 0
    assert sorted(path.name for path in (tmp_path / "toy/metrics").iterdir()) == ["attempt-0.jsonl", "attempt-1.jsonl"]
    assert points(tmp_path, "train/loss")[-2:] == [(6, 4.0), (7, 3.0)]


def test_a_stop_at_the_last_update_leaves_the_end_to_the_next_start(tmp_path: Path) -> None:
    stop = StopFlag()
    fit, _, first, _ = make(tmp_path, stop, steps=1)
    plain = first.loss

    def stopping(*arguments: Any) -> Loss:
        stop.handle(STOP_SIGNALS[0], None)
        return plain(*arguments)

    first.loss = stopping  # type: ignore[assignment, method-assign]
    with pytest.raises(StopRequested, match="during the end, after the last checkpoint; nothing was lost"):
        fit.run_to_end()
    assert checkpoint.complete(str(tmp_path / "toy")) == [1]
    third, _, task, _ = make(tmp_path, steps=1)
    assert third.run_to_end().evaluation == {"quality": 1.0} and third.run_to_end().units_per_s == 0.0 and task.evaluated == [1, 1]


def test_each_update_beats_the_watchdog_with_patience_for_what_follows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beats: list[Any] = []
    monkeypatch.setattr(watchdog, "beat", lambda *patience: beats.append(patience))
    monkeypatch.setattr(watchdog, "rest", lambda: beats.append("rest"))
    fit, *_ = make(tmp_path, steps=2)
    fit.run_to_end()
    patient = beats[2]
    assert beats == [beats[0], "rest", patient, (), patient, (), "rest", "rest"] and beats[0][0] > patient[0] > 1
