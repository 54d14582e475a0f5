"""The demo as a user meets it: killed in three stages and run again; and the README's own commands."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support import processes
from tests.support.root import ROOT
from train.loop.metrics import read_metrics

_PATIENCE_S = 900


def command(*words: str) -> list[str]:
    return [sys.executable, str(ROOT / "launcher.py"), *words]


def run_until(words: list[str], run: Path, reached: Callable[[], bool]) -> None:
    """Start the demo, kill -9 its launcher once a point is reached, and see that nothing outlives it."""
    process = subprocess.Popen(command(*words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    deadline = time.monotonic() + _PATIENCE_S
    while not reached():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    while processes.of_run(run):
        assert time.monotonic() < deadline, "something outlived the launcher"
        time.sleep(0.05)


@pytest.mark.parametrize("nproc", [1, pytest.param(2, marks=pytest.mark.soak)])
def test_the_demo_killed_in_three_stages_completes_and_repeats_nothing(tmp_path: Path, nproc: int) -> None:
    run = tmp_path / "tiny"
    steps = [f"{stage}_fit.{key}" for stage in ("dvae", "dalle") for key in ("steps=120", "save_every=10", "eval_every=120")]
    words = ["demo", "tiny", f"run.root={tmp_path}", "data.records_per_part=512", *steps, "--nproc", str(nproc)]
    run_until(words, run, lambda: any((run / "images" / "train").glob("part-*/done.json")))
    part = min((run / "images" / "train").glob("part-*/done.json"))
    written = part.stat().st_mtime_ns
    for stage in ("dvae", "dalle"):
        marker = run / stage / "checkpoints" / "step-00000010" / "meta.json"
        run_until(words, run, lambda: marker.exists() or any((run / stage / "checkpoints").glob("step-*/meta.json")))  # noqa: B023
        assert not (run / stage / "done.json").exists()
    done = subprocess.run(command(*words, "--restarts", "1"), capture_output=True, text=True, timeout=_PATIENCE_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "prepare: finished already" in done.stdout and "projected time" in done.stdout
    for path in re.findall(r"^(?:report|pictures|tensorboard) +(\S+)", done.stdout, re.M):
        assert Path(path).exists(), path
    assert part.stat().st_mtime_ns == written, "a finished part was written again"
    for stage in ("dvae", "dalle"):
        assert [point.step for point in read_metrics(str(run), stage)["train/loss"]] == list(range(1, 121))
        attempts = sorted((run / stage / "metrics").glob("attempt-*.jsonl"))
        first = json.loads(attempts[-1].read_text().splitlines()[0])["step"]
        assert len(attempts) >= 2 and first >= 11, "the last attempt should go on from a checkpoint"
    again = subprocess.run(command(*words), capture_output=True, text=True, timeout=_PATIENCE_S, check=False)
    assert again.returncode == 0 and again.stdout.count("finished already") == 8, again.stdout


def test_the_readmes_commands_work(tmp_path: Path) -> None:
    """Every launcher line of the README that names no placeholder, with the folders moved to a temporary place."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    rng = np.random.default_rng(0)
    for index in range(60):
        Image.fromarray(rng.integers(0, 255, (96, 96, 3), dtype=np.uint8)).save(pictures / f"{index:03d}.png")
        (pictures / f"{index:03d}.txt").write_text(f"picture number {index}\nnoise\n")
    lines = [line.strip() for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("    python launcher.py")]
    real = [line for line in lines if not re.search(r"STAGE|PRESET", line)]
    assert len(real) >= 2
    for line in real:
        words = shlex.split(line)[2:]
        words = [re.sub(r"runs/(demo|mine)", str(tmp_path / "mine"), word.replace("/data/pictures", str(pictures))) for word in words]
        if words[0] not in ("status", "inspect"):
            words.append(f"run.root={tmp_path}")
        done = subprocess.run(command(*words), capture_output=True, text=True, timeout=_PATIENCE_S, check=False, cwd=tmp_path)
        assert done.returncode == 0, line + done.stderr
    manifest = json.loads((tmp_path / "mine" / "images" / "train" / "manifest.json").read_text())
    assert manifest["count"] > 40


def test_the_demos_page_wants_a_finished_run(tmp_path: Path) -> None:
    from infra.errors import DataError
    from train.verbs import demo_page

    with pytest.raises(DataError, match=r"not finished \(prepare, tokenizer"):
        demo_page.main(str(tmp_path))
