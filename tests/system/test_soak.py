"""Long fault runs (``make soak``)."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support import processes
from tests.system.test_demo import command
from train.loop.metrics import read_metrics

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
        while processes.of_run(tmp_path / "stormy" / "tiny"):
            time.sleep(0.05)
    subprocess.run(command(*stormy), check=True, capture_output=True, timeout=900)
    assert kills >= 3
    for stage in ("dvae", "dalle", "clip"):
        losses = [
            [(point.step, point.value) for point in read_metrics(str(tmp_path / name / "tiny"), stage)["train/loss"]] for name in ("calm", "stormy")
        ]
        assert losses[0] == losses[1], stage
