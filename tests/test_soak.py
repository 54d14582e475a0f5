"""Long fault runs (``make soak``)."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.test_demo import command, processes_of
from train.metrics import read_metrics

_KILLS = 6
_WORDS = ["data.records_per_part=512"] + [
    f"{stage}_fit.{key}" for stage in ("dvae", "dalle") for key in ("steps=60", "save_every=10", "eval_every=60")
]


@pytest.mark.soak
def test_six_kills_at_random_times_change_no_loss(tmp_path: Path) -> None:
    """kill -9 of the demo's launcher, six times, wherever it happens to be; then the same losses as an undisturbed run, step for step."""
    calm, stormy = ["demo", "tiny", f"run.root={tmp_path / 'calm'}", *_WORDS], ["demo", "tiny", f"run.root={tmp_path / 'stormy'}", *_WORDS]
    started = time.monotonic()
    subprocess.run(command(*calm), check=True, capture_output=True, timeout=900)
    length, rng, kills = time.monotonic() - started, random.Random(0), 0
    while kills < _KILLS:
        process = subprocess.Popen(command(*stormy), stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            process.wait(timeout=rng.uniform(0.05, 0.5) * length)
            break  # finished between two kills
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
        while processes_of(tmp_path / "stormy" / "tiny"):
            time.sleep(0.05)
    subprocess.run(command(*stormy), check=True, capture_output=True, timeout=900)
    assert kills >= 3
    for stage in ("dvae", "dalle", "clip"):
        losses = [
            [(point.step, point.value) for point in read_metrics(str(tmp_path / name / "tiny"), stage)["train/loss"]] for name in ("calm", "stormy")
        ]
        assert losses[0] == losses[1], stage


@pytest.mark.soak
def test_twenty_kills_of_random_ranks_in_one_run_of_the_transformer(tmp_path: Path) -> None:
    """kill -9 of a random rank of two, at random times, each followed by the same command: the losses of an undisturbed run, step for step."""
    words = [f"dalle_fit.{key}" for key in ("steps=400", "save_every=5", "eval_every=400", "precision=fp16", "moments=16-bit", "schedule=plateau")]
    words += ["zero.stage=3"]
    runs = {name: [*words, f"run.root={tmp_path / name}"] for name in ("calm", "stormy")}
    for given in runs.values():
        for stage in ("prepare", "tokenizer", "dvae", "encode"):
            subprocess.run(command(stage, "tiny", *given), check=True, capture_output=True, timeout=900)
    subprocess.run(command("dalle", "tiny", *runs["calm"], "--nproc", "2"), check=True, capture_output=True, timeout=1800)
    rng, kills, folder = random.Random(1), 0, tmp_path / "stormy" / "tiny"
    while kills < 20:
        process = subprocess.Popen(command("dalle", "tiny", *runs["stormy"], "--nproc", "2"), stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
        begun, series = time.monotonic(), len(list((folder / "dalle" / "metrics").glob("*")))
        while process.poll() is None and len(list((folder / "dalle" / "metrics").glob("*"))) == series and time.monotonic() < begun + 300:
            time.sleep(0.1)  # until training goes on
        time.sleep(rng.uniform(0, 8))
        ranks = [pid for pid in processes_of(folder) if pid != process.pid]
        if process.poll() is not None:
            break
        if ranks:
            os.kill(rng.choice(ranks), signal.SIGKILL)
            kills += 1
        process.wait(timeout=300)
    subprocess.run(command("dalle", "tiny", *runs["stormy"], "--nproc", "2"), check=True, capture_output=True, timeout=1800)
    assert kills >= 5
    calm, stormy = ([(p.step, p.value) for p in read_metrics(str(tmp_path / name / "tiny"), "dalle")["train/loss"]] for name in ("calm", "stormy"))
    assert calm == stormy
