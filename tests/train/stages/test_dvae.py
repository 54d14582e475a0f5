"""Training of the dVAE: loss scaling, restarts in half precision, bad numbers, damaged checkpoints, and what is logged on the way."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from infra import storage
from infra.errors import ExitCode
from infra.signals import StopFlag
from infra.world import World
from tests.support.ranks import run_in_ranks
from tests.system.test_training import StopAfter, fingerprint, losses, train_in_ranks
from train import launch
from train.config import DvaeFit, RunConfig
from train.engines.replicated import ReplicatedEngine
from train.evaluation.codes import CodeWindow, code_statistics
from train.evaluation.collapse import collapse_warning
from train.loop.metrics import read_metrics
from train.optimizer.loss_scale import LossScale
from train.report.page import build
from train.stages import dvae as dvae_stage
from train.stages.dvae_task import DvaeTask

BASE = ["dvae_fit.steps=10", "dvae_fit.precision=fp32"]


def run_dvae(root: Path, *overrides: str, stop: StopFlag | None = None) -> None:
    words = [f"run.root={root}", *BASE, *overrides]
    launch.stage("dvae", "tiny", words, on="local", nproc=1, dry_run=False, worker=False, stop=StopFlag() if stop is None else stop)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    launch.stage("prepare", "tiny", [f"run.root={root}", *BASE], on="local", nproc=1, dry_run=False, worker=False, stop=StopFlag())
    return root


@pytest.fixture
def place(images: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Makes roots with prepared images in them, and no configuration yet."""

    def make(name: str) -> Path:
        shutil.copytree(images / "tiny", tmp_path / name / "tiny", ignore=shutil.ignore_patterns("config.json"))
        return tmp_path / name

    return make


# --- Schedules ----------------------------------------------------------------------------------------------------------------------------


def schedule(step: int, **changes: Any) -> dict[str, float]:
    task = object.__new__(DvaeTask)  # schedules need the configuration alone
    task.cfg = RunConfig(dvae_fit=DvaeFit(**changes))
    return task.schedule(step)


@pytest.mark.parametrize(
    ("name", "points"),
    [
        ("beta", {0: 0, 1_250: 0.967, 2_500: 3.300, 3_750: 5.633, 5_000: 6.6, 3_000_000: 6.6}),
        ("tau", {0: 1, 37_500: 0.8627, 75_000: 0.53125, 112_500: 0.1998, 150_000: 1 / 16, 3_000_000: 1 / 16}),
        ("lr", {0: 1e-4, 300_000: 8.554e-5, 600_000: 5.0625e-5, 900_000: 1.571e-5, 1_200_000: 1.25e-6, 3_000_000: 1.25e-6}),
    ],
)
def test_schedules_pass_through_the_papers_values(name: str, points: dict[int, float]) -> None:
    for step, expected in points.items():
        assert schedule(step)[name] == pytest.approx(expected, rel=6e-4), step


def test_a_linear_temperature_falls_in_a_straight_line_and_stays() -> None:
    values = [schedule(step, tau_schedule="linear", tau_steps=4)["tau"] for step in range(6)]
    assert values == pytest.approx([1, 1 - 15 / 64, 1 - 30 / 64, 1 - 45 / 64, 1 / 16, 1 / 16])


# --- Loss scale ---------------------------------------------------------------------------------------------------------------------------


def test_the_scale_halves_on_overflow_doubles_after_a_good_streak_and_stays_within_bounds() -> None:
    scale = LossScale(4.0, growth_every=2)
    fates = [False, False, False, True, True, True, False, True, True]
    answers = [scale.update(finite=fate) for fate in fates]
    assert answers == [True, True, False, False, False, False, True, False, False]  # at 1 there is nothing left to halve
    assert (scale.value, scale.skipped) == (2.0, 4)
    for _ in range(100):
        scale.update(finite=True)
    assert scale.value == 2.0**24


