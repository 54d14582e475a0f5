"""Muon's updates of block matrices, of which ZeRO leaves each rank a part: every matrix goes to one rank, its owner, and its update comes back
(train/optimizer/muon_schedule.py).

A matrix is computed once, from the same numbers however many ranks share it. The messages are known from the start, so no rank waits for what another decides: a
matrix that is skipped travels as zeros, and its momentum stays. Where machines are replicas they share the work, and each sends its updates to the others. With
compression between machines, which is for slow networks, each machine computes all updates, from equal sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model.transformer import ParameterTag
from train.engines.zero import internals
from train.engines.zero.shards import Piece
from train.optimizer import muon
from train.optimizer.muon_schedule import FP32, Matrix, Round, by_machine, cut, given, rounds, wire_bytes
from train.optimizer.protocol import ShardGroup
from train.weights.fragments import full_shape


def matrices_of(optimizer: Any, stage: int, module: nn.Module, tags: Mapping[str, ParameterTag], ranks: int) -> list[Matrix]:
    """All block matrices, with the pieces of every rank: ZeRO's arithmetic, of which each rank knows all that it needs."""
    names = {id(p): name for name, p in module.named_parameters()}
    found = []
    for group, flat in zip(optimizer.fp16_groups if stage == 3 else optimizer.bit16_groups, internals.masters(optimizer, stage), strict=True):
        start = 0
        for p in group:
            name, shape = names[id(p)], full_shape(p)
            elements = getattr(p, "ds_numel", p.numel())
            if tags[name].is_block_matrix:
                held = cut(elements, 0, p.partition_numel(), ranks) if stage == 3 else cut(elements, start, flat.numel(), ranks)
                found.append(Matrix(name, shape[0], shape[1], held))
            start += elements
    return found


@dataclass(frozen=True)
class _Whole:
    """A matrix that this rank computes: its shape, and for each piece where it stands in the message and in the matrix, and its length."""

    rows: int
    columns: int
    parts: list[tuple[int, int, int]]


@dataclass(frozen=True)
class Ranks:
    """The processes that share the work."""

    count: int
    """Those that shard together."""
    rank: int
    """This one's number among them."""
    group: Any = None
    """Their group; None: all processes."""
    machines: int = 1
    """Replicas that share the work."""
    machine: int = 0
    """This one's number among them."""
    between: Any = None
    """Group of the processes with the same shard, one of each machine."""


class _Messages:
    """The layout of the two messages of a machine's part of a round, which is the same both ways."""

    def __init__(self, dealt: Round, rank: int) -> None:
        ranks, self.is_idle = range(len(dealt)), not any(dealt)
        self.out, self.back = [given(dealt, rank, owner) for owner in ranks], [given(dealt, other, rank) for other in ranks]
        """Elements that go to each rank, and come from it; on the way back it is the other way round."""
        self.pieces: list[tuple[str, int, int]] = []
        """This rank's pieces: the matrix, first element in the message, and length."""
        start = 0
        for matrix in (matrix for owner in ranks for matrix in dealt[owner]):
            if length := matrix.held[rank][1]:
                self.pieces.append((matrix.name, start, length))
                start += length
        self.wholes = [_Whole(matrix.rows, matrix.columns, []) for matrix in dealt[rank]]
        start = 0
        for other in ranks:
            for matrix, whole in zip(dealt[rank], self.wholes, strict=True):
                offset, length = matrix.held[other]
                if length:
                    whole.parts.append((start, offset, length))
                    start += length


