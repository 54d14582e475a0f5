"""What the transformer's memory and benchmark must show on a GPU (``make gpu``). Written without one; not yet seen."""

from __future__ import annotations

import gc

import pytest
import torch

from model.config import StreamShape, TransformerConfig
from tests.support.gpu import CUDA_ALONE, NEEDS_GPU
from train.bench import memory, model_cuda
from train.machine.rates import Options
from train.planning import activations

pytestmark = [*NEEDS_GPU, CUDA_ALONE]


@pytest.mark.parametrize("every", [0, 1, 2])
def test_planned_activations_are_within_5_percent_of_the_allocators_peak(every: int) -> None:
    cfg = TransformerConfig(layers=8, width=1024, heads=16)
    shape = StreamShape(text_tokens=256, text_vocab=16384, grid=32, image_vocab=8192)
    model = memory.build(cfg, shape, "flex", "bf16", every, "cuda")
    memory.train_peak(model, 4, "cuda")
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    memory.train_peak(model, 4, "cuda")
    found = torch.cuda.max_memory_allocated() - before
    assert activations.peak(activations.Run(cfg, shape, 4, 2, "flex", every)) == pytest.approx(found, rel=0.05)


def test_the_benchmark_runs_at_a_small_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_cuda, "_CFG", TransformerConfig(layers=5, width=256, heads=4))
    monkeypatch.setattr(model_cuda, "_SHAPE", StreamShape(text_tokens=16, text_vocab=100, grid=16, image_vocab=50))
    found = model_cuda.run_cuda(Options(device="cuda", seconds=0.05, runs=2))
    assert {name for name in found.ratios if name.startswith("share of the matrix rate")}
    assert any(name.startswith("FlexAttention, causal") for name in found.peers)
