"""A stop signal in every phase of every stage: 75 within 20 s on two cores, and nothing lost. Prints each latency as a row of docs/cluster.md's table.

About 12 minutes at the sizes of the preset tiny, and longer at those of the demo, whose training is cut short. STOPS_SIZES=tiny takes one of them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from infra.errors import ExitCode
from tests.support import stops
from tests.support.root import ROOT
from train.loop.metrics import read_metrics
from train.run.stage_table import STAGES, TRAINED

pytestmark = pytest.mark.soak
LIMIT_S = 20.0
SIZES = os.environ.get("STOPS_SIZES", "tiny,demo").split(",")
_SHORT = {"tiny": {"steps": 60, "save_every": 10, "eval_every": 10}, "demo": {"steps": 12, "save_every": 4, "eval_every": 4}}
_ENDS = {
    "the merging of the parts",
    "the merging of the pictures",
    "the writing of the report",
    "the end, after the last checkpoint",
    "the evaluation",
}
"""Phases that may be over before the signal is heard."""


@pytest.fixture(scope="module", params=SIZES)
def undisturbed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The size; copies of a run as it was before each stage, and the run at its end. A dVAE that hardly learnt may use few codes."""
    size, root = request.param, tmp_path_factory.mktemp("runs")
    words = [f"{stage}_fit.{key}={value}" for stage in TRAINED for key, value in _SHORT[size].items()]
    words += ["encode.min_code_use=0", "dalle_fit.keep_every=4"]
    for stage in STAGES:
        if (root / "run").exists():
            shutil.copytree(root / "run", root / f"before-{stage}")
        given = [str(root / "run")] if (root / "run").exists() else [size, f"run.root={root}", "run.name=run", *words]
        subprocess.run([sys.executable, str(ROOT / "launcher.py"), stage, *given], check=True, stdout=subprocess.DEVNULL)
        if stage == "prepare":  # which had no folder before it
            shutil.copytree(root / "run", root / "before-prepare", ignore=shutil.ignore_patterns("images", "done.json", "exits", "locks"))
    return size, root


def result(run: Path, stage: str) -> Any:
    """What a stage leaves, by content."""
    if stage in TRAINED:
        losses = [(point.step, point.value) for point in read_metrics(str(run), stage)["train/loss"]]
        return losses, json.loads((run / stage / "export" / "config.json").read_text())["content_hash"]
    if stage in ("prepare", "encode"):
        return json.loads((run / stage / "done.json").read_text())["versions"]
    files = {"tokenizer": "tokenizer/manifest.json", "evaluate": "evaluate/metrics.json", "generate": "generate/index.json", "report": ""}
    found = json.loads((run / files[stage]).read_text()) if files[stage] else {}
    return {key: value for key, value in found.items() if key != "producer"}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stop_signal_in_any_phase_ends_with_75_in_time_and_nothing_is_lost(undisturbed: tuple[str, Path], stage: str, tmp_path: Path) -> None:
    run, met = tmp_path / "run", set()
    size, before = undisturbed
    for phase in stops.phases(stage, work_alone=size != "tiny"):
        if not run.exists():
            shutil.copytree(before / f"before-{stage}", run)
        found = stops.strike(stage, run, phase)
        print(f"| {size} {found}", *([found.output] if found.latency_s > LIMIT_S / 2 else []), sep="\n", flush=True)
        assert found.code == ExitCode.REQUEUE or (found.code == ExitCode.DONE and phase in _ENDS), found.output
        assert found.latency_s < LIMIT_S, found.output
        met.add(found.came)
        if found.code == ExitCode.DONE:
            shutil.rmtree(run)
    assert met & {*stops.PHASES[stage], *stops.TRAINING}, "work was struck, and not starts alone"
    if not run.exists():
        shutil.copytree(before / f"before-{stage}", run)
    process = stops.start(stage, run)
    output = process.communicate(timeout=900)[0]
    assert process.returncode == 0, output
    assert result(run, stage) == result(before / "run", stage)


def test_a_first_update_that_compiles_is_left(undisturbed: tuple[str, Path], tmp_path: Path) -> None:
    """torch.compile runs a C++ compiler for the dVAE's groups."""
    run = tmp_path / "run"
    shutil.copytree(undisturbed[1] / "before-dvae", run)
    config = json.loads((run / "config.json").read_text())
    config["dvae_fit"]["compile"] = True
    (run / "config.json").write_text(json.dumps(config))
    found = stops.strike("dvae", run, "the first update, which compiles", after_s=2.0)
    print(f"| {undisturbed[0]} {found}", flush=True)
    assert (found.code, found.came) == (ExitCode.REQUEUE, "the first update, which compiles"), found.output
    assert found.latency_s < LIMIT_S and not list((run / "dvae").glob("checkpoints/*/meta.json")), found.output
