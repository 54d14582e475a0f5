"""`plan` counts evaluation during training, whose forward passes are those of real runs, and says where it is what takes most; and bf16 copies at the heads.
About 8 s."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from model.config import StreamShape, TransformerConfig
from model.transformer import Transformer
from train.bench.memory import build, train_peak
from train.config import load_run
from train.machine.live_bytes import LiveBytes
from train.planning import activations, estimate
from train.planning.estimate import Setting
from train.planning.states import Cluster
from train.verbs import plan

SMALL = StreamShape(text_tokens=32, text_vocab=300, grid=8, image_vocab=200)
NARROW = TransformerConfig(layers=4, width=128, heads=4)


def forward_peak(model: Transformer, batch: int) -> int:
    """Bytes of a forward pass without a backward pass to come, at most, beyond what was alive before."""
    shape = model.shape
    text_BT, lengths_B = torch.zeros(batch, shape.text_tokens, dtype=torch.long), torch.full((batch,), shape.text_tokens)
    codes_BI, live = torch.zeros(batch, shape.image_tokens, dtype=torch.long), LiveBytes()
    for tensor in (*model.parameters(), *model.buffers(), text_BT, lengths_B, codes_BI):
        live.follow(tensor)
    before = live.now
    with live, torch.no_grad():
        model(text_BT, lengths_B, codes_BI)
    return live.peak - before


@pytest.mark.parametrize(("engine", "dtype"), list(itertools.product(("dense", "structured"), ("fp32", "bf16"))))
def test_a_forward_pass_of_evaluation_is_within_6_percent_of_the_bytes_of_real_runs(engine: str, dtype: str) -> None:
    wide = StreamShape(text_tokens=16, text_vocab=4000, grid=8, image_vocab=1000)
    for cfg, shape, batch in ((NARROW, SMALL, 6), (TransformerConfig(layers=2, width=64, heads=2, conv_kernel=3), wide, 64)):
        found = forward_peak(build(cfg, shape, engine, dtype, 0, "cpu"), batch)  # type: ignore[arg-type]
        run = activations.Run(cfg, shape, batch, 4 if dtype == "fp32" else 2, engine, chunk_elements=1 << 21)
        assert activations.peak_of_forward(run) == pytest.approx(found, rel=0.06)


def test_where_evaluation_is_wider_than_an_update_plan_says_so_and_offers_a_smaller_batch() -> None:
    setting = Setting.configured(load_run("12B", []), Cluster(128, 8))
    found = estimate.memory(setting)
    assert found.total == found.evaluating > found.training and "64 samples at once (evaluate.batch)" in plan.evaluating(setting)
    assert "wider than an update" in plan.evaluating(setting)
    assert "any of these would fit: evaluate.batch=32" in plan.remedies(setting, found.evaluating - 1e9)
    less = Setting.configured(load_run("12B", ["evaluate.batch=8"]), Cluster(128, 8))
    assert estimate.memory(less).total == estimate.memory(less).training < found.training + 1
    assert "an update is wider" in plan.evaluating(less) and "evaluate.batch" not in plan.remedies(less, found.training - 1e9)


def test_bf16_copies_at_the_heads_are_counted() -> None:
    """A CPU's product before it is added takes half of a GPU's, for which the plan is made."""
    shape = StreamShape(text_tokens=16, text_vocab=4000, grid=8, image_vocab=1000)
    for every in (0, 1):
        model = build(NARROW, shape, "structured", "bf16", every, "cpu", "bf16")
        train_peak(model, 8, "cpu")
        peak = train_peak(model, 8, "cpu")[1]
        run = activations.Run(NARROW, shape, 8, 2, "structured", every, chunk_elements=1 << 21, casts_logits=True)
        assert 0.95 * peak <= activations.peak(run) <= 1.1 * peak, every
        assert activations.peak(run) > 1.1 * activations.peak(replace(run, casts_logits=False)) or not every
