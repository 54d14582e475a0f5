"""Pictures that are drawn while the transformer trains: they cost no bit of a loss, step aside, are drawn once, and stand in TensorBoard and the report. About 25 s."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from infra import storage
from infra.errors import DataError
from infra.run_folder import RunFolder
from infra.signals import StopFlag
from infra.world import World
from tests.support import drawable_run
from tests.support.patience import PATIENCE_S
from tests.support.stopped_run import FIXTURE, STEPS, losses, run_stage
from tests.train.loop.test_trainer import APPLIED, Counting, Nothing, Scripted
from train.config import load_run
from train.config_watching import SamplesSection
from train.drawing import while_training
from train.drawing.while_training import Samples, left_over
from train.loop.trainer import Trainer
from train.planning import samples as planned
from train.planning.states import count
from train.report.section_pictures import section
from train.report.view import RunView
from train.verbs import plan, sample

CAPTIONS = ("a red square", "a blue square")
_IDLE = 5
"""SCHED_IDLE in /proc/<pid>/stat."""


def _events(run: RunFolder, stage: str) -> EventAccumulator:
    found = EventAccumulator(run.at("tensorboard", stage), size_guidance={"histograms": 0, "images": 0})
    found.Reload()
    return found


def test_a_stage_that_draws_and_counts_exponents_has_the_same_losses_and_shows_both(tmp_path: Path) -> None:
    shutil.copytree(FIXTURE / "run", tmp_path / "run")
    run = RunFolder(str(tmp_path / "run"))
    words = ["samples.every=2", f"samples.captions={list(CAPTIONS)}".replace("'", '"'), "dalle_fit.histograms_every=3"]
    run_stage("dalle", [run.url, *words, "dalle_fit.save_every=4", "samples.where=evaluation"])
    known = {int(step): value for step, value in storage.read_json(str(FIXTURE / "losses.json"))["dalle"].items()}
    assert {step: value for step, value in losses(run.url, "dalle").items() if step > 4} == {s: v for s, v in known.items() if s > 4}
    drawn = RunView(run.url).samples
    assert [entry["step"] for entry in drawn] == [STEPS] and [picture["caption"] for picture in drawn[-1]["pictures"]] == list(CAPTIONS)
    images = _events(run, "samples")
    assert [event.step for event in images.Images(f"samples/{CAPTIONS[1]}")] == [entry["step"] for entry in drawn]
    body = section(RunView(run.url)).body  # type: ignore[union-attr]
    assert "While it trained" in body and f"{STEPS} updates</th>" in body and body.count("<img") == 2 * len(drawn)
    counted = _events(run, "dalle")
    names = [f"8 numerics/gradient_exponents/{name}" for name in ("000-attention", "001-mlp", "002-attention", "003-mlp", "outside")]
    assert sorted(tag for tag in counted.Tags()["histograms"]) == names
    assert [event.step for event in counted.Histograms(names[0])] == [6], "updates 6 of 5 to 8"
    total = sum(parameter.numel() for name, parameter in _model(run).named_parameters())
    values = [counted.Histograms(name)[0].histogram_value for name in names]
    assert 0.5 * total < sum(value.num for value in values) <= total, "all gradients but exact zeros, once"
    written = {path: path.stat().st_mtime_ns for path in Path(run.at("dalle", "samples")).rglob("*.png")}
    sample.main(run.url, STEPS, StopFlag())
    assert {path: path.stat().st_mtime_ns for path in Path(run.at("dalle", "samples")).rglob("*.png")} == written, "drawn once"


def _model(run: RunFolder) -> torch.nn.Module:
    cfg = load_run(run.url, [])
    return drawable_run.transformer(cfg)


def test_a_drawing_beside_training_has_the_lowest_priority_and_its_failure_is_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = ("samples.every=5", "samples.where=beside", f"samples.captions={list(CAPTIONS)}".replace("'", '"'))
    run = drawable_run.make(str(tmp_path / "run"), *words, live=True)
    cfg = load_run(run.url, [])
    made = Samples(cfg, run, World.single(), StopFlag(), gpu=False, threads=1)
    made.look(4, at_evaluation=True)
    made.look(0, at_evaluation=True)
    assert made._process is not None, "the first complete checkpoint is drawn, whatever its update"
    process: Any = made._process
    _until(lambda: _policy(process.pid) == _IDLE)
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(process.pid, os.SCHED_OTHER, os.sched_param(0))  # seen; beside other tests it would wait for ever

    def ended() -> bool:
        made.look(0, at_evaluation=False)
        return made._process is None

    with caplog.at_level(logging.WARNING):
        _until(ended)
    assert "samples: the drawing ended with code 65: data error:" in caplog.text and "step-00000004" in caplog.text
    made.look(5, at_evaluation=False)
    process = made._process
    made.look(10, at_evaluation=False)
    assert process is not None and made._process is process, "one at a time"
    made.close()
    assert process.returncode == -9 and made._process is None


def _until(true: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def _policy(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[38])


def _scripted(monkeypatch: pytest.MonkeyPatch, **changed: Any) -> tuple[Samples, list[int]]:
    """One whose drawings are only noted, and end at once."""
    begun: list[int] = []
    cfg = load_run("tiny", [f"samples.{key}={value}" for key, value in changed.items()])
    made = Samples(cfg, RunFolder("/nowhere"), World.single(), StopFlag(), gpu=False, threads=1)
    monkeypatch.setattr(made, "_start", begun.append)
    monkeypatch.setattr(made, "_wait", lambda seconds: None)
    return made, begun


def test_what_is_drawn_when(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    made, begun = _scripted(monkeypatch, every=100, where="beside")
    for saved in (0, 50, 80, 100, 120, 199, 350, 399, 401):
        made.look(saved, at_evaluation=False)
    assert begun == [50, 100, 350, 401]
    made, begun = _scripted(monkeypatch, every=100, where="evaluation")
    for saved in (100, 200):
        for at_evaluation in (False, True, True):
            made.look(saved, at_evaluation=at_evaluation)
    assert begun == [100, 200]
    made, begun = _scripted(monkeypatch, every=100, where="evaluation", memory_gb=0.5)
    made.look(100, at_evaluation=True)
    assert not begun and "no pictures are drawn while training: that takes 1.1 GB, and samples.memory_gb = 0.5" in caplog.text


def test_beside_training_by_itself_only_where_four_cores_are_left_over(monkeypatch: pytest.MonkeyPatch) -> None:
    assert left_over(112, 8, 14, 4, gpu=True) == 112 - 8 * 7 and left_over(2, 2, 1, 0, gpu=False) == 0 and left_over(1, 2, 1, 0, gpu=False) == 0
    for cores, beside in ((8, True), (7, True), (5, True), (4, False), (2, False)):
        monkeypatch.setattr(while_training.os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)))
        made, _ = _scripted(monkeypatch, every=1)
        assert made.beside is beside and made._threads == (cores - 1 if beside else 1)


def test_a_drawing_at_an_evaluation_is_given_up_before_other_ranks_lose_patience(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(while_training.watchdog, "LIMIT_S", 1.0)
    run = drawable_run.make(str(tmp_path / "run"), live=True)
    made = Samples(load_run(run.url, ["samples.every=1", "samples.where=evaluation"]), run, World.single(), StopFlag(), gpu=False, threads=1)
    made.look(5, at_evaluation=True)
    assert (
        made._process is None and "samples: given up after 0 s, because other ranks wait; samples.where = 'beside' lets training go on" in caplog.text
    )


def test_the_loop_shows_each_update_and_closes_whatever_happens(tmp_path: Path) -> None:
    seen: list[tuple[bool, str]] = []

    class Notes:
        def look(self, saved: int, *, at_evaluation: bool) -> None:
            seen.append((at_evaluation, "look"))
            if len(seen) == 5:
                raise DataError("planted")

        def close(self) -> None:
            seen.append((False, "close"))

    cfg, engine = load_run("tiny", ["clip_fit.steps=9", "clip_fit.eval_every=2", "clip_fit.save_every=100"]), Scripted([APPLIED] * 9)
    run, device = RunFolder(str(tmp_path)), torch.device("cpu")
    fit = Trainer("toy", Counting([1.0]), engine, Nothing(), cfg.clip_fit, run, World.single(), StopFlag(), device, onlooker=Notes())  # type: ignore[arg-type]
    with pytest.raises(DataError, match="planted"):
        fit.run_to_end()
    assert seen == [(step % 2 == 0, "look") for step in range(1, 6)] + [(False, "close")]


def test_a_gpu_that_trains_draws_at_evaluations_and_the_plan_counts_what_that_takes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        ValidationError, match="device = 'cuda' with where = 'auto': a GPU that trains draws at evaluations; set where = 'evaluation'"
    ):
        SamplesSection(device="cuda")
    words = ["samples.every=1000", 'samples.captions=["a","b"]']
    cfg = load_run("1.2B", words)
    weights = 8 * count(cfg.dalle, cfg.stream_shape()).total
    assert weights < planned.memory(cfg) < 1.3 * weights, "read in fp32, and laid out for drawing"
    on_gpu = load_run("1.2B", [*words, "samples.device=cuda", "samples.where=evaluation"])
    assert planned.memory(cfg) - planned.memory(on_gpu) > 2 * 1.2e9, "laid out in bf16 there"
    options: Any = {"nodes": 4, "gpus": 8, "memory": 0.0, "gpu": "H100-80GB", "tokens": 0.0, "rank": 0}
    plan.main("1.2B", ["samples.every=1000", "samples.memory_gb=1"], **options)
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("samples "))
    assert "4 pictures every 1,000 updates, beside training where four cores are left over" in said and "nothing is drawn" in said
    plan.main("1.2B", [], **options)
    assert "\nsamples " not in capsys.readouterr().out, "off"


def test_a_run_from_before_the_section_draws_nothing(tmp_path: Path) -> None:
    shutil.copytree(FIXTURE / "run", tmp_path / "run")
    assert "samples" not in storage.read_json(str(tmp_path / "run" / "config.json"))
    assert load_run(str(tmp_path / "run"), []).samples.every == 0 and load_run(str(tmp_path / "run"), []).dalle_fit.histograms_every == 0


def test_a_checkpoint_that_is_not_there_is_named(tmp_path: Path) -> None:
    run = drawable_run.make(str(tmp_path / "run"), 'samples.captions=["a"]', live=True)
    with pytest.raises(DataError, match="step-00000007"):
        sample.main(run.url, 7, StopFlag())
