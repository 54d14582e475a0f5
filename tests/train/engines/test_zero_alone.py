"""ZeRO in one process, which is soon started: what of test_zero.py needs no second rank. About 10 s; .ci/mutants.py runs it first."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from infra.world import World
from tests.support.ranks import run_in_ranks
from tests.train.engines.zero_cases import Case, backward, make_engine, updates
from tests.train.engines.zero_checkpoints import save_and_go_on
from tests.train.engines.zero_runs import compare, inject

TOLERANCE = {"fp32": 2e-6, "fp16": 4e-3}
COMPARED = [
    Case(stage=2, precision="fp16", accumulation=2, constant=2),
    Case(stage=1, accumulation=2),
    Case(stage=1, precision="fp16", accumulation=3),
    Case(stage=1, precision="fp16", accumulation=2, offload=True),
    Case(stage=3, precision="fp16", weights="cast", scope="global"),
    Case(stage=2, precision="fp16", scope="none", offload=True),
]
SAVED = Case(stage=3, precision="fp16", moments="16-bit")
SKIPPED = [Case(stage=2, precision="fp16"), Case(stage=2, precision="fp16", skip="resblock")]


def numerics(world: World) -> list[dict[str, float]]:
    """Series of the first two updates, each of two micro-batches, of which the second is measured."""
    engine = make_engine(Case(stage=2, precision="fp16", accumulation=2), world)
    out = []
    for step in range(2):
        backward(engine, world, step, 2)
        out.append(engine.step(1e-2).numerics)
    return out


def outside(world: World) -> dict[str, Any]:
    """An update with an infinity outside of the resblocks, and one with an infinity in one of them."""
    engine = make_engine(Case(stage=2, precision="fp16", skip="resblock"), world)
    updates(engine, world, 0, 1)
    before, scales = [flat.clone() for flat in engine._masters()], engine.scales.values()
    hook = engine.module.final_norm.weight.register_hook(lambda grad: torch.full_like(grad, float("inf")))
    backward(engine, world, 1, 1)
    hook.remove()
    update = engine.step(1e-2)
    same = all(torch.equal(flat, old) for flat, old in zip(engine._masters(), before, strict=True))
    grown = [new / old for new, old in zip(engine.scales.values(), scales, strict=True)]
    facts = {"applied": update.applied, "overflow": update.overflow, "norm": update.grad_norm, "same": same, "grown": grown, "state": engine.state()}
    hook = next(engine.module.resblocks[1].parameters()).register_hook(lambda grad: torch.full_like(grad, float("inf")))
    backward(engine, world, 2, 1)
    hook.remove()
    return facts | {"inside": engine.step(1e-2).overflow}


def halves(world: World, stage: int, overlap: bool) -> float:
    """Of 24 micro-batches with fp16 weights: how far the gradient that is reduced lies from the exact sum, in halves of fp16's last place."""
    engine = make_engine(Case(stage=stage, precision="fp16", accumulation=24, overlap=overlap), world)
    exact: dict[str, torch.Tensor] = {}

    def note(name: str, gradient: torch.Tensor) -> None:
        exact[name] = exact.get(name, 0.0) + gradient.double().flatten()

    for name, p in engine.module.named_parameters():
        if p.dtype == torch.float16:
            p.register_hook(partial(note, name))
    backward(engine, world, 0, 24)
    found = engine.gradients.read()
    sums = {name: tensor.double().flatten() for name, tensor in zip(engine.gradients.names, found.tensors, strict=True)}
    assert len(exact) > 8 and exact.keys() <= sums.keys()
    return max(float(((sums[name] - wanted).abs() / (wanted.abs() * 2**-11 + 2**-25)).max()) for name, wanted in exact.items())


def alone(world: World, folder: str) -> dict[str, Any]:
    return {
        "compared": {str(case): compare(world, case) for case in COMPARED},
        "skipped": [inject(world, case) for case in SKIPPED],
        "numerics": numerics(world),
        "outside": outside(world),
        "halves": {(stage, overlap): halves(world, stage, overlap) for stage, overlap in ((1, False), (1, True), (2, False), (3, False))},
        "saved": save_and_go_on(make_engine(SAVED, world), SAVED, folder, world),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_in_ranks(alone, 1, str(tmp_path_factory.mktemp("alone")))[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("case", COMPARED, ids=str)
def test_gradients_and_losses_of_one_process_are_those_of_fp32(found: dict[str, Any], case: Case) -> None:
    figures, bound = found["compared"][str(case)], TOLERANCE[case.precision]
    assert figures["applied"] and figures["clipped"], figures
    assert max(figures[name] for name in ("loss", "gradient", "norm", "moment")) < bound, figures


def test_micro_batches_of_fp16_weights_add_up_in_fp32_and_are_rounded_once(found: dict[str, Any]) -> None:
    assert len(found["halves"]) == 4 and max(found["halves"].values()) <= 1.01, found["halves"]


def test_an_overflow_in_one_resblock_skips_the_update_or_that_resblock_as_configured(found: dict[str, Any]) -> None:
    whole, part = found["skipped"]
    assert not whole["applied"] and whole["changed"] == [] and whole["count"] == 2 and whole["overflows"] == [0, 1, 0, 0]
    moved = {name.split(".")[1] for name in part["changed"] if name.startswith(("model/resblocks", "optimizer"))}
    assert part["applied"] and part["count"] == 3 and {"0", "2"} <= moved and "1" not in moved
    for each in (whole, part):
        assert each["ratios"][1] < 1 < each["ratios"][0] and all(applied for *_, applied in each["history"])


def test_an_overflow_outside_of_the_resblocks_skips_every_group_and_lowers_no_scale(found: dict[str, Any]) -> None:
    outside = found["outside"]
    assert not outside["applied"] and not outside["overflow"] and outside["norm"] == float("inf") and outside["same"]
    assert min(outside["grown"]) > 1 and outside["state"]["attempts"] == 2
    assert outside["inside"], "one inside of a resblock is an overflow of its scale"


def test_numerics_are_of_every_resblock_and_of_every_second_update(found: dict[str, Any]) -> None:
    first, second = found["numerics"]
    kinds = ("grad_norm", "zero_share", "subnormal_share", "scale", "overflows")
    names = ("000-attention", "001-mlp", "002-attention", "003-mlp")
    assert first == {} and set(second) == {f"{kind}/{name}" for kind in kinds for name in names}
    for name in names:
        assert second[f"grad_norm/{name}"] > 0 and 0 <= second[f"zero_share/{name}"] < 1 and 0 <= second[f"subnormal_share/{name}"] < 1
        assert second[f"scale/{name}"] == pytest.approx(2 * 2**13 * 2 ** (1 / 1000)) and second[f"overflows/{name}"] == 0


def test_a_run_goes_on_from_its_checkpoint_bit_for_bit(found: dict[str, Any]) -> None:
    assert len(found["saved"]["again"]) == 20 and found["saved"]["again"] == found["saved"]["losses"]
