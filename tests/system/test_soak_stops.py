"""A stop signal at any moment of any stage of the preset tiny: 75 within 20 s on two cores, and nothing lost. About 15 minutes; prints each latency."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infra.errors import ExitCode
from tests.support.root import ROOT
from train.run.stage_table import STAGES

pytestmark = pytest.mark.soak
LIMIT_S = 20.0
_MOMENTS = 10
_PHASE = re.compile(r"stopped by \w+ during ([^;]+);|(before the ranks were started|before the start)|(after update \d+)|(finished parts are kept)")


def start(stage: str, run: Path) -> subprocess.Popen[str]:
    words = [sys.executable, str(ROOT / "launcher.py"), stage, str(run)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """A run as it was before each stage, and how long each took: training is long enough to be struck, and saves and evaluates often."""
    root, seconds = tmp_path_factory.mktemp("runs"), {}
    often = [f"{stage}_fit.{key}" for stage in ("dvae", "dalle", "clip") for key in ("steps=60", "save_every=10", "eval_every=10")]
    subprocess.run([sys.executable, str(ROOT / "launcher.py"), "prepare", "tiny", f"run.root={root}", *often, "--nproc", "1"], check=True)
    shutil.rmtree(root / "tiny" / "images")
    (root / "tiny" / "prepare" / "done.json").unlink()
    for stage in STAGES:
        shutil.copytree(root / "tiny", root / f"before-{stage}")
        began = time.monotonic()
        process = start(stage, root / "tiny")
        assert process.wait() == 0, process.communicate()[0]
        seconds[stage] = time.monotonic() - began
    return root, seconds


@pytest.mark.parametrize("stage", STAGES)
def test_a_stop_signal_in_any_phase_ends_with_75_in_time_and_nothing_is_lost(
    undisturbed: tuple[Path, dict[str, float]], stage: str, tmp_path: Path
) -> None:
    root, seconds = undisturbed
    seen = set()
    for moment in range(_MOMENTS):
        run = tmp_path / "tiny"
        if not run.exists():
            shutil.copytree(root / f"before-{stage}", run)
        process = start(stage, run)
        time.sleep(seconds[stage] * (moment + 0.5) / _MOMENTS)
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        output = process.communicate(timeout=120)[0]
        latency = time.monotonic() - began
        found = _PHASE.search(output)
        phase = next((word for word in found.groups() if word), "") if found else f"ended with {process.returncode}"
        seen.add(phase)
        print(f"{stage:10} {phase:45} {latency:5.1f} s")
        assert process.returncode in (ExitCode.DONE, ExitCode.REQUEUE), output
        assert latency < LIMIT_S, output
        if process.returncode == ExitCode.DONE:
            shutil.rmtree(run)
    assert seen - {"ended with 0"}, "no moment of it was struck"
    if not run.exists():
        shutil.copytree(root / f"before-{stage}", run)
    process = start(stage, run)
    output = process.communicate(timeout=600)[0]
    assert process.returncode == 0, output
    made = [f"{stage}/export/config.json"] if STAGES[stage].trains else []
    for name in made:  # bit for bit: the identity of the weights
        assert (run / name).read_bytes() == (root / "tiny" / name).read_bytes()
