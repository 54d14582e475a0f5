"""The paper's whole recipe as stages on the tiny preset: exact resume, kills of single ranks, export, a start from an export, apex."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from infra import ledger, storage
from infra.errors import ConfigError, DataError, ExitCode, UsageError
from infra.run_folder import RunFolder
from infra.world import World
from tests.support import processes
from tests.system.test_demo import command
from tests.system.test_training import StopAfter, copy_of, fingerprint, losses, run_stage
from train import launch
from train.config import load_run
from train.loop.metrics import read_metrics
from train.run.inputs import open_codes
from train.stages.dalle import make_plateau
from train.verbs import export as export_verb
from train.weights import checkpoint

PAPERS_RECIPE: dict[str, Any] = {
    "dalle_fit.activation_checkpointing": True,
    "dalle_fit.precision": "fp16",
    "dalle_fit.moments": "16-bit",
    "dalle_fit.schedule": "plateau",
    "dalle_fit.plateau_window": 2,
    "dalle_fit.plateau_patience": 1,
    "dalle_fit.plateau_threshold": 0.5,
    "dalle_fit.warmup_steps": 2,
    "dalle_fit.numerics_every": 2,
    "dalle_fit.keep_every": 5,
    "zero.stage": 3,
}


def recipe_words(**changes: Any) -> list[str]:
    return [f"{key}={json.dumps(value) if isinstance(value, bool) else value}" for key, value in (PAPERS_RECIPE | changes).items()]


def test_the_papers_recipe_resumes_bit_for_bit_is_exported_and_starts_another_run(
    prepared: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole, broken = (copy_of(prepared, tmp_path / name, changes=PAPERS_RECIPE) for name in ("whole", "broken"))
    run_stage("dalle", str(whole), recipe_words())
    with pytest.raises(launch.StageFailed, match="stopped by a signal after update 4 of 10; saved"):
        run_stage("dalle", str(broken), recipe_words(), StopAfter(4))
    run_stage("dalle", str(broken), recipe_words())
    assert losses(broken, "dalle") == losses(whole, "dalle") and fingerprint(broken, "dalle") == fingerprint(whole, "dalle")
    metas = [json.loads((root / "tiny/dalle/checkpoints/step-00000010/meta.json").read_text()) for root in (whole, broken)]
    for key in ("engine", "plateau", "bad_updates", "loader"):
        assert metas[0][key] == metas[1][key], key
    assert metas[0]["plateau"]["halved"] == [6, 10] and metas[0]["engine"]["attempts"] == 10
    series = read_metrics(str(whole / "tiny"), "dalle")
    assert [point.value for point in series["optim/lr"]] == [1.5e-3] + [3e-3] * 5 + [1.5e-3] * 4
    assert [point.value for point in series["sched/halvings"]] == [0] * 5 + [1] * 4 + [2]
    assert [point.step for point in series["numerics/scale/007-mlp"]] == [2, 4, 6, 8, 10]
    assert 0 <= series["numerics/zero_share/000-attention"][-1].value <= 1 and "perf/save_stall_s" in series
    rows = [series[f"eval/loss_image_row_{row:02d}"][-1].value for row in range(4)]
    assert sum(rows) / 4 == pytest.approx(series["eval/loss_image"][-1].value)
    assert sorted(path.name for path in (whole / "tiny/dalle/checkpoints").iterdir()) == ["step-00000005", "step-00000010"]

    run, out = str(whole / "tiny"), tmp_path / "raw"
    export_verb.main(run, "dalle", "average", 0, str(tmp_path / "again"))
    own = json.loads((whole / "tiny/dalle/export/config.json").read_text())["content_hash"]
    assert json.loads((tmp_path / "again" / "config.json").read_text())["content_hash"] == own and own in capfd.readouterr().out
    export_verb.main(run, "dalle", "raw", 5, str(out))
    description = json.loads((out / "config.json").read_text())
    assert description["content_hash"] != own and (description["step"], description["weights"]) == (5, "raw")
    with pytest.raises(DataError, match=r"no checkpoint after update 7; complete ones: 5, 10"):
        export_verb.main(run, "dalle", "raw", 7, str(out))
    with pytest.raises(UsageError, match="accepted stages are dvae, dalle, align, accepted weights average, raw"):
        export_verb.main(run, "clip", "raw", 0, str(out))

    wider = copy_of(prepared, tmp_path / "wider", changes={"dalle_fit.init_from": str(out), "dalle.width": 48})
    with pytest.raises(
        launch.StageFailed, match=r"\d+ of \d+ weights do not fit this configuration:\n  final_norm.bias: \(32,\) there, \(48,\) here"
    ):
        run_stage("dalle", str(wider), [f"dalle_fit.init_from={out}", "dalle.width=48"])
    started = copy_of(prepared, tmp_path / "started", changes={"dalle_fit.init_from": str(out)})
    with pytest.raises(launch.StageFailed, match="stopped by a signal after update 4 of 10; saved"):
        run_stage("dalle", str(started), [f"dalle_fit.init_from={out}"], StopAfter(4))
    assert losses(started, "dalle")[0] < losses(whole, "dalle")[0]
    shutil.rmtree(out)  # the other run is cleaned up: a checkpoint needs it no more
    run_stage("dalle", str(started), [f"dalle_fit.init_from={out}"])
    for file in ("checkpoints/step-00000010/meta.json", "export/config.json"):
        assert json.loads((started / "tiny/dalle" / file).read_text())["parents"]["init_from"] == description["content_hash"]


@pytest.mark.parametrize(("key", "other"), [("optimizer", "paper"), ("norm", "torch")])
def test_apex_where_it_is_asked_for_and_absent_ends_the_stage_with_the_reason(prepared: Path, tmp_path: Path, key: str, other: str) -> None:
    root = copy_of(prepared, tmp_path, changes={f"dalle_fit.{key}": "apex"})
    with pytest.raises(launch.StageFailed, match=rf"dalle_fit\.{key} = 'apex': it cannot be .* set dalle_fit\.{key} = '{other}'") as caught:
        run_stage("dalle", str(root), [f"dalle_fit.{key}=apex"])
    assert caught.value.exit_code == ExitCode.CONFIG


def newest(root: Path) -> int:
    return max(checkpoint.complete(str(root / "tiny" / "dalle")), default=0)


def samples_of(root: Path) -> list[float]:
    """What the updates saw, by what is left of the logs; over whole epochs each sample comes as often as there are epochs."""
    run = str(root / "tiny")
    cfg = load_run(run, [])
    codes = open_codes(cfg, RunFolder(run), 0, "train")
    once = sum(int(found) & 0xFFFFFFFF for part in codes.id_hashes() for found in part)
    epochs = cfg.dalle_fit.batch // math.gcd(codes.count, cfg.dalle_fit.batch)
    updates = epochs * codes.count // cfg.dalle_fit.batch
    seen = [point.value for point in read_metrics(run, "dalle")["data/samples"]]
    assert len(seen) >= updates > 1 and sum(seen[:updates]) == epochs * once
    return seen


def shown_by_tensorboard(root: Path) -> list[tuple[int, float]]:
    """Steps and values of the curve of training losses, as TensorBoard's own reader has it."""
    found = EventAccumulator(str(root / "tiny/tensorboard/dalle"), size_guidance={"scalars": 0})
    found.Reload()
    return [(event.step, event.value) for event in found.Scalars("1 loss/train loss")]


