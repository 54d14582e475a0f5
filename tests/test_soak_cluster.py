"""A hard day of a training stage (``make soak``): kills, stops, a signal in the middle of a save, a damaged newest checkpoint, fewer and more ranks."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.test_launcher import pids_of
from train.metrics import read_metrics

ROOT = Path(__file__).parent.parent
_FAULTS = ("kill rank", "kill launcher", "term", "usr2", "two signals", "damage") * 3 + ("kill rank", "usr2")


def start(run: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(ROOT / "launcher.py"), "dvae", str(run), "--nproc", "2"]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def strike(fault: str, process: subprocess.Popen[bytes], run: Path) -> None:
    ranks = pids_of(run)
    if fault == "kill rank" and ranks:
        os.kill(ranks[-1], signal.SIGKILL)
    elif fault == "kill launcher":
        process.kill()
    elif fault == "term":
        process.terminate()
    else:
        process.send_signal(signal.SIGUSR2)
        if fault == "two signals":  # the second one while the first saves
            time.sleep(0.2)
            if process.poll() is None:
                process.terminate()
    process.wait(timeout=240)
    saved = sorted((run / "dvae" / "checkpoints").glob("step-*/rank-0.bin"))
    if fault == "damage" and len(saved) > 1:
        saved[-1].write_bytes(b"damaged" + saved[-1].read_bytes()[7:])


@pytest.mark.soak
def test_twenty_faults_change_no_loss(tmp_path: Path) -> None:
    words = ["dvae_fit.steps=400", "dvae_fit.save_every=10", "dvae_fit.eval_every=400"]
    subprocess.run([sys.executable, str(ROOT / "launcher.py"), "prepare", "tiny", f"run.root={tmp_path}", *words, "--nproc", "1"], check=True)
    stormy, calm = tmp_path / "tiny", tmp_path / "calm" / "tiny"
    shutil.copytree(stormy, calm)
    config = json.loads((calm / "config.json").read_text())
    config["run"]["root"] = str(calm.parent)
    (calm / "config.json").write_text(json.dumps(config))
    assert start(calm).wait(timeout=900) == 0
    rng = random.Random(0)
    struck = 0
    for fault in rng.sample(_FAULTS, len(_FAULTS)):
        process = start(stormy)
        try:
            process.wait(timeout=rng.uniform(8, 30))
            break
        except subprocess.TimeoutExpired:
            strike(fault, process, stormy)
            struck += 1
        while pids_of(stormy):
            time.sleep(0.05)
    assert start(stormy).wait(timeout=900) == 0
    assert struck >= 5, "the run was over before it was disturbed"
    losses = [[(point.step, point.value) for point in read_metrics(str(run), "dvae")["train/loss"]] for run in (calm, stormy)]
    assert losses[0] == losses[1] and losses[0][-1][0] == 400
    assert read_metrics(str(stormy), "dvae")["goodput/share"][-1].value > 0
