"""Where each parameter is located in ZeRO's flat shards, on all three stages; and the reduced gradients of this rank.

Four words have different meanings here:

- A **flat** is DeepSpeed's tensor for a parameter group (stages 1 and 2) or a sub-group of it (stage 3): all its parameters, flattened and concatenated.
- A **shard** is this rank's even slice of a flat: an fp32 tensor that holds the master weights, which the optimizer updates (``internals.masters``). A number
  called ``flat`` in this folder is an index of these shards. The ends of a shard need not coincide with those of parameters.
- A **piece** (``Piece``) is the intersection of one parameter with one shard: its range in both. A parameter may have no piece on a rank; padding is no piece.
- A **fragment** (``train.weights.fragments.Fragment``) is a piece as a checkpoint knows it: a view of the tensor, and its offset in the whole parameter. It
  contains neither flats nor ranks, so a checkpoint can be restored on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from model.transformer import ParameterTag
from train.weights.fragments import Fragment


@dataclass(frozen=True)
class Piece:
    """This rank's part of a parameter."""

    name: str
    flat: int
    """Index of the flat shard (``internals.masters``)."""
    start: int
    """First element in that shard."""
    offset: int
    """First element in the flattened parameter."""
    length: int
    total: int
    """Elements of the whole parameter."""


def pieces(optimizer: Any, stage: int, module: nn.Module, rank: int) -> list[Piece]:
    """The pieces of all parameters in this rank's shards; ``rank`` is the rank within the sharding group."""
    names = {id(p): name for name, p in module.named_parameters()}
    found = []
    if stage == 3:
        for index, group in enumerate(optimizer.fp16_groups):
            start = 0
            for p in group:
                width = p.partition_numel()
                offset = min(rank * width, p.ds_numel)
                found.append(Piece(names[id(p)], index, start, offset, min(width, p.ds_numel - offset), p.ds_numel))
                start += width
        return [piece for piece in found if piece.length > 0]
    for name, p in module.named_parameters():
        mapping: Any = p._hp_mapping  # type: ignore[attr-defined]
        if mapping is not None:
            place = mapping.hp_fragment_address
            found.append(Piece(name, mapping.param_group_index, place.start, mapping.lp_fragment_address.start, place.numel, p.numel()))
    return found


class StateViews:
    """Pieces as fragments of a rank's states (masters, moments, averages). Made once, and again only where a state has moved: a save would wait for thousands of
    them longer than for its copies."""

    def __init__(self, of: Sequence[Piece]) -> None:
        self.pieces = of
        self._viewed: list[Tensor] = []
        self._found: dict[str, Fragment] = {}

    def of(self, states: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Fragment]:
        """``kind/parameter`` -> fragment, of the states by flat and kind."""
        states_now = [tensor for kinds in states.values() for tensor in kinds.values()]
        if len(states_now) != len(self._viewed) or not all(now.is_set_to(before) for now, before in zip(states_now, self._viewed, strict=True)):
            self._viewed = states_now
            self._found = {
                f"{kind}/{piece.name}": Fragment(tensor.narrow(0, piece.start, piece.length), piece.offset, piece.total)
                for piece in self.pieces
                for kind, tensor in states[piece.flat].items()
            }
        return self._found


class GradientSlots:
    """Facts about a rank's gradients that never change. They are copied to the device once, so that reading gradients copies nothing."""

    def __init__(self, slots: list[int], count: int, lengths: list[int], is_block_matrix: list[bool], device: torch.device) -> None:
        """
        Args:
            slots: for each piece its resblock, or the last slot for parameters outside resblocks.
            count: number of slots.
            lengths: number of elements of each piece.
            is_block_matrix: for each piece whether its parameter is a matrix of a resblock.
            device: device of the gradients.
        """
        matrices = [index for index, matrix in enumerate(is_block_matrix) if matrix]
        self.is_block_matrix, self.matrices = is_block_matrix, matrices
        self._members = one_hot(torch.tensor(slots, dtype=torch.int64), count).T.double().to(device)
        self._matrix_members = self._members[:, matrices]
        self.matrix_lengths = torch.tensor([lengths[index] for index in matrices], dtype=torch.float64, device=device)

    def by_slot(self, values: Tensor, *, matrices: bool = False) -> Tensor:
        """Sum float64 values of all pieces, or of all block matrices, by slot. The order of summation is fixed; the atomic additions of ``index_add_`` on a GPU
        would make the last bits differ from run to run."""
        return ((self._matrix_members if matrices else self._members) * values).sum(1)

    def table_by_slot(self, table_PE: Tensor) -> Tensor:
        """Sum whole numbers, a row for each piece, by slot: float64, exact."""
        return self._members @ table_PE


@dataclass(frozen=True)
class Gradients:
    """This rank's reduced gradients, as pieces of parameters without padding."""

    tensors: list[Tensor]
    layout: GradientSlots


class GradientReader:
    """Finds the gradients between the backward pass and the step. Everything constant is looked up once, so that reading never waits for a GPU."""

    def __init__(self, optimizer: Any, stage: int, module: nn.Module, found: list[Piece], tags: dict[str, ParameterTag], offload: bool) -> None:
        self._optimizer, self._stage, self._offload = optimizer, stage, offload
        if offload:
            self.names = [piece.name for piece in found]
            self._places = [(piece.flat, piece.start, piece.length) for piece in found]
        else:
            names = {id(p): name for name, p in module.named_parameters()}
            lengths = {piece.name: piece.length for piece in found}
            groups = optimizer.fp16_groups if stage == 3 else optimizer.params_in_partition
            held = [(group, place, names[id(p)]) for group, members in enumerate(groups) for place, p in enumerate(members)]
            held = [entry for entry in held if entry[2] in lengths]  # on stage 3 a rank may have no part of a very small parameter
            self.names = [name for _, _, name in held]
            self._places = [(group, place, lengths[name]) for group, place, name in held]
        outside = len({tag.resblock for tag in tags.values()} - {None})
        found_in = [tags[name].resblock for name in self.names]
        slots = [outside if block is None else block for block in found_in]
        device = torch.device("cpu") if offload else next(module.parameters()).device
        self._layout = GradientSlots(
            slots, outside + 1, [length for *_, length in self._places], [tags[name].is_block_matrix for name in self.names], device
        )

    def read(self) -> Gradients:
        """The gradients of this update, as views that may be changed in place."""
        optimizer = self._optimizer
        if self._offload:
            if self._stage < 3:
                optimizer._wait_for_offload_copies()
            flats = optimizer.fp32_partitioned_groups_flat if self._stage == 3 else optimizer.single_partition_of_fp32_groups
            tensors = [flats[flat].grad.narrow(0, start, length) for flat, start, length in self._places]
        else:
            averaged = optimizer.averaged_gradients
            tensors = [averaged[group][place].view(-1)[:length] for group, place, length in self._places]
        return Gradients(tensors, self._layout)
