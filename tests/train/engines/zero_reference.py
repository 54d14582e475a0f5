"""ZeRO's first update beside the gradients of fp32 in one process. What needs a GPU (test_gpu_zero.py) imports it too, so it needs DeepSpeed, pydantic and numpy alone."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from infra.world import World
from tests.train.engines.zero_cases import Case, backward, make_engine, reference_gradients, true_gradients, updates
from tests.train.engines.zero_checkpoints import gathered

CLIP = 0.25
"""Small enough to clip."""
TOLERANCE = {"fp32": 2e-6, "bf16": 2e-2, "fp16": 4e-3}
"""Relative error of the whole gradient against fp32 in one process."""


def judge(found: dict[str, float], case: Case) -> None:
    bound = TOLERANCE[case.precision]
    assert found["applied"], (case, found)
    assert found["loss"] < bound and found["gradient"] < bound and found["norm"] < bound, (case, found)
    assert found["clipped"] and found["moment"] < bound, (case, found)


def compare(world: World, case: Case, device: str = "cpu") -> dict[str, float]:
    """Gradient, loss and mean moment of the first update against the reference: the moment is what AdamW was given, so it shows factors and clipping."""
    engine = make_engine(case, world, device=device, clip_norm=CLIP)
    if engine.scales is not None and case.scope == "resblock":
        engine.scales.exponents = [exponent - index for index, exponent in enumerate(engine.scales.exponents)]  # so that no two slots are alike
        engine._publish_scales()
    loss = backward(engine, world, 0, case.accumulation)
    measured = engine.measure()
    assert torch.equal(engine.measure(), measured), "a second look changes no gradient"
    dist.all_reduce(measured)
    shards = true_gradients(engine)
    expected_loss, expected = reference_gradients(0, half_weights=engine.storage == "fp16", config=case.config)
    error = size = 0.0
    for name, gradient in expected.items():
        found = shards.get(name, torch.zeros_like(gradient))
        if world.size > 1:
            dist.all_reduce(found)
        found /= engine.nodes
        error, size = error + float((found - gradient).square().sum()), size + float(gradient.square().sum())
    update = engine.step(1e-2, measured.tolist())
    clip, moment = 0.1 * CLIP / math.sqrt(size), 0.0
    if case.moments == "fp32":
        moments = gathered(engine, ("optimizer/exp_avg",))
        moment = math.sqrt(
            sum(float((moments[f"optimizer/exp_avg/{name}"] / clip - gradient).square().sum()) for name, gradient in expected.items()) / size
        )
    later = updates(engine, world, 1, 4, case.accumulation)
    return {
        "loss": abs(loss / expected_loss - 1),
        "gradient": math.sqrt(error / size),
        "norm": abs(update.grad_norm / math.sqrt(size) - 1),
        "applied": float(update.applied and all(applied for *_, applied in later)),
        "clipped": float(update.grad_norm > CLIP),
        "moment": moment,
    }
