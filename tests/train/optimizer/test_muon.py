"""Muon's arithmetic against formulas in float64, and the schedule by which ranks share the work."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from train.optimizer import muon
from train.optimizer.muon import Muon, advance, orthogonalised, update_of
from train.optimizer.muon_schedule import ROUND_BYTES, Matrix, by_machine, cut, given, loads, rounds, wire_bytes
from train.optimizer.number_formats import SIGNED_169

SHAPES = [(32, 32), (16, 64), (64, 16)]


def matrix(rows: int, columns: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale


def polynomial(x: torch.Tensor) -> torch.Tensor:
    """What five steps make of singular values."""
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * x**3 + 2.0315 * x**5
    return x


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_the_iteration_is_its_polynomial_of_the_singular_values(rows: int, columns: int) -> None:
    given_ = matrix(rows, columns)
    u, s, vh = torch.linalg.svd(given_.double(), full_matrices=False)
    wanted = u @ torch.diag(polynomial(s / s.norm())) @ vh
    torch.testing.assert_close(orthogonalised(given_).double(), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e4])
def test_singular_values_above_a_hundredth_of_the_largest_become_nearly_equal_at_any_size_of_the_gradient(
    rows: int, columns: int, scale: float, dtype: torch.dtype
) -> None:
    direction = matrix(rows, columns, scale=scale)
    s = torch.linalg.svdvals(direction)
    found = torch.linalg.svdvals(update_of(direction.to(dtype)).float()) / (0.2 * math.sqrt(max(rows, columns)))
    kept = found[: int((s > s[0] / 100).sum())]
    assert len(kept) >= min(rows, columns) - 1 and kept.min() > 0.5 and kept.max() < 1.5, kept


def test_a_matrix_of_zeros_does_not_move() -> None:
    assert not update_of(torch.zeros(4, 8)).any()


@pytest.mark.parametrize("packed", [False, True])
def test_a_momentum_moves_by_the_factor_s_gradient_and_the_direction_looks_ahead(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "_CHUNK", 7)  # ends inside the vector
    gradient, momentum, direction = matrix(1, 30)[0], matrix(1, 30, seed=1)[0], torch.empty(30)
    state = SIGNED_169.encode(momentum) if packed else momentum.clone()
    before = SIGNED_169.decode(state).double() if packed else momentum.double()
    advance(gradient, 0.5, state, 0.9, direction)
    wanted = 0.9 * before + 0.1 * 0.5 * gradient.double()
    found = SIGNED_169.decode(state) if packed else state
    torch.testing.assert_close(found.double(), wanted, rtol=2**-10 if packed else 1e-5, atol=1e-6)
    torch.testing.assert_close(direction.double(), 0.9 * wanted + 0.1 * 0.5 * gradient.double(), rtol=1e-5, atol=1e-6)


def rule(**changes: Any) -> tuple[Muon, Any, torch.Tensor]:
    p = torch.nn.Parameter(torch.ones(8))
    made = Muon([{"params": [p], "weight_decay": 0.1, "packed": False, "orthogonal": True}], betas=(0.9, 0.96), momentum=0.95)
    made.param_groups[0] |= {"lr": 0.5, **changes}
    return made, made.param_groups[0], p


def test_an_update_is_subtracted_after_the_decay_and_the_copy_follows() -> None:
    made, group, p = rule()
    copy, update = torch.zeros(8, dtype=torch.float16), torch.arange(8.0)
    made.apply(group, p, [update[:3].half(), update[3:].half()], copy)
    torch.testing.assert_close(p.detach(), 0.95 - 0.5 * update)
    assert torch.equal(copy, p.detach().half())
    assert made.state_names(group) == ("momentum",) == tuple(made.moments(group, p))


def test_a_skipped_group_does_not_move_and_lengths_must_agree() -> None:
    made, group, p = rule(skip=True)
    made.apply(group, p, [torch.ones(8)])
    assert torch.equal(p.detach(), torch.ones(8))
    group["skip"] = False
    with pytest.raises(ValueError, match="7 gradients for 8 parameters"):
        made.apply(group, p, [torch.ones(7)])


# --- Who computes what ------------------------------------------------------------------------------------------------------------------


def even(name: str, rows: int, columns: int, ranks: int) -> Matrix:
    return Matrix(name, rows, columns, cut(rows * columns, 0, -(-rows * columns // ranks), ranks))


def test_pieces_are_the_parts_of_a_flat_vector() -> None:
    assert cut(10, 5, 6, 3) == ((0, 1), (1, 6), (7, 3))
    assert cut(4, 12, 6, 3) == ((0, 0), (0, 0), (0, 4))
    assert cut(5, 0, 2, 4) == ((0, 2), (2, 2), (4, 1), (5, 0))


def test_every_matrix_is_computed_once_and_ranks_compute_as_much_as_each_other() -> None:
    matrices = [even(f"{layer}.{name}", 64 * (1 + 3 * (name == "up")), 64, 4) for layer in range(6) for name in ("q", "k", "v", "up", "down")]
    dealt = rounds(matrices, 4, 2)
    assert sorted(m.name for each in dealt for owned in each for m in owned) == sorted(m.name for m in matrices)
    work = [load.operations for load in loads(dealt, 4, 2)]
    assert max(work) - min(work) <= max(m.operations for m in matrices) and sum(work) == sum(m.operations for m in matrices)


def test_a_matrix_goes_to_the_rank_that_holds_most_of_it_where_all_have_the_same_to_do() -> None:
    whole = [Matrix(name, 8, 8, tuple((0, 64 * (rank == at)) for rank in range(3))) for name, at in (("a", 2), ("b", 0), ("c", 1))]
    dealt = rounds(whole, 3, 2)
    assert [[m.name for m in owned] for owned in dealt[0]] == [["b"], ["c"], ["a"]]
    assert all(not any(load.sent) for load in loads(dealt, 3, 2))


def test_a_round_holds_a_bounded_number_of_bytes_but_always_a_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.optimizer.muon_schedule.ROUND_BYTES", 5 * 64 * 2)
    dealt = rounds([even(f"m{index}", 8, 8, 2) for index in range(21)], 2, 2)
    assert [[len(owned) for owned in each] for each in dealt] == [[5, 5], [5, 5], [1, 0]]
    assert [len(each[0]) for each in rounds([even("big", 64, 64, 1)] * 2, 1, 2)] == [1, 1] and ROUND_BYTES == 64 << 20


def test_loads_are_counted_from_the_pieces() -> None:
    dealt = rounds([even("a", 8, 4, 2), even("b", 4, 8, 2)], 2, 2)
    assert [given(dealt[0], 0, owner) for owner in range(2)] == [16, 16]
    found = loads(dealt, 2, 2)[0]
    assert found.between == 0
    assert found.sent == (0, 2 * (16 + 16)) and found.operations == 5 * (4 * 16 * 8 + 2 * 64)
    assert found.held == 2 * ((16 + 16) + 32 + (3 * 32 + 2 * 16))
    assert loads(rounds([even("a", 8, 4, 1)], 1, 2), 1, 2)[0].held == 2 * (32 + (3 * 32 + 2 * 16))
    assert (wire_bytes("fp32"), wire_bytes("bf16"), wire_bytes("fp16")) == (4, 2, 2)


def test_machines_that_are_replicas_share_the_work_and_send_each_other_what_they_computed() -> None:
    matrices = [even(f"m{index}", 8, 8, 2) for index in range(6)]
    dealt = rounds(matrices, 2, 4, machines=3)
    assert len(dealt) == 1 and [[len(owned) for owned in part] for part in by_machine(dealt[0], 2)] == [[1, 1]] * 3
    found = loads(dealt, 2, 4)
    assert len(found) == 6 and {load.operations for load in found} == {matrices[0].operations}
    assert {load.between for load in found} == {4 * 6 * 32 * 2 / 3} and {load.sent for load in found} == {(0, 256), (256, 0)}
    alone = loads(rounds(matrices, 2, 4), 2, 4)
    assert [load.operations for load in alone] == [3 * matrices[0].operations] * 2 and alone[0].between == 0
