"""`plan` of what no GPU was bought for: models that are too small for one, runs of less than a day, and machines of one GPU. About 1 s."""

from __future__ import annotations

import re

import pytest

import launcher
from infra.errors import ExitCode
from train.config import load_run
from train.planning import estimate, states
from train.planning.estimate import Setting
from train.planning.states import Cluster


def test_a_model_too_small_for_a_gpu_is_told_so_and_a_short_run_in_minutes(capsys: pytest.CaptureFixture[str]) -> None:
    assert launcher.main(["plan", "demo"]) == ExitCode.DONE
    small = capsys.readouterr().out
    assert "too small            to start the kernels of an update takes 0.002 s or more" in small
    assert re.search(r"the whole run +4,000 updates: [\d.]+ s, ", small)
    assert launcher.main(["plan", "120M", "--tokens", "4e8"]) == ExitCode.DONE
    assert re.search(r"the whole run +\d+ updates: \d+:\d\d minutes, ", capsys.readouterr().out)
    assert launcher.main(["plan", "1.2B"]) == ExitCode.DONE
    large = capsys.readouterr().out
    assert "too small" not in large and re.search(r"the whole run .* days, ", large)


def test_machines_of_one_gpu_send_nothing_inside() -> None:
    cfg = load_run("12B", ["zero.sharding=flat", "dalle_fit.accumulation=1"])
    alone, eight = (estimate.traffic(Setting.configured(cfg, Cluster(nodes, gpus))) for nodes, gpus in ((64, 1), (8, 8)))
    assert alone.inside == 0.0 and alone.outside == eight.inside > eight.outside > 0


def test_a_bucket_is_allocated_whole_but_no_larger_than_the_model() -> None:
    """By the engine's own rule; `plan tiny --check` and `plan demo --check` compare it with the engine."""
    parameters = states.Parameters(matrices=600, blocks_rest=40, embeddings=30, unembeddings=20, final_norm=10)
    assert states.states(parameters, 2, 1, bucket_elements=500).buckets == 4 * 500
    assert states.states(parameters, 2, 1, bucket_elements=1000).buckets == 4 * 700
    assert states.states(parameters, 2, 1, bucket_elements=1000, overlaps=True).buckets == 2 * 4 * 700
    assert states.states(parameters, 1, 1, bucket_elements=1000, half_gradients=True).buckets == 2 * 4 * 600  # both in fp32
    assert states.states(parameters, 3, 1, bucket_elements=500).buckets == 2 * 4 * 500
    whole = states.states(parameters, 3, 1, bucket_elements=1000)
    assert whole.buckets == 4 * 700 and whole.update == whole.gradients + 2 * 4 * 700, "what is reduced once is reduced after the backward pass"
    halves = states.states(parameters, 3, 1, bucket_elements=1000, half_gradients=True)
    assert halves.buckets == (2 + 4) * 600 and halves.update == halves.gradients + (2 + 4) * 600 + 2 * 600 + 4 * 100
