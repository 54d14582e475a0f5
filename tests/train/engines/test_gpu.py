"""An engine's update on a GPU (``make gpu``): the losses of a CPU, and one wait of the host, in the step's message. Not yet seen there. torch alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from infra.world import World
from tests.support.gpu import DEVICE, NEEDS_GPU
from train.engines.replicated import ReplicatedEngine
from train.optimizer.loss_scale import LossScale

pytestmark = NEEDS_GPU


@contextmanager
def without_waits() -> Iterator[None]:
    """Inside, torch raises where the host would wait for the GPU."""
    if DEVICE != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def losses(device: str, dtype: torch.dtype) -> list[float]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 8)).to(device)
    scale = LossScale(2.0**10) if dtype == torch.float16 else None
    engine = ReplicatedEngine(model, World.single(), betas=(0.9, 0.96), weight_decay=0.1, ema=0.9, clip_norm=1.0, loss_scale=scale)
    x, y = torch.randn(32, 64, generator=torch.Generator().manual_seed(1)).to(device), torch.arange(32).remainder(8).to(device)
    found = []
    for step in range(4):
        with without_waits() if step and device != "cpu" else _nothing():  # the first one sets things up
            loss = nn.functional.cross_entropy(engine(x), y)
            engine.backward(loss)
            message = torch.cat([engine.measure(), loss.detach().double()[None]])
        measured = message.tolist()  # the one wait
        with without_waits() if step and device != "cpu" else _nothing():
            assert engine.step(1e-2, measured[:1]).applied
        found.append(measured[1])
    return found


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_updates_give_the_losses_of_a_cpu_and_wait_once(dtype: torch.dtype) -> None:
    torch.set_float32_matmul_precision("highest")
    assert losses(DEVICE, dtype) == pytest.approx(losses("cpu", dtype), rel=1e-3)
