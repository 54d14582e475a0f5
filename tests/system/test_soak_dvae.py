"""Stage 1 on real drawings for some minutes (``make soak``): the shortened form of the runs in docs/experiments.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.signals import StopFlag
from train import launch
from train.experiments import curves

_STEPS = 750
_WORDS = [f"dvae_fit.{key}={_STEPS}" for key in ("steps", "lr_steps")] + [f"dvae_fit.tau_steps={_STEPS * 85 // 100}", "dvae_fit.eval_every=75"]


@pytest.mark.soak
def test_the_gap_between_the_elbs_closes_as_the_temperature_falls_and_the_codebook_is_used(tmp_path: Path) -> None:
    words = [f"run.root={tmp_path}", *_WORDS, "dvae_fit.eval_samples=256"]
    for stage in ("prepare", "dvae"):
        launch.stage(stage, "demo", words, on="local", nproc=1, dry_run=False, worker=False, stop=StopFlag())
    found = curves.collect(f"{tmp_path}/demo")
    series = found["series"]
    assert series["sched/tau"][0] > 0.9 and series["sched/tau"][-1] == pytest.approx(1 / 16)
    gaps = [abs(gap) for gap in series["eval/elb_gap"]]
    # It cannot vanish (docs/experiments.md), and of so short a run a good half remains: seen 0.090 at its widest and 0.059 in the end.
    assert gaps[-1] < 0.1 and gaps[-1] < 0.8 * max(gaps), gaps
    assert series["eval/elb_true"][-1] > series["eval/elb_true"][0] + 0.5
    assert series["eval/psnr"][-1] > 17 and series["eval/code_use"][-1] > 0.3 and series["eval/perplexity"][-1] > 0.05 * 512
