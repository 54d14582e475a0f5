"""PowerSGD on tensors in one process: the algorithm, which parts of fragments it takes, and what is sent for them."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor

from model.transformer import ParameterTag
from model.width import WidthRatios
from train.config import load_run
from train.config_compression import CompressionSection
from train.engines.zero.compression import low_rank
from train.engines.zero.compression.construction import build
from train.engines.zero.compression.exchange import WIRE_FACTOR
from train.engines.zero.compression.fragments import Block, block_of, payload_bytes, sent_bytes
from train.engines.zero.shards import Piece
from train.engines.zero.topology import NodeTopology
from train.optimizer.number_formats import SIGNED_169

MACHINES = 3


def update(errors: list[Tensor], q0: Tensor) -> tuple[Tensor, list[Tensor]]:
    """One update of all machines' errors [n, rows, cols]: what all of them apply, and the errors after it."""
    p = low_rank.orthonormal(torch.stack([low_rank.left(error, q0) for error in errors]).sum(0))
    q = torch.stack([low_rank.right(error, p) for error in errors]).sum(0)
    applied = low_rank.product(p, q)
    return applied, [error - applied / len(errors) for error in errors]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_full_rank_sends_the_sum_of_all_machines_to_rounding() -> None:
    errors = [random(2, 12, 20, seed=machine) for machine in range(MACHINES)]
    applied, left = update(errors, random(2, 20, 12, seed=9))
    total = torch.stack(errors).sum(0)
    assert (applied - total).norm() < 1e-5 * total.norm() and torch.stack(left).sum(0).norm() < 1e-5 * total.norm()


def test_what_is_applied_and_what_stays_in_the_errors_sum_to_the_gradients_over_200_updates() -> None:
    q0 = low_rank.gaussian(24, 3, seed=1)[None]
    errors = [torch.zeros(1, 16, 24) for _ in range(MACHINES)]
    given, taken = torch.zeros(1, 16, 24, dtype=torch.float64), torch.zeros(1, 16, 24, dtype=torch.float64)
    for step in range(200):
        gradients = [random(1, 16, 24, seed=step * MACHINES + machine) for machine in range(MACHINES)]
        errors = [error + gradient for error, gradient in zip(errors, gradients, strict=True)]
        before = torch.stack(errors).double().sum(0)
        applied, errors = update(errors, q0)
        after = torch.stack(errors).double().sum(0)
        assert (after - (before - applied)).norm() < 1e-5 * before.norm(), step
        given, taken = given + torch.stack(gradients).double().sum(0), taken + applied
    owed = torch.stack(errors).double().sum(0)
    assert (given - taken - owed).norm() < 1e-5 * given.norm()
    assert owed.norm() / given.norm() > 0.1, "a rank of 3 cannot have sent all"


def test_the_norm_of_q_is_that_of_the_product() -> None:
    errors = random(3, 16, 24, seed=0)
    p = low_rank.orthonormal(low_rank.left(errors, random(3, 24, 5, seed=1)))
    q = low_rank.right(errors, p)
    assert torch.allclose(q.square().sum((1, 2)), low_rank.product(p, q).square().sum((1, 2)), rtol=1e-5)


def test_sketches_tell_norms_of_sums_without_bias_also_beside_the_fixed_projection() -> None:
    flat = torch.outer(torch.arange(12.0), torch.arange(40.0))  # of rank 1, where sketches are worst
    matrices = torch.stack([random(12, 40, seed=2), flat])
    found = []
    for seed in range(400):
        probes = torch.stack([low_rank.gaussian(40, 8, seed)] * 2)
        sketches = low_rank.sketch(matrices / 3, probes) + low_rank.sketch(2 * matrices / 3, probes)  # of two machines, summed
        found.append(low_rank.squares(sketches))
    ratios = torch.stack(found) / matrices.double().square().sum((1, 2))
    assert torch.allclose(ratios.mean(0), torch.ones(2, dtype=torch.float64), atol=4 * (2 / 8 / 400) ** 0.5)
    assert 0.45 < float(ratios[:, 1].std()) < 0.55 and float(ratios[:, 0].std()) < 0.25  # sqrt(2 / k), and less with more ranks


@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
def test_what_is_sent_does_not_depend_on_the_size_of_gradients(size: float) -> None:
    p = random(1, 16, 4, seed=0)
    assert torch.allclose(low_rank.orthonormal(size * p), low_rank.orthonormal(p), atol=1e-4)


