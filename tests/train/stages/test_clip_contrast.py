"""The contrastive model at scale: pairs told apart over a whole update and all ranks, recomputation, bf16. About 6 s, 4 of them two processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from infra.world import World
from model.clip import Clip
from model.config import ClipConfig
from tests.support.contrastive import contrastive_loss
from tests.support.ranks import run_in_ranks
from train.config import RunConfig, load_run
from train.engines.replicated import ReplicatedEngine
from train.stages.clip import clip_engine
from train.stages.clip_task import BothTowers, ClipTask

PAIRS = 8
SIZES = ClipConfig(width=32, layers=2, heads=2, patch=4, embed=16)


def model() -> Clip:
    torch.manual_seed(0)
    return Clip(SIZES, image_size=8, text_tokens=4, text_vocab=30)


def pairs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    return {
        "pixels": torch.rand(PAIRS, 3, 8, 8, generator=generator),
        "text": torch.randint(30, (PAIRS, 4), generator=generator),
        "lengths": torch.tensor([1, 2, 3, 4] * 2),
        "ids": [str(number) for number in range(PAIRS)],
    }


def parts(count: int) -> list[dict[str, Any]]:
    size = PAIRS // count
    return [{name: value[start : start + size] for name, value in pairs().items()} for start in range(0, PAIRS, size)]


def config(contrast: str = "update") -> RunConfig:
    return load_run("tiny", [f"clip_fit.batch={PAIRS}", f"clip_fit.contrast={contrast}"])


def gradients(cfg: RunConfig, batches: list[dict[str, Any]], world: World) -> tuple[float, dict[str, Tensor], ReplicatedEngine]:
    """Loss and gradients of an update on this rank's micro-batches, as the trainer computes them."""
    engine = clip_engine(model(), cfg.clip_fit, world)
    task = ClipTask(cfg, world, torch.device("cpu"), [])  # type: ignore[arg-type]
    denominators, total = task.denominators(batches), 0.0
    for place, batch in enumerate(batches):
        engine.micro_batch(last=place == len(batches) - 1)
        loss = task.loss(engine, batch, 1, {}, denominators)
        engine.backward(loss.total)
        total += float(loss.sums["loss"].detach())
    return total, {name: p.grad.clone() for name, p in engine.module.named_parameters() if p.grad is not None}, engine


def in_rank(world: World) -> tuple[float, dict[str, Tensor]]:
    mine = parts(4)[2 * world.rank : 2 * world.rank + 2]
    loss, found, _ = gradients(config(), mine, world)
    return loss, found


def whole() -> tuple[float, dict[str, Tensor]]:
    """The loss among all pairs and its gradients, by autograd alone."""
    clip, batch = BothTowers(model()), pairs()
    loss = contrastive_loss(*clip(batch["pixels"], batch["text"], batch["lengths"]))
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach()), {name: p.grad for name, p in clip.named_parameters() if p.grad is not None}


def check(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_micro_batches_of_an_update_have_the_gradient_of_all_its_pairs(count: int) -> None:
    loss, expected = whole()
    told, found, engine = gradients(config(), parts(count), World.single())
    assert told == pytest.approx(loss, rel=1e-5)
    check(found, expected)
    assert engine.step(1e-3).applied


def test_pairs_of_a_micro_batch_alone_are_another_loss() -> None:
    told, found, _ = gradients(config("micro-batch"), parts(4), World.single())
    loss, expected = whole()
    assert told < 0.7 * loss and not torch.allclose(found["clip.image_head.weight"], expected["clip.image_head.weight"], rtol=1e-2)


def test_two_ranks_with_two_micro_batches_each_have_the_gradient_of_all_pairs() -> None:
    loss, expected = whole()
    results = run_in_ranks(in_rank, 2)
    assert sum(told for told, _ in results) == pytest.approx(loss, rel=1e-5)
    for _, found in results:
        check(found, expected)


def test_recomputation_changes_no_gradient() -> None:
    clip, batch = model(), pairs()
    found = []
    for recompute in (False, True):
        if recompute:
            clip.recompute_blocks()
        clip.zero_grad()
        contrastive_loss(*BothTowers(clip)(batch["pixels"], batch["text"], batch["lengths"])).backward()  # type: ignore[no-untyped-call]
        found.append({name: p.grad.clone() for name, p in clip.named_parameters() if p.grad is not None})
    assert all(block.recompute for block in clip.image_blocks)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_bf16_rounds_the_products_and_embeddings_stay_unit_vectors_in_fp32() -> None:
    batch = pairs()
    exact, rounded = (BothTowers(model(), dtype)(batch["pixels"], batch["text"], batch["lengths"]) for dtype in (torch.float32, torch.bfloat16))
    for ours, theirs in zip(rounded[:2], exact[:2], strict=True):
        assert ours.dtype == torch.float32 and torch.allclose(ours.norm(dim=1), torch.ones(PAIRS), atol=1e-2)
        assert 0 < float((ours - theirs).abs().max().detach()) < 0.05
