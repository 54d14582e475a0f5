"""What Muon holds while matrices are whole, in one process whose messages go nowhere; and what it is refused with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from infra.config_keys import declared
from infra.errors import ConfigError
from train.config import RunConfig, load_run
from train.engines.zero.shards import Piece
from train.engines.zero.whole_matrices import Ranks, WholeMatrices
from train.machine.live_bytes import LiveBytes
from train.optimizer.muon import Muon
from train.optimizer.muon_schedule import Matrix, cut, loads, rounds


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bytes_held_are_those_of_the_schedule(monkeypatch: pytest.MonkeyPatch, precision: str, ranks: int) -> None:
    monkeypatch.setattr(dist, "all_to_all_single", lambda into, *_, **__: into.fill_(0))
    shapes = {"tall": (512, 128), "wide": (128, 512), "square": (128, 128), "another": (128, 128)}
    matrices = [Matrix(name, r, c, cut(r * c, 0, r * c // ranks, ranks)) for name, (r, c) in shapes.items()]
    held = [Piece(m.name, 0, 0, m.held[0][0], m.held[0][1], m.elements) for m in matrices]
    pieces: list[Piece] = []
    for piece in held:
        start = pieces[-1].start + pieces[-1].length if pieces else 0
        pieces.append(Piece(piece.name, 0, start, piece.offset, piece.length, piece.total))
    flat = torch.nn.Parameter(torch.zeros(sum(piece.length for piece in pieces)))
    rule = Muon([{"params": [flat], "weight_decay": 0.0, "packed": False, "orthogonal": True}], betas=(0.9, 0.96), momentum=0.95)
    group: Any = rule.param_groups[0]
    gradients = [torch.randn(piece.length) for piece in pieces]
    whole = WholeMatrices(rule, matrices, pieces, [piece.name for piece in pieces], precision, Ranks(ranks, 0))
    with LiveBytes() as live:
        for tensor in (flat, rule.moments(group, flat)["momentum"], *gradients):
            live.follow(tensor)
        before = live.now
        whole.replace(gradients, [flat], lambda _: group)
    size = 4 if precision == "fp32" else 2
    assert live.peak - before == pytest.approx(loads(rounds(matrices, ranks, size), ranks, size)[0].held, rel=0.01) and live.now == before


def test_muon_is_refused_where_a_cpu_would_multiply_its_matrices() -> None:
    with pytest.raises(ConfigError, match=r"dalle_fit\.optimizer = 'muon' multiplies whole matrices.*set it to false, or the optimizer to 'paper'"):
        load_run("tiny", ["dalle_fit.optimizer=muon", "zero.offload_optimizer=true"])


def test_a_run_keeps_its_optimizer() -> None:
    assert not {"may_change"} & {*declared(RunConfig, "dalle_fit.optimizer"), *declared(RunConfig, "dalle_fit.muon_momentum")}
