"""The contrastive model's scale in training: never above 100 after an update, and back from there as soon as the loss asks for it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from infra.world import World
from model.clip import Clip
from model.config import ClipConfig
from train.config import ClipFit
from train.engines.replicated import ReplicatedEngine
from train.stages.clip import clip_engine

LIMIT = math.log(100)


def update(engine: ReplicatedEngine, clip: Clip, *, matching: bool) -> float:
    """One update of the scale alone, on pairs that match or that do not; the scale's logarithm after it."""
    # Close to each other, so that a scale of 100 is none too high for them.
    e_BE = F.normalize(1 + 0.1 * torch.randn(4, 16, generator=torch.Generator().manual_seed(1)), dim=1)
    other_BE = e_BE if matching else e_BE.roll(1, 0)
    engine.micro_batch(last=True)
    engine.backward(F.cross_entropy(clip.scale * e_BE @ other_BE.T, torch.arange(4)) + 0 * sum(p.sum() for p in clip.parameters()))
    assert engine.step(0.1).applied
    return float(clip.log_scale.detach())


def test_the_scale_stops_at_100_and_comes_back_in_one_update() -> None:
    torch.manual_seed(0)
    clip = Clip(ClipConfig(width=32, layers=1, heads=2, patch=4, embed=16), image_size=8, text_tokens=4, text_vocab=10)
    engine = clip_engine(clip, ClipFit(weight_decay=0.0, ema=0.5), World.single())
    with torch.no_grad():
        clip.log_scale.fill_(LIMIT - 0.05)
    reached = [update(engine, clip, matching=True) for _ in range(3)]
    assert reached == pytest.approx([LIMIT] * 3, abs=1e-6)
    assert float(engine.average.values["clip.log_scale"]) <= LIMIT + 1e-6, "the average never sees what lay beyond"
    with torch.no_grad():
        clip.log_scale.fill_(LIMIT)
    fallen = [update(engine, clip, matching=False) for _ in range(6)]
    assert fallen[-1] < LIMIT - 0.1