class WholeMatrices:
    """Replaces the gradients of this rank's pieces of block matrices by updates."""

    def __init__(
        self, rule: muon.Muon, matrices: Sequence[Matrix], pieces: Sequence[Piece], names: Sequence[str], precision: str, ranks: Ranks
    ) -> None:
        """
        Args:
            pieces: this rank's pieces of all parameters.
            names: the parameters of the gradients, in their order.
            precision: of the resblocks.
        """
        self._rule, self._ranks = rule, ranks
        self.dtype = torch.float32 if wire_bytes(precision) == FP32 else torch.bfloat16
        by_name, place = {piece.name: piece for piece in pieces}, {name: index for index, name in enumerate(names)}
        mine = {matrix.name: matrix.held[ranks.rank] for matrix in matrices}
        held = {name: (by_name[name].offset, by_name[name].length) for name in mine if name in by_name}
        assert held == {name: piece for name, piece in mine.items() if piece[1]}, "ZeRO cuts matrices otherwise than by our arithmetic"
        self._held = {name: (place[name], by_name[name]) for name in held}
        dealt = rounds(matrices, ranks.count, self.dtype.itemsize, ranks.machines)
        self._rounds = [[_Messages(part, ranks.rank) for part in by_machine(each, ranks.count)] for each in dealt]

    @torch.no_grad()
    def replace(self, gradients: Sequence[Tensor], masters: Sequence[Tensor], group_of: Callable[[int], ShardGroup]) -> None:
        """Move the momenta on, and write the updates in place of the gradients. Collective; in groups whose ``skip`` is set nothing changes.

        Args:
            masters: this rank's flat shards.
            group_of: the group of a flat shard, by its index.
        """
        for each in self._rounds:
            own = each[self._ranks.machine]
            message = torch.empty(sum(own.out), dtype=self.dtype, device=gradients[0].device)
            for part in each:
                self._advance(part, message if part is own else None, gradients, masters, group_of)
            if not own.is_idle:
                arrived = self._exchanged(message, own.out, own.back)
                for whole in own.wholes:
                    _compute(whole, arrived)
                message = self._exchanged(arrived, own.back, own.out, into=message)
                del arrived
            for machine, part in enumerate(each):
                updates = self._of_machine(machine, message if part is own else message.new_empty(sum(part.out)))
                for name, start, length in part.pieces:
                    at, piece = self._held[name]
                    if not group_of(piece.flat)["skip"]:
                        gradients[at].copy_(updates[start : start + length])

    def _advance(
        self, part: _Messages, message: Tensor | None, gradients: Sequence[Tensor], masters: Sequence[Tensor], group_of: Callable[[int], ShardGroup]
    ) -> None:
        """Move the momenta of these pieces on, and fill the message with directions if this machine computes them."""
        for name, start, length in part.pieces:
            at, piece = self._held[name]
            group, directions = group_of(piece.flat), None if message is None else message[start : start + length]
            if not group["skip"]:
                momentum = self._rule.moments(group, masters[piece.flat])["momentum"][piece.start : piece.start + length]
                muon.advance(gradients[at], group["factor"], momentum, self._rule.momentum, directions)
            elif directions is not None:
                directions.zero_()

    def _of_machine(self, machine: int, updates: Tensor) -> Tensor:
        """The updates that a machine has computed, of this rank's pieces: from the rank with the same shard there."""
        if self._ranks.machines > 1 and updates.numel():  # all that have the same shard know how many there are
            source = machine * self._ranks.count + self._ranks.rank
            dist.broadcast(updates.view(torch.uint8), src=source, group=self._ranks.between)
        return updates

    def _exchanged(self, message: Tensor, out: list[int], back: list[int], into: Tensor | None = None) -> Tensor:
        """What comes from the other ranks. Sent as bytes, which every backend supports."""
        if len(out) == 1:
            return message
        arrived = message.new_empty(sum(back)) if into is None else into
        size = message.itemsize
        splits = [size * count for count in back], [size * count for count in out]
        dist.all_to_all_single(arrived.view(torch.uint8), message.view(torch.uint8), *splits, group=self._ranks.group)
        return arrived


def _compute(whole: _Whole, arrived: Tensor) -> None:
    """Put a matrix together, and write its update where its pieces were."""
    direction = arrived.new_empty(whole.rows * whole.columns)
    for start, offset, length in whole.parts:
        direction[offset : offset + length] = arrived[start : start + length]
    update = muon.update_of(direction.view(whole.rows, whole.columns)).reshape(-1)
    for start, offset, length in whole.parts:
        arrived[start : start + length] = update[offset : offset + length]
