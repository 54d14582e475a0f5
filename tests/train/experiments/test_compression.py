"""The experiments on compression: arms at the smallest size, what simulated machines apply, the page, the table of docs/compression.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from infra.repository import DOCS
from model.transformer import Transformer
from tests.train.engines.zero_cases import CONFIG, SHAPE
from train.experiments import compression, compression_page, compression_scale, page
from train.experiments.compression import ARMS, MAIN, Arm, Machines, gram_schmidt


def gradients(model: Transformer, machines: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()} for _ in range(machines)]


@pytest.mark.parametrize(
    "arm", [Arm(2, 0.25), Arm(2, 0.25, warm=True), Arm(4, 0.25, gram_schmidt=True), Arm(2, 0.25, refresh=2)], ids=lambda arm: arm.name
)
def test_simulated_machines_lose_nothing_and_send_what_the_fragments_say(arm: Arm) -> None:
    model = Transformer(CONFIG, SHAPE)
    machines = Machines(model, arm, 3, seed=0)
    given: dict[str, torch.Tensor] = {}
    taken: dict[str, torch.Tensor] = {}
    for _ in range(5):
        found = gradients(model, 3)
        applied = machines.summed(found)
        for name, value in applied.items():
            given[name] = given.get(name, 0.0) + sum(one[name] for one in found)
            taken[name] = taken.get(name, 0.0) + value
    owed = {shape: one.errors.sum(0) for shape, one in machines.compressors.items()}
    norm = sum(float(value.square().sum()) for value in owed.values())
    difference = sum(float((given[name] - taken[name]).square().sum()) for name in given)
    assert difference == pytest.approx(norm, rel=1e-3) and norm > 0
    assert machines.rank == 4 and machines.sent_share == pytest.approx(4 * (arm.gpus + 2) / (2 * 16 * arm.gpus))


def test_a_refreshed_q_sends_what_a_fixed_one_never_would() -> None:
    """A gradient u v' with v orthogonal to the fixed Q: P is zero, so two of four rows are sent as they are, and the others never."""
    owed = {}
    for refresh in (0, 3):
        compressor = compression.Compressor(Arm(2, 0.25, refresh=refresh), 1, 1, (4, 16, 2), seed=0)
        compressor.q0[0, -1] = 0
        gradient = torch.zeros(1, 1, 4, 16)
        gradient[..., -1] = 1
        for _ in range(3):
            compressor(gradient.clone())
        owed[refresh] = float(compressor.errors.norm() / gradient.norm())
    assert owed[0] == pytest.approx(3 / 2**0.5, rel=1e-3) and owed[3] < 1e-3


def test_the_exact_arm_is_the_sum() -> None:
    model = Transformer(CONFIG, SHAPE)
    found = gradients(model, 2)
    machines = Machines(model, Arm(), 2, seed=0)
    assert all(torch.equal(value, found[0][name] + found[1][name]) for name, value in machines.summed(found).items()) and machines.sent_share == 1.0


def test_what_is_owed_is_counted_of_the_sums_before_an_update() -> None:
    model = Transformer(CONFIG, SHAPE)
    found = gradients(model, 2)
    machines = Machines(model, Arm(2, 0.25), 2, seed=0)
    assert machines.owed() == 0.0
    for _ in range(compression._OWED_EVERY - 1):
        machines.summed(found)
    before = [one.errors.sum(0).clone() for one in machines.compressors.values()]
    machines.summed(found)
    after = [one.errors.sum(0) for one in machines.compressors.values()]
    asked = sum(one.asked for one in machines.compressors.values())
    assert machines.owed() == pytest.approx((sum(float(one.square().sum()) for one in before) / asked) ** 0.5, rel=1e-5) and asked > 0
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_gram_schmidt_loses_what_householder_keeps() -> None:
    p = torch.randn(1, 32, 1, generator=torch.Generator().manual_seed(0)) + 1e-4 * torch.randn(1, 32, 6, generator=torch.Generator().manual_seed(1))

    def lost(columns: torch.Tensor) -> float:
        return float((columns.mT @ columns - torch.eye(6)).abs().max())

    assert lost(compression.low_rank.orthonormal(p)) < 1e-5 < 1e-3 < lost(gram_schmidt(p))


def run_of(arm: Arm, seed: int, end: float) -> dict[str, Any]:
    rank = round(arm.share * 128)
    return {
        "arm": arm.name,
        "gpus": arm.gpus,
        "rank": rank,
        "seed": seed,
        "sent_share": 0.25,
        "tenths": [5.0, end],
        "owed": [9.0, 3.0],
        "seconds": 10.0,
        "compressing_s": 1.0,
    }


def test_the_page_says_which_rank_is_as_good_as_exact(tmp_path: Path) -> None:
    runs = [run_of(arm, seed, 4.0 + (0.005 if arm.share == MAIN else 0.1 if arm.share else 0.0)) for arm in ARMS for seed in (0, 1)]
    settings = {"width": 128, "machines": 2, "updates": 10}
    (tmp_path / "x.json").write_text(
        json.dumps({"kind": "compression", "name": "x", "settings": settings, "runs": runs, "producer": {"commit": "c" * 40}})
    )
    rows: list[dict[str, Any]] = [
        {"way": way, "mbit_s": rate, "update_s": seconds, "exchange_s": seconds / 2, "cable_bytes": 1e6, "counted_bytes": counted, "passes_s": 0.1}
        for way, counted, all_seconds in (("exact", None, (2.0, 0.2)), ("low", 9e5, (1.0, 0.3)))
        for rate, seconds in zip((100, 0), all_seconds, strict=True)
    ]
    network = {"kind": "compression-network", "settings": {"width": 1}, "rows": rows, "producer": {"commit": "d" * 40}}
    (tmp_path / "y.json").write_text(json.dumps(network))
    said = page.render(tmp_path)
    assert "m = 2: the smallest rank within 0.01 nats of exact in every tenth is 32" in said and "m = 8: the smallest rank" in said
    assert "| m 2, r/d 0.25 | 32 | 0.250 | 0.250 | 4.0050 | +0.0050 ± 0.0000 | +0.0050 | 3.0 | 10.0% | 2 |" in said
    assert "low is faster than exact up to 100 Mbit/s, and not without a bound" in said
    again = [row | {"update_s": row["update_s"] - 2.0 * (row["way"] == "low" and not row["mbit_s"])} for row in rows]
    assert compression_page.crossover(again) == "low is faster than exact at any rate."
    noisy = [
        {"way": way, "mbit_s": rate, "update_s": seconds}
        for way, all_seconds in (("exact", (2, 1, 1)), ("low", (3, 2, 0)))
        for rate, seconds in zip((100, 200, 0), all_seconds, strict=True)
    ]
    assert compression_page.crossover(noisy) == "low is not faster than exact from 100 Mbit/s on."
    assert compression_page.verdict([]) == "No compressed arm is here yet."


def test_the_table_of_many_machines_is_what_its_command_prints() -> None:
    assert compression_scale.table() in (DOCS / "compression.md").read_text()
