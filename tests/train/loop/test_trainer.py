"""The training loop's judgement of bad updates, and saving beside training."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from infra.errors import CheckpointError, DivergedError
from infra.run_folder import RunFolder
from infra.signals import StopFlag
from infra.world import World
from tests.support.patience import PATIENCE_S
from train.advice.rules import keys
from train.config import ClipFit, DalleFit, FitSection
from train.engines.protocol import Update
from train.loop.diverged import diverged
from train.loop.metrics import read_metrics
from train.loop.plateau import Plateau
from train.loop.trainer import Loss, Trainer
from train.optimizer.averaging import Average
from train.ranks import watchdog
from train.weights import checkpoint
from train.weights.checkpointer import Checkpointer
from train.weights.fragments import Fragment, even_slice

APPLIED, OVERFLOW, BROKEN = Update(True, 1.0), Update(False, float("inf"), True), Update(False, float("inf"), False)
SAT_OUT = Update(True, 1.0, True)


class Scripted:
    """An engine whose updates end as written down."""

    loss_scale = None

    def __init__(self, fates: list[Update]) -> None:
        self.module, self.fates, self.updates = torch.nn.Linear(2, 2), list(fates), 0
        self.average = Average(self.module.named_parameters(), 0.5)

    def micro_batch(self, *, last: bool) -> None: ...

    def backward(self, loss: torch.Tensor) -> None: ...

    def step(self, lr: float) -> Update:
        update = self.fates.pop(0)
        self.updates += update.applied
        self.module.weight.data.fill_(float(self.updates))
        return update

    def fragments(self, *, to_load: bool) -> dict[str, Fragment]:
        return {f"model/{name}": even_slice(p.detach(), 0, 1) for name, p in self.module.named_parameters()}

    def loaded(self, updates: int) -> None:
        self.updates = updates


class Counting:
    """A task without data."""

    metrics: tuple[str, ...] = ("loss",)
    unit = "samples"
    curve: Any = None

    def __init__(self, losses: list[float]) -> None:
        self.losses = losses

    def schedule(self, step: int) -> dict[str, float]:
        return {"lr": 1.0}

    def denominators(self, batches: list[Any]) -> dict[str, float]:
        return {}

    def loss(self, engine: Any, batch: Any, step: int, at: Any, denominators: Any) -> Loss:
        loss = torch.tensor(self.losses[step % len(self.losses)])
        return Loss(loss, {"loss": loss})

    def evaluate(self, *_: Any) -> dict[str, float]:
        return {}

    def units(self, batch: Any) -> int:
        return 1


class Nothing:
    def next(self) -> dict[str, Any]:
        return {"ids": []}

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None: ...


def fit_of(folder: Path, fates: list[Update], losses: list[float], **changes: Any) -> Trainer:
    section = FitSection(steps=len(fates), save_every=2, eval_every=100, log_every=1, max_bad_steps=2, max_overflow_steps=4, **changes)
    engine: Any = Scripted(fates)
    return Trainer("toy", Counting(losses), engine, Nothing(), section, RunFolder(str(folder)), World.single(), StopFlag(), torch.device("cpu"))


def test_overflows_and_broken_numbers_are_counted_apart_and_recovered_from(tmp_path: Path) -> None:
    fates = [APPLIED, OVERFLOW, OVERFLOW, OVERFLOW, APPLIED, BROKEN, APPLIED, OVERFLOW, APPLIED, APPLIED]
    fit_of(tmp_path, fates, [1.0, 1.0, 1.0, 1.0, 1.0, float("nan"), 1.0, 1.0, 1.0, 1.0]).run_to_end()
    series = read_metrics(str(tmp_path), "toy")
    assert series["numerics/gradient_overflow"][-1].value == 4 and series["numerics/forward_non_finite"][-1].value == 1
    assert [point.step for point in series["perf/save_stall_s"]] == [5, 7, 9, 10], "none while updates are bad, but at the first good one"
    assert checkpoint.complete(str(tmp_path / "toy")) == [9, 10]


def test_a_run_that_diverged_is_told_what_helps_before_what_bears_it() -> None:
    section = ClipFit(warmup_steps=30)
    said = [str(diverged("clip", section, "runs/x", 40, saved, 3, 0)) for saved in (0, 20, 31)]
    helps = ["clip_fit.lr", "clip_fit.warmup_steps", "clip_fit.max_bad_steps"]
    assert [keys(each) for each in said] == [helps, helps, [helps[0], helps[2]]], "a warm-up that is over helps no more"
    assert "; there is no checkpoint yet. Begin again with a smaller clip_fit.lr or a longer clip_fit.warmup_steps, or, " in said[0]
    assert "; the checkpoint of update 31 is kept. Go on from there with a smaller clip_fit.lr, or, " in said[2]
    assert all(each.endswith(". With half the step size: launcher.py clip runs/x clip_fit.lr=0.00025 --go-on") for each in said)
    of_align = str(diverged("align", DalleFit(), "runs/x", 40, 0, 0, 500))
    assert keys(of_align) == ["align_fit.lr", "align_fit.warmup_steps", "dalle_fit.max_overflow_steps"]


def test_a_checkpoint_that_is_named_is_there(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="there is no checkpoint yet"):
        fit_of(tmp_path / "none", [BROKEN] * 8, [1.0]).run_to_end()
    with pytest.raises(DivergedError, match="the checkpoint of update 2 is kept"):
        fit_of(tmp_path / "two", [APPLIED, APPLIED, *[BROKEN] * 8], [1.0]).run_to_end()
    assert checkpoint.complete(str(tmp_path / "two" / "toy")) == [2]
    with pytest.raises(DivergedError, match="the checkpoint of update 2 is kept"):  # and by what resumed from it
        fit_of(tmp_path / "two", [BROKEN] * 10, [1.0]).run_to_end()


@pytest.mark.parametrize(
    ("fates", "losses", "message"),
    [
        ([APPLIED, APPLIED] + [OVERFLOW] * 8, [1.0], r"4 consecutive updates up to update 5 had overflows .* larger toy_fit\.max_overflow_steps"),
        ([APPLIED, APPLIED] + [BROKEN] * 8, [1.0], r"2 consecutive updates up to update 3 had non-finite .* larger toy_fit\.max_bad_steps"),
        (
            [APPLIED, APPLIED] + [BROKEN, OVERFLOW] * 4,
            [1.0],
            r"3 consecutive updates up to update 4 had non-finite .* \(2\) or overflows .* \(1\); .* larger toy_fit\.max_bad_steps",
        ),
        ([APPLIED, APPLIED] + [SAT_OUT] * 8, [1.0], r"4 consecutive updates up to update 5 had overflows"),
        (
            [APPLIED, APPLIED, OVERFLOW, OVERFLOW, OVERFLOW, BROKEN] + [OVERFLOW] * 4,
            [1.0],
            r"5 consecutive updates up to update 6 had non-finite .* \(1\) or overflows .* \(4\); .*max_overflow_steps",
        ),
        ([APPLIED] * 8, [1.0, 1.0, float("inf"), float("inf")], r"2 consecutive updates up to update 3 had non-finite"),
    ],
)
def test_a_streak_of_bad_updates_ends_the_run_and_keeps_the_last_good_checkpoint(
    tmp_path: Path, fates: list[Update], losses: list[float], message: str
) -> None:
    with pytest.raises(DivergedError, match=message):
        fit_of(tmp_path, fates, losses).run_to_end()
    assert checkpoint.complete(str(tmp_path / "toy")) == [2]


@pytest.mark.parametrize(("fate", "message"), [(OVERFLOW, "4 consecutive updates up to update 3"), (BROKEN, "2 consecutive updates up to update 1")])
def test_a_streak_from_the_first_update_on_is_as_long_as_any_other(tmp_path: Path, fate: Update, message: str) -> None:
    with pytest.raises(DivergedError, match=message):
        fit_of(tmp_path, [fate] * 8, [1.0]).run_to_end()


def test_a_restore_is_watched_and_what_is_compiled_after_it_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    for name in ("beat", "rest"):
        monkeypatch.setattr(watchdog, name, lambda *_, name=name: seen.append(name))
    monkeypatch.setattr(checkpoint, "load_newest", lambda *_: seen.append("load"))
    fit_of(tmp_path, [APPLIED] * 2, [1.0]).run_to_end()
    assert seen[:4] == ["beat", "load", "rest", "beat"]


def test_a_checkpoint_holds_the_weights_of_its_update_however_late_they_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit = fit_of(tmp_path, [APPLIED] * 6, [1.0], keep=3)
    events, settle = list[str](), Checkpointer.settle

    def late() -> None:
        time.sleep(0.2)
        events.append("copied")

    def settled(saver: Checkpointer) -> float:
        if seconds := settle(saver):  # there was something to wait for
            events.append("settled")
        return seconds

    fit.engine.average.wait = late  # type: ignore[method-assign]
    monkeypatch.setattr(Checkpointer, "settle", settled)
    fit.run_to_end()
    for step in (2, 4, 6):
        weights = checkpoint.read_tensors(checkpoint.folder(str(tmp_path / "toy"), step), "model")
        assert weights["weight"].flatten().tolist() == [float(step)] * 4
    stalls = read_metrics(str(tmp_path), "toy")["perf/save_stall_s"]
    assert [point.step for point in stalls] == [2, 4, 6] and min(point.value for point in stalls) > 0
    assert events == ["copied", "settled"] * 3


class Measured(Scripted):
    """The same with a measure before each step, as ZeRO's engine has one."""

    def measure(self) -> torch.Tensor:
        return torch.zeros(1, dtype=torch.float64)

    def step(self, lr: float, measured: Any = None) -> Update:
        assert measured == [0.0]
        return super().step(lr)

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None: ...

    def averaged(self) -> Any: ...