@pytest.mark.parametrize(("kills", "updates"), [(2, 50), pytest.param(20, 400, marks=pytest.mark.soak)])
def test_kills_of_random_ranks_change_no_loss_and_no_weight(prepared: Path, tmp_path: Path, kills: int, updates: int) -> None:
    """kill -9 of a random rank of two, at random times, under a launcher that starts them again: the losses of an undisturbed run, update for update.

    In the history that is left, each sample of an epoch comes exactly once.
    """
    changes = PAPERS_RECIPE | {"dalle_fit.steps": updates, "dalle_fit.save_every": 4, "dalle_fit.eval_every": updates}
    calm, stormy = (copy_of(prepared, tmp_path / name, changes=changes) for name in ("calm", "stormy"))
    subprocess.run(command("dalle", str(calm / "tiny"), "--nproc", "2"), check=True, capture_output=True, timeout=1500)
    rng, saved = random.Random(1), [-1]
    process = subprocess.Popen(command("dalle", str(stormy / "tiny"), "--nproc", "2", "--restarts", "1"), stderr=subprocess.DEVNULL)
    try:
        for _ in range(kills):
            before = newest(stormy)
            while newest(stormy) <= before + 4 * rng.randrange(3) and process.poll() is None:
                time.sleep(0.02)
            time.sleep(rng.uniform(0, 0.3))
            ranks = processes.ranks_under(process.pid)
            assert process.poll() is None and len(ranks) == 2, f"the run must be under way when it is hit; ranks {ranks}"
            saved.append(newest(stormy))
            os.kill(rng.choice(ranks), signal.SIGKILL)
            while set(ranks) & set(processes.of_run(stormy / "tiny")):  # a checkpoint that is being written may still appear
                time.sleep(0.02)
        assert process.wait(timeout=1500) == ExitCode.DONE
    finally:
        process.kill()  # its ranks end with it
        process.wait()
    attempts = ledger.read(RunFolder(str(stormy / "tiny")), "dalle")
    assert [(each.restart, each.code) for each in attempts] == [(kill, ExitCode.CRASH) for kill in range(kills)] + [(kills, ExitCode.DONE)]
    assert all(each.saved >= known for each, known in zip(attempts, saved, strict=True)), "no update is lost beyond the last checkpoint"
    assert len(losses(calm, "dalle")) == updates and losses(stormy, "dalle") == losses(calm, "dalle")
    assert samples_of(stormy) == samples_of(calm)
    curves, smooth = (shown_by_tensorboard(root) for root in (stormy, calm))
    assert [step for step, _ in curves] == list(range(1, updates + 1)), "without gaps, and no update is drawn twice"
    assert curves == smooth
    ours, theirs = (json.loads((root / "tiny/dalle/export/config.json").read_text())["content_hash"] for root in (stormy, calm))
    assert ours == theirs


def test_halvings_are_written_by_hand_into_the_run_folder(tmp_path: Path) -> None:
    fit, run = load_run("tiny", ["dalle_fit.halve_at=[7]", "dalle_fit.schedule=plateau"]).dalle_fit, RunFolder(str(tmp_path))
    assert make_plateau(fit, run, World.single()).at == (7,)
    storage.write_json(run.at("dalle", "halve_at.json"), [30, 20])
    assert make_plateau(fit, run, World.single()).at == (20, 30)
    storage.write_json(run.at("dalle", "halve_at.json"), [])
    none = make_plateau(fit, run, World.single())
    assert not any(none.observe(step, 1.0) for step in range(1, 10 * fit.plateau_window)), "an empty list is no halving, not the detector"
    for wrong in ({"at": 3}, [20, 20], [0], [2.5]):
        storage.write_json(run.at("dalle", "halve_at.json"), wrong)
        with pytest.raises(ConfigError, match="expected a list of updates after which to halve"):
            make_plateau(fit, run, World.single())
    for key, message in (("[0]", "greater than 0"), ("[7, 7]", "names an update twice")):
        with pytest.raises(ConfigError, match=message):
            load_run("tiny", [f"dalle_fit.halve_at={key}", "dalle_fit.schedule=plateau"])
