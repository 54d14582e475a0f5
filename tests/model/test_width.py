"""Step sizes by width (``dalle.base_width``): at the base nothing changes; at other widths updates change what a model computes as much as there, which the plain
step size does not (the coordinate check of Yang et al. 2022, appendix D.1)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model.attention import DenseAttention
from model.config import StreamShape, TransformerConfig
from model.offsets import Kind
from model.transformer import Transformer, parameter_tags
from model.width import WidthRatios, width_ratios
from train.config import DalleFit
from train.engines.zero.groups import make_optimizer, parameter_groups
from train.optimizer.muon import update_of

SHAPE = StreamShape(text_tokens=4, text_vocab=20, grid=4, image_vocab=16)
BASE, HEADS, LR = 64, 4, 1e-3
WIDTHS = (64, 128, 256, 512)


def batch(count: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    text_BT = torch.randint(0, SHAPE.text_vocab, (count, SHAPE.text_tokens), generator=generator)
    return text_BT, torch.full((count,), SHAPE.text_tokens), torch.randint(0, SHAPE.image_vocab, (count, SHAPE.image_tokens), generator=generator)


class Watching(DenseAttention):
    """Keeps the scores of the last call, before the softmax."""

    scores_BHSS: Tensor

    def forward(self, q_BHSK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, kind: Kind) -> Tensor:
        self.scores_BHSS = (q_BHSK @ k_BHSK.mT * q_BHSK.shape[-1] ** -0.5).detach()
        return super().forward(q_BHSK, k_BHSK, v_BHSK, kind)


def build(width: int, **options: Any) -> Transformer:
    cfg = TransformerConfig(**({"layers": 2, "width": width, "heads": HEADS, "conv_kernel": 3} | options))
    torch.manual_seed(0)
    return Transformer(cfg, SHAPE, attend=Watching(cfg, SHAPE))


def seen(model: Transformer) -> dict[str, Tensor]:
    """What the model computes along its way: states after the resblocks, scores of the last of them, logits."""
    with torch.no_grad():
        states_BSD = model.states(*batch())
        logits_BSN = model.image_unembedding(model.final_norm(states_BSD))
    (watching,) = (module for module in model.modules() if isinstance(module, Watching))
    return {"states": states_BSD, "scores": watching.scores_BHSS, "logits": logits_BSN}


def trained(model: Transformer, updates: int, optimizer: str = "paper", weight_decay: float = 0.0) -> Transformer:
    """The model after some updates, made as the engine makes them."""
    fit = DalleFit(optimizer=optimizer, weight_decay=weight_decay, clip_norm=1e9)  # type: ignore[arg-type]
    rule = make_optimizer(parameter_groups(model, parameter_tags(model), fit, by_resblock=False), fit)
    for count in range(1, updates + 1):
        model.zero_grad(set_to_none=True)
        text_nll_BT, image_nll_BI = model(*batch())
        (text_nll_BT.mean() / 8 + image_nll_BI.mean() * 7 / 8).backward()
        rule.count = count
        for group in rule.param_groups:
            group["lr"] = LR * group["step_ratio"]
            for p in group["params"] if group["orthogonal"] else ():
                p.grad = update_of(p.grad).contiguous()
        rule.step()
    return model


def changes(width: int, optimizer: str, **options: Any) -> dict[str, float]:
    """How far a few updates of the matrices that are scaled move what the model computes: the root of the mean square of the difference."""
    model = build(width, **options)
    tags, start, before = parameter_tags(model), {name: p.detach().clone() for name, p in model.named_parameters()}, seen(model)
    trained(model, 3, optimizer)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not tags[name].is_block_matrix and "unembedding" not in name:
                p.copy_(start[name])
    return {name: float((after - before[name]).square().mean().sqrt()) for name, after in seen(model).items()}


ARMS: dict[str, dict[str, Any]] = {
    "more heads": {"grow": True},
    "wider heads": {},
    "wider heads, normed": {"qk_norm": True},
    "Muon, more heads": {"grow": True, "optimizer": "muon"},
}


@pytest.mark.parametrize("arm", ARMS)
def test_updates_move_what_is_computed_as_far_at_every_width_and_farther_without(arm: str) -> None:
    options = dict(ARMS[arm])
    grows, optimizer = options.pop("grow", False), options.pop("optimizer", "paper")

    def at(width: int, **base: int) -> dict[str, float]:
        heads = width // BASE * HEADS if grows else HEADS
        return changes(width, optimizer, heads=heads, **options, **base)

    widths = WIDTHS[: 3 if optimizer == "muon" else 4]
    first, plain = at(BASE), at(widths[-1])
    scaled = [at(width, base_width=BASE, base_heads=HEADS * (not grows)) for width in widths]
    assert scaled[0] == first
    for name in ("states", "logits"):
        found = [one[name] / first[name] for one in scaled]
        assert min(found) > 0.6 and max(found) < 1.5, (name, found)
        assert plain[name] > 1.6 * first[name], (name, plain, first)
    # While queries and keys are still random to each other, wider heads bring their scores nearer to 0 (Yang et al. 2022, appendix D.2).
    found = [one["scores"] / first["scores"] for one in scaled]
    assert min(found) > (0.6 if grows else 0.25) and max(found) < 1.5, found


@pytest.mark.parametrize("options", [{}, {"qk_norm": True, "rotary_positions": True}], ids=str)
def test_at_the_base_all_is_as_without_it_bit_for_bit(options: dict[str, Any]) -> None:
    found = []
    for base in ({}, {"base_width": BASE}, {"base_width": BASE, "base_heads": HEADS}):
        model = build(BASE, **options, **base)
        groups = parameter_groups(model, parameter_tags(model), DalleFit(), by_resblock=False)
        assert [len(group["params"]) for group in groups] == [len(list(model.parameters())) - len(groups[1]["params"]), len(groups[1]["params"])]
        trained(model, 2, weight_decay=0.1)
        found.append((model.state_dict(), seen(model)))
    for states, computed in found[1:]:
        assert all(torch.equal(value, states[name]) for name, value in found[0][0].items())
        assert all(torch.equal(value, computed[name]) for name, value in found[0][1].items())


@pytest.mark.parametrize("qk_norm", [False, True])
def test_only_unembeddings_and_what_makes_queries_begin_otherwise(qk_norm: bool) -> None:
    plain, model = build(128, qk_norm=qk_norm), build(128, qk_norm=qk_norm, base_width=32, base_heads=4)
    changed = {
        name: float((p / plain.get_parameter(name)).detach().nanmedian())
        for name, p in model.named_parameters()
        if not p.equal(plain.get_parameter(name))
    }
    queries = {f"resblocks.{block}.{'q_norm' if qk_norm else 'q'}.weight": 0.5 for block in (0, 2)}
    assert changed == pytest.approx({"text_unembedding.weight": 0.5, "image_unembedding.weight": 0.5} | queries)
    model.load_state_dict(plain.state_dict())
    assert all(torch.equal(value, seen(plain)[name]) for name, value in seen(model).items()), "what weights compute does not depend on it"


def test_step_sizes_and_decay_by_parameter() -> None:
    for qk_norm in (False, True):
        model = build(128, qk_norm=qk_norm, base_width=32, base_heads=4)
        tags = parameter_tags(model)
        of_queries = ("q_norm.weight",) if qk_norm else ("q.weight", "q.bias")
        for name, tag in tags.items():
            inputs = 4.0 if tag.is_block_matrix or name in ("text_unembedding.weight", "image_unembedding.weight") else 1.0
            assert tag.ratios == WidthRatios(
                inputs, 0.5 if name.startswith("resblocks") and name.endswith(of_queries) and ".k" not in name else 1.0
            ), name
    for optimizer, matrix in (("paper", 0.25), ("muon", 0.5)):
        fit = DalleFit(optimizer=optimizer, weight_decay=0.1)  # type: ignore[arg-type]
        model = build(128, heads=16, base_width=32)
        groups = parameter_groups(model, parameter_tags(model), fit, by_resblock=True)
        by_parameter = {id(p): group for group in groups for p in group["params"]}
        for name, p in model.named_parameters():
            group, tag = by_parameter[id(p)], parameter_tags(model)[name]
            assert group["step_ratio"] == (matrix if tag.is_block_matrix else 0.25 if "unembedding" in name else 1.0), name
            assert group["step_ratio"] * group["weight_decay"] == pytest.approx(0.1 * tag.decays), "lr times decay is the same at every width"
    assert width_ratios(TransformerConfig(), "resblocks.0.q.weight", is_block_matrix=True) == WidthRatios()


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({"base_width": -64}, "base_width = -64, base_heads = 0: must be positive, or 0 for none"),
        ({"base_width": 64, "base_heads": -1}, "base_width = 64, base_heads = -1: must be positive"),
        ({"base_width": 2**21}, "base_width = 2097152: at most 1048576 is accepted"),
        ({"base_heads": 4}, "base_heads = 4 without base_width: set base_width"),
        ({"base_width": 48}, "base_width = 48 does not divide into heads of width / heads = 32; set base_heads to the heads of that model"),
        ({"base_width": 50, "base_heads": 4}, "base_width = 50 does not divide into base_heads = 4; nearest widths: 48, 52"),
    ],
)
def test_bases_that_are_no_model_are_refused(base: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformerConfig(layers=2, width=128, heads=4, **base)


class Scaled(torch.nn.Module):
    """A module whose result is multiplied."""

    def __init__(self, inner: torch.nn.Module, factor: float) -> None:
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, *given: Any) -> Tensor:
        result: Tensor = self.inner(*given)
        return result * self.factor


def test_it_is_the_form_with_multipliers_of_logits_and_scores() -> None:
    """Yang et al. 2022, Table 8: logits divided by the ratio of widths, scores by K in place of its root, both with the base's spread and step size."""
    ours = build(128, base_width=32, base_heads=4)
    theirs = build(128, base_width=32, base_heads=4)
    factors = {"q.": 2.0, "unembedding": 4.0}
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            p.mul_(next((factor for part, factor in factors.items() if part in name), 1.0))
    for block in (0, 2):
        theirs.resblocks[block].q = Scaled(theirs.resblocks[block].q, 1 / 2.0)  # type: ignore[union-attr, assignment]
    theirs.final_norm = Scaled(theirs.final_norm, 1 / 4.0)
    for name, value in seen(ours).items():
        torch.testing.assert_close(seen(theirs)[name], value, rtol=1e-5, atol=1e-5)
    steps = {id(p): 1 / (4 if p.ndim == 2 and name.startswith("resblocks") else 1) for name, p in theirs.named_parameters()}
    adam = torch.optim.AdamW([{"params": [p], "lr": LR * steps[id(p)]} for p in theirs.parameters()], betas=(0.9, 0.96), eps=1e-12, weight_decay=0.0)
    for _ in range(3):
        theirs.zero_grad()
        text_nll_BT, image_nll_BI = theirs(*batch())
        (text_nll_BT.mean() / 8 + image_nll_BI.mean() * 7 / 8).backward()
        adam.step()
    before, after = seen(build(128, base_width=32, base_heads=4)), seen(trained(ours, 3))
    for name, value in seen(theirs).items():
        assert (value - after[name]).norm() < 0.02 * (after[name] - before[name]).norm(), name