def test_an_engine_that_measures_waits_for_the_copy_before_its_step_too(tmp_path: Path) -> None:
    fit = fit_of(tmp_path, [APPLIED] * 4, [1.0], keep=2)
    fit.engine = engine = Measured([APPLIED] * 4)  # type: ignore[assignment]
    engine.average.wait = lambda: time.sleep(0.2)  # type: ignore[method-assign]
    fit.run_to_end()
    for step in (2, 4):
        weights = checkpoint.read_tensors(checkpoint.folder(str(tmp_path / "toy"), step), "model")
        assert weights["weight"].flatten().tolist() == [float(step)] * 4, "a checkpoint of one update, not of two"


def fragments_of(value: float) -> dict[str, Fragment]:
    return {"model/w": even_slice(torch.full((4,), float(value)), 0, 1)}


def test_saving_goes_on_beside_training_and_keeps_what_was_there_when_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, plain = threading.Event(), checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *args, **named: (gate.wait(PATIENCE_S), plain(*args, **named)))
    saver, live, plateau = Checkpointer(str(tmp_path), World.single(), keep=2), fragments_of(1.0), Plateau(2, 1, 0.5, 5, 0, at=(3,))
    began = time.perf_counter()
    saver.save(1, live, {"shapes": {"w": [4]}, "plateau": plateau.state()})
    assert time.perf_counter() - began < 5 and checkpoint.complete(str(tmp_path)) == []
    assert saver.settle() < 5 and saver.settle() == 0.0
    live["model/w"].tensor.fill_(2.0)  # training goes on
    assert plateau.observe(3, 1.0)
    gate.set()
    saver.wait()
    assert checkpoint.read_meta(checkpoint.folder(str(tmp_path), 1))["plateau"]["halved"] == []
    assert checkpoint.read_tensors(checkpoint.folder(str(tmp_path), 1), "model")["w"].tolist() == [1.0] * 4