@given(st.lists(st.booleans(), max_size=30), st.integers(0, 30))
def test_a_restored_scale_goes_on_as_the_saved_one(fates: list[bool], cut: int) -> None:
    whole, first, second = (LossScale(16.0, growth_every=3) for _ in range(3))
    for index, fate in enumerate(fates):
        whole.update(finite=fate)
        (first if index < cut else second).update(finite=fate)
        if index + 1 == cut:
            second.restore(json.loads(json.dumps(first.state())))
    end = second if len(fates) >= cut > 0 or cut == 0 else first
    assert end.state() == whole.state()


def linear_engine(scale: LossScale | None, clip: float = float("inf")) -> ReplicatedEngine:
    torch.manual_seed(0)
    return ReplicatedEngine(nn.Linear(4, 3), World.single(), betas=(0.9, 0.999), weight_decay=1e-4, ema=0.9, clip_norm=clip, loss_scale=scale)


def test_a_scaled_update_is_the_unscaled_one_bit_for_bit() -> None:
    plain, scaled = linear_engine(None, 0.1), linear_engine(LossScale(2.0**12, growth_every=2), 0.1)
    for step in range(5):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        for engine in (plain, scaled):
            engine.backward(engine(x).square().mean())
        ours, theirs = scaled.step(1e-2), plain.step(1e-2)
        assert ours == theirs
    assert all(torch.equal(a, b) for a, b in zip(plain.module.parameters(), scaled.module.parameters(), strict=True))
    assert scaled.loss_scale is not None and scaled.loss_scale.value == 2.0**14


def test_an_overflow_skips_the_update_and_at_the_smallest_scale_it_is_an_error() -> None:
    engine = linear_engine(LossScale(2.0))
    before = [p.detach().clone() for p in engine.module.parameters()]
    fates = []
    for _ in range(2):
        engine.backward(engine(torch.ones(1, 4)).sum() * float("inf"))
        update = engine.step(1e-2)
        fates.append((update.applied, update.overflow))
    assert fates == [(False, True), (False, False)]
    assert all(torch.equal(a, b) for a, b in zip(before, engine.module.parameters(), strict=True)) and engine.updates == 0


# --- Whole runs ---------------------------------------------------------------------------------------------------------------------------


