"""A stop that comes in an evaluation, and one in a save, of the contrastive model's training. About 20 s; test_soak_stops.py strikes every phase of every stage."""

from __future__ import annotations

import json
from pathlib import Path

from infra.errors import ExitCode
from tests.support import stops
from tests.system.test_training import copy_of, losses, run_stage
from train.loop.metrics import read_metrics

_STEPS = 40
_LIMIT_S = 20.0


def test_a_stop_in_an_evaluation_or_a_save_ends_with_75_in_time_and_loses_nothing(prepared: Path, tmp_path: Path) -> None:
    changes = {"clip_fit.steps": _STEPS, "clip_fit.eval_every": 4, "clip_fit.save_every": 4}
    struck, whole = (copy_of(prepared, tmp_path / name, changes=changes) for name in ("struck", "whole"))
    for phase in ("an evaluation", "a save"):
        found = stops.strike("clip", struck / "tiny", phase, "--nproc", "1")
        print(found)
        assert (found.code, found.latency_s < _LIMIT_S) == (ExitCode.REQUEUE, True) and "saved" in found.output, found.output
        assert found.came in {"an evaluation", "a save", "an update"}, "heard a moment later it meets what follows"
    assert 4 <= len(losses(struck, "clip")) < _STEPS
    for root in (struck, whole):
        run_stage("clip", str(root), [f"{key}={value}" for key, value in changes.items()])
    assert losses(struck, "clip") == losses(whole, "clip") and len(losses(whole, "clip")) == _STEPS
    ours, theirs = (read_metrics(str(root / "tiny"), "clip")["eval/recall_at_1"] for root in (struck, whole))
    assert [(point.step, point.value) for point in ours] == [(point.step, point.value) for point in theirs], "what was left is made up for"
    one, other = (json.loads((root / "tiny/clip/export/config.json").read_text())["content_hash"] for root in (struck, whole))
    assert one == other