def test_tensors_are_copied_when_they_are_ready_and_settling_waits_for_it(tmp_path: Path) -> None:
    saver, live, ready = Checkpointer(str(tmp_path), World.single(), keep=2), fragments_of(1.0), threading.Event()

    def finish() -> None:
        ready.wait(PATIENCE_S)
        live["model/w"].tensor.fill_(3.0)  # an average that is still being mixed

    began = time.perf_counter()
    assert saver.save(1, live, {"shapes": {"w": [4]}}, ready=finish) <= time.perf_counter() - began < 5
    threading.Timer(1.0, ready.set).start()
    assert saver.settle() > 0.1
    live["model/w"].tensor.fill_(4.0)
    saver.wait()
    assert checkpoint.read_tensors(checkpoint.folder(str(tmp_path), 1), "model")["w"].tolist() == [3.0] * 4


def test_what_fails_before_the_copy_is_heard_of_before_the_tensors_change(tmp_path: Path) -> None:
    saver = Checkpointer(str(tmp_path), World.single(), keep=2)
    saver.save(1, fragments_of(1.0), {}, ready=lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    with pytest.raises(ZeroDivisionError):
        saver.settle()
    with pytest.raises(ZeroDivisionError):
        saver.wait()
    assert checkpoint.complete(str(tmp_path)) == []


def test_a_failed_save_is_heard_of_at_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise CheckpointError("the disk is full")

    saver = Checkpointer(str(tmp_path), World.single(), keep=2)
    monkeypatch.setattr(checkpoint, "save", fail)
    saver.save(1, fragments_of(1.0), {})
    with pytest.raises(CheckpointError, match="the disk is full"):
        saver.save(2, fragments_of(1.0), {})
    saver.wait()


def test_permanent_checkpoints_outlive_the_newest(tmp_path: Path) -> None:
    saver = Checkpointer(str(tmp_path), World.single(), keep=1, keep_every=4)
    for step in range(1, 11):
        saver.save(step, fragments_of(step), {"shapes": {"w": [4]}})
    saver.wait()
    assert checkpoint.complete(str(tmp_path)) == [4, 8, 10]


@pytest.mark.parametrize(
    ("steps", "step", "keep", "keep_every", "gone"),
    [
        ([1, 2, 3], 3, 2, 0, [1]),
        ([1, 2, 3], 3, 1, 2, [1]),
        ([10, 13, 15, 20], 20, 1, 10, [13, 15]),
        ([9, 11, 12], 12, 1, 10, [9]),  # the save at 10 came late
        ([5], 5, 2, 0, []),
        ([10, 11, 12], 11, 1, 10, [12]),  # the run fell back from 12, which cannot be read: what was just written stays
        ([10, 15, 20, 30], 15, 2, 0, [20, 30]),
        ([10, 20], 15, 1, 10, [20]),
    ],
)
def test_which_checkpoints_go(steps: list[int], step: int, keep: int, keep_every: int, gone: list[int]) -> None:
    assert checkpoint.superseded(steps, step, keep, keep_every) == gone


def test_a_save_after_a_fallback_is_what_the_next_start_finds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (4, 6):
        checkpoint.save(str(tmp_path), step, fragments_of(step), {"shapes": {"w": [4]}}, World.single(), keep=1, keep_every=4)
    Path(checkpoint.folder(str(tmp_path), 6), "meta.json").write_text("{")
    checkpoint.save(str(tmp_path), 5, fragments_of(5.0), {"shapes": {"w": [4]}}, World.single(), keep=1, keep_every=4)
    meta = checkpoint.load_newest(str(tmp_path), fragments_of(0.0), World.single())
    assert meta is not None and meta["step"] == 5 and checkpoint.complete(str(tmp_path)) == [4, 5]
    assert "step-00000006: dropped: it could not be read" in caplog.text


class Judged(Counting):
    def evaluate(self, *_: Any) -> dict[str, float]:
        return {"loss": 0.5}


def test_a_kill_between_the_last_checkpoint_and_the_end_costs_no_curve(tmp_path: Path) -> None:
    first, again = (fit_of(tmp_path, [APPLIED] * 4, [1.0]) for _ in range(2))
    first.task, again.task = Judged([1.0]), Judged([1.0])
    first.run_to_end()
    before = read_metrics(str(tmp_path), "toy")
    again.run_to_end()
    after = read_metrics(str(tmp_path), "toy")
    for name in ("train/loss", "eval/loss", "perf/save_stall_s", "goodput/step_s"):
        assert [(p.step, p.value) for p in before[name]][:-1] == [(p.step, p.value) for p in after[name]][:-1] and after[name][-1].step == 4, name
    shutil.rmtree(tmp_path / "toy" / "metrics")  # as if they had not reached the storage
    once_more = fit_of(tmp_path, [APPLIED] * 4, [1.0])
    once_more.task = Judged([1.0])
    once_more.run_to_end()
    assert [(p.step, p.value) for p in read_metrics(str(tmp_path), "toy")["eval/loss"]] == [(4, 0.5)]


def resumed(tmp_path: Path, before: dict[str, str], now: dict[str, str]) -> Trainer:
    fit = fit_of(tmp_path, [APPLIED] * 4, [1.0])
    fit.meta = {"parents": before}
    fit.run_to_end()
    again = fit_of(tmp_path, [APPLIED] * 4, [1.0])
    again.meta = {"parents": now}
    again.run_to_end()
    return again


def test_a_checkpoint_goes_on_with_its_own_inputs_alone(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"other inputs than are there now.*\n  tokenizer: a -> b\n"):
        resumed(tmp_path / "swapped", {"codes": "c", "tokenizer": "a"}, {"codes": "c", "tokenizer": "b"})
    with pytest.raises(CheckpointError, match=r"  dvae: d -> none"):
        resumed(tmp_path / "lost", {"codes": "c", "dvae": "d"}, {"codes": "c"})
    again = resumed(tmp_path / "started", {"codes": "c", "init_from": "w"}, {"codes": "c"})
    assert again.meta["parents"] == {"codes": "c", "init_from": "w"}


def test_a_damaged_description_falls_back_loudly(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saver = Checkpointer(str(tmp_path), World.single(), keep=3)
    for step in (1, 2):
        saver.save(step, fragments_of(step), {"shapes": {"w": [4]}})
    saver.wait()
    Path(checkpoint.folder(str(tmp_path), 2), "meta.json").write_text("{")
    target = fragments_of(0.0)
    meta = checkpoint.load_newest(str(tmp_path), target, World.single())
    assert meta is not None and meta["step"] == 1 and target["model/w"].tensor.tolist() == [1.0] * 4
    assert "CHECKPOINT NOT USABLE" in caplog.text and "falling back to the checkpoint before it" in caplog.text