def test_fp16_survives_a_long_streak_of_overflows_and_a_restart_equals_no_restart(
    place: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Four halvings to a usable scale, then growth every second update: the state matters before and after the restart.
    monkeypatch.setattr(dvae_stage, "LossScale", lambda: LossScale(2.0**24, growth_every=2))
    whole, broken = place("whole"), place("broken")
    run_dvae(whole, "dvae_fit.precision=fp16")
    with pytest.raises(launch.StageFailed, match="stopped by a signal after update 4 of 10; saved"):
        run_dvae(broken, "dvae_fit.precision=fp16", stop=StopAfter(4))
    run_dvae(broken, "dvae_fit.precision=fp16")
    assert losses(broken, "dvae") == losses(whole, "dvae") and fingerprint(broken, "dvae") == fingerprint(whole, "dvae")
    series = read_metrics(str(whole / "tiny"), "dvae")
    skipped = [point.value for point in series["optim/skipped_updates"]]
    assert skipped[3] == 4 <= skipped[-1] < 8, "more than max_bad_steps in a row, and not all"
    assert {point.value for point in series["optim/loss_scale"]} >= {2.0**20, 2.0**21}
    meta = json.loads((whole / "tiny/dvae/checkpoints/step-00000010/meta.json").read_text())
    assert meta["loss_scale"]["skipped"] == skipped[-1] and meta["updates"] == 10 - skipped[-1]


def killed_in_an_update(root: str, step: int) -> None:
    """Train until the given update, and be killed in it, once the checkpoint before it is written; in a process of its own."""
    good = DvaeTask.loss

    def fatal(self: DvaeTask, engine: Any, batch: Any, at: int, *rest: Any) -> Any:
        if at == step:
            while not list(Path(root).glob("tiny/dvae/checkpoints/*/meta.json")):  # it is written beside training
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        return good(self, engine, batch, at, *rest)

    DvaeTask.loss = fatal  # type: ignore[method-assign, assignment]
    run_dvae(Path(root), "dvae_fit.save_every=4")


def test_four_updates_a_kill_in_the_seventh_and_six_more_equal_ten_bit_for_bit(place: Callable[[str], Path]) -> None:
    whole, killed = place("whole"), place("killed")
    run_dvae(whole, "dvae_fit.save_every=4")
    process = multiprocessing.get_context("forkserver").Process(target=killed_in_an_update, args=(str(killed), 6))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert [path.parent.name for path in (killed / "tiny/dvae/checkpoints").glob("*/meta.json")] == ["step-00000004"]
    run_dvae(killed, "dvae_fit.save_every=4")
    assert losses(killed, "dvae") == losses(whole, "dvae") and fingerprint(killed, "dvae") == fingerprint(whole, "dvae")
    assert json.loads((killed / "tiny/dvae/checkpoints/step-00000010/meta.json").read_text())["updates"] == 10


def test_two_ranks_with_two_micro_batches_follow_one_process_in_fp16(place: Callable[[str], Path]) -> None:
    alone, together = place("alone"), place("together")
    run_dvae(alone, "dvae_fit.precision=fp16")
    config = json.loads((alone / "tiny/config.json").read_text())
    config["run"]["root"] = str(together)
    (together / "tiny/config.json").write_text(json.dumps(config))
    shared = run_in_ranks(train_in_ranks, 2, str(together), ("dvae",), {"dvae_fit.accumulation": 2})[0]
    assert shared["dvae"] == pytest.approx(losses(alone, "dvae"), rel=2e-3, abs=2e-5)
    scales = [[point.value for point in read_metrics(str(root / "tiny"), "dvae")["optim/loss_scale"]] for root in (alone, together)]
    assert scales[0] == scales[1] == [2.0**16] * 10


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_three_losses_that_are_no_numbers_end_the_run_with_93_and_keep_the_last_good_checkpoint(
    precision: str, place: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, good = place("bad"), DvaeTask.loss
    asked = []

    def sometimes(self: DvaeTask, engine: Any, batch: Any, step: int, *rest: Any) -> Any:
        asked.append(step)
        found = good(self, engine, batch, step, *rest)
        if step in (1, 2) or step >= 4:  # two in a row are forgiven
            found.total = found.total * float("nan")
        return found

    monkeypatch.setattr(DvaeTask, "loss", sometimes)
    with pytest.raises(
        launch.StageFailed,
        match=r"3 consecutive updates up to update 6 had non-finite losses.*the checkpoint of update 4 is kept\. Go on from there with a smaller dvae_fit\.lr, or.* larger dvae_fit\.max_bad_steps.*: launcher\.py dvae .*dvae_fit\.lr=.* --go-on",
    ) as caught:
        run_dvae(root, f"dvae_fit.precision={precision}", "dvae_fit.save_every=1")
    assert caught.value.exit_code == ExitCode.DIVERGED
    assert asked == list(range(7))
    kept = sorted(path.parent.name for path in (root / "tiny/dvae/checkpoints").glob("*/meta.json"))
    assert kept == ["step-00000001", "step-00000004"]


def test_a_truncated_checkpoint_is_left_for_the_one_before_it_and_without_one_the_run_is_refused(
    place: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    root = place("cut")
    with pytest.raises(launch.StageFailed):
        run_dvae(root, stop=StopAfter(7))
    files = sorted((root / "tiny/dvae/checkpoints").glob("*/rank-0.bin"))
    assert [path.parent.name for path in files] == ["step-00000005", "step-00000007"]
    whole = [path.read_bytes() for path in files]
    files[1].write_bytes(whole[1][:-100])
    files[0].write_bytes(whole[0][:-100])
    with pytest.raises(launch.StageFailed, match=r"step-00000005: .*damaged") as caught:
        run_dvae(root)
    assert caught.value.exit_code == ExitCode.DATA
    files[0].write_bytes(whole[0])
    with caplog.at_level(logging.ERROR):
        run_dvae(root)
    assert "step-00000007" in caplog.text and "falling back to the checkpoint before it" in caplog.text
    assert len(losses(root, "dvae")) == 10


def test_recomputed_blocks_train_to_the_same_losses(place: Callable[[str], Path]) -> None:
    plain, recomputed = place("plain"), place("recomputed")
    run_dvae(plain)
    run_dvae(recomputed, "dvae_fit.activation_checkpointing=true")
    assert losses(plain, "dvae") == losses(recomputed, "dvae")


@pytest.mark.soak
def test_compiled_groups_train_to_the_same_losses(place: Callable[[str], Path]) -> None:
    plain, compiled = place("plain"), place("compiled")
    run_dvae(plain)
    run_dvae(compiled, "dvae_fit.compile=true")
    assert losses(compiled, "dvae") == pytest.approx(losses(plain, "dvae"), rel=1e-4)


def test_everything_that_matters_is_logged_and_a_collapse_is_said_loudly(place: Callable[[str], Path], caplog: pytest.LogCaptureFixture) -> None:
    root = place("logged")
    with caplog.at_level(logging.WARNING):
        run_dvae(root, "dvae_fit.warn_perplexity=1.0")
    series = read_metrics(str(root / "tiny"), "dvae")
    wanted = {
        "train/loss",
        "train/nll",
        "train/kl",
        "sched/tau",
        "sched/beta",
        "optim/lr",
        "optim/grad_norm",
        "perf/images_per_s",
        "perf/mfu",
        "data/wait_s",
    }
    wanted |= {
        f"eval/{name}" for name in ("elb_true", "elb_relaxed", "elb_gap", "psnr", "psnr_relaxed", "ssim", "code_use", "dead_codes", "perplexity")
    }
    wanted |= {f"eval/train_{name}" for name in ("code_use", "dead_codes", "perplexity", "codes_counted")}
    assert wanted <= series.keys()
    last = {name: points[-1].value for name, points in series.items()}
    kl = last["eval/kl"] / (3 * 4**2)
    assert last["eval/elb_true"] == pytest.approx(-(last["eval/nll_true"] + kl))
    assert last["eval/elb_gap"] == pytest.approx(last["eval/nll_true"] - last["eval/nll_relaxed"])
    assert last["eval/train_codes_counted"] == 10 * 8 * 16
    assert 0 < last["perf/mfu"] < 1.5
    assert last["eval/dead_codes"] == 32 * (1 - last["eval/code_use"])
    assert "the codebook collapses" in caplog.text and "Raise dvae_fit.beta" in caplog.text
    assert "the codebook collapses" in storage.read_text(build(str(root / "tiny")))


# --- Codebook statistics ------------------------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=9), max_size=40), st.integers(1, 50))
def test_a_window_counts_the_newest_codes_and_enough_of_them(batches: list[list[int]], enough: int) -> None:
    window = CodeWindow(7, torch.device("cpu"), enough)
    for batch in batches:
        window.add(torch.tensor(batch))
    stream = [code for batch in batches for code in batch]
    counted = int(window.counts().sum())
    assert torch.equal(window.counts(), torch.bincount(torch.tensor(stream[len(stream) - counted :], dtype=torch.int64), minlength=7))
    assert counted >= min(enough, len(stream))


def test_a_window_holds_at_most_an_eighth_more_than_asked_for() -> None:
    window = CodeWindow(3, torch.device("cpu"), 16)
    for _ in range(100):
        window.add(torch.tensor([1]))
        counted = int(window.counts()[1])
        assert counted <= 18
    assert counted >= 16


def test_statistics_of_codes_and_the_warning() -> None:
    even = code_statistics(torch.tensor([5, 5, 5, 5]))
    assert even["code_use"] == 1 and even["dead_codes"] == 0 and even["perplexity"] == pytest.approx(4)
    one = code_statistics(torch.tensor([9, 0, 0, 0]))
    assert (one["code_use"], one["dead_codes"], one["perplexity"]) == (0.25, 3, 1)
    assert collapse_warning(even, 4, 0.9) == ""
    assert "25.0 % of 4 codes are in use, at a perplexity of 1.0 (below 30 % of the codes" in collapse_warning(one, 4, 0.3)
    assert code_statistics(torch.zeros(3, dtype=torch.int64))["code_use"] == 0