def test_columns_are_orthonormal_also_where_they_depend_on_each_other_or_are_zero() -> None:
    dependent = random(1, 16, 1, seed=0).expand(1, 16, 4).clone()
    for p in (random(1, 16, 4, seed=1), dependent, torch.zeros(1, 16, 4)):
        found = low_rank.orthonormal(p)
        assert (found.mT @ found - torch.eye(4)).abs().max() < 1e-5, p


def test_a_gradient_beside_the_fixed_projection_is_never_sent_without_refreshing_it_and_at_once_with() -> None:
    """The counterexample to convergence: u v' with v orthogonal to every column of Q0. Exactly, or rounding would find it; and u beside the first rows, which the
    multiple of the identity picks out of a P of zeros."""
    q0 = random(1, 8, 2, seed=0)
    q0[:, 0] = 0.0
    gradient = torch.zeros(1, 6, 8)
    gradient[0, 4, 0] = 1.0
    errors = [torch.zeros(1, 6, 8), torch.zeros(1, 6, 8)]
    for _ in range(100):
        errors = [error + gradient for error in errors]
        applied, errors = update(errors, q0)
        assert not applied.any()
    assert torch.equal(errors[0], 100 * gradient)
    renewed = low_rank.refreshed(torch.stack(errors).sum(0), 2)
    applied, errors = update(errors, renewed)
    assert torch.allclose(applied, 200 * gradient, atol=1e-3) and errors[0].abs().max() < 1e-3


@pytest.mark.parametrize(
    ("offset", "length", "expected"),
    [
        (0, 64, Block(0, 8, 8, 2)),
        (0, 32, Block(0, 4, 8, 1)),
        (3, 40, Block(5, 4, 8, 1)),  # rows 1 to 4 of 0.4 to 5.4
        (3, 61, Block(5, 7, 8, 1)),
        (1, 6, None),  # no whole row
        (0, 8, None),  # a row of 8 and factors of 1 + 8
    ],
)
def test_whole_rows_of_a_fragment_are_compressed_with_their_share_of_the_rank(offset: int, length: int, expected: Block | None) -> None:
    assert block_of(offset, length, total=64, width=8, rank=2) == expected


def test_nothing_is_compressed_whose_factors_are_no_smaller() -> None:
    assert block_of(0, 64, 64, 8, rank=3) is not None
    assert block_of(0, 64, 64, 8, rank=4) is None


def test_blocks_lie_down() -> None:
    assert Block(0, 12, 4, 1).is_upright and Block(0, 12, 4, 1).shape == Block(0, 4, 12, 1).shape == (4, 12, 1)


def test_messages_are_counted_as_rings_send_them() -> None:
    assert [payload_bytes(10, wire, 4) for wire in ("fp32", "bf16", "1-6-9")] == [40, 20, 24]
    assert sent_bytes(24, 4) == 36.0


def test_the_factor_of_the_wire_loses_nothing_within_its_range() -> None:
    values = torch.tensor([4092.0, -1.0, 2.0**-51, 0.0])
    assert torch.equal(SIGNED_169.decode(SIGNED_169.encode(values * WIRE_FACTOR)) / WIRE_FACTOR, values)


def test_the_configuration_says_what_compression_needs() -> None:
    with pytest.raises(Exception, match=r"method = 'powersgd' needs compression\.rank above 0"):
        load_run("tiny", ["zero.sharding=node", "compression.method=powersgd"])
    with pytest.raises(Exception, match=r"compresses between machines that hold replicas, but zero\.sharding = 'flat'; set it to 'node'"):
        load_run("tiny", ["compression.method=powersgd", "compression.rank=8"])
    assert load_run("tiny", []).compression.method == "exact"


@pytest.mark.parametrize(
    ("nodes", "said"),
    [(2, "rank 4 between 2 machines, for 80 % of the elements of rank 0's gradients"), (1, "compression is off: there is one machine")],
)
def test_a_start_says_what_is_compressed(nodes: int, said: str, caplog: pytest.LogCaptureFixture) -> None:
    topology = cast("NodeTopology", SimpleNamespace(nodes=nodes, node=0, node_size=1, between=None, within=None))
    held = [Piece("matrix", 0, 0, 0, 1024, 1024), Piece("gain", 0, 1024, 0, 256, 256)]
    ratios = WidthRatios()
    tags = {"matrix": ParameterTag(0, True, True, ratios), "gain": ParameterTag(0, False, False, ratios)}
    section, cpu = CompressionSection(method="powersgd", rank=4), torch.device("cpu")
    with caplog.at_level(logging.INFO):
        build(section, ["matrix", "gain"], held, {"matrix": 32}, tags, topology, (cpu, cpu), 0)
    assert [said in record.getMessage() for record in caplog.records] == [True]
