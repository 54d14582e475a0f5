"""Decides which of a rank's pieces are compressed, and builds the objects that do it."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from infra.seeds import derive
from model.transformer import ParameterTag
from train.config_compression import CompressionSection, check_rank
from train.engines.zero.compression.buffers import ErrorBuffers
from train.engines.zero.compression.exchange import Exchange
from train.engines.zero.compression.fragments import block_of
from train.engines.zero.compression.state import Compression, speaks_for_all
from train.engines.zero.compression.update import Member
from train.engines.zero.shards import Piece
from train.engines.zero.topology import NodeTopology

log = logging.getLogger(__name__)


def slots_of(tags: Mapping[str, ParameterTag]) -> int:
    """Number of slots: one for each resblock, and one for all parameters outside resblocks."""
    return len({tag.resblock for tag in tags.values()} - {None}) + 1


def members_of(
    names: Sequence[str], pieces: Mapping[str, Piece], widths: Mapping[str, int], tags: Mapping[str, ParameterTag], rank: int, seed: int
) -> list[Member]:
    """The pieces in the order of the gradients, each with the block of it that is compressed.

    Args:
        widths: number of columns of every matrix.
        rank: total rank; 0: nothing is compressed.
        seed: seed of the run.
    """
    outside = slots_of(tags) - 1
    found = []
    for name in names:
        tag, piece = tags[name], pieces[name]
        block = block_of(piece.offset, piece.length, piece.total, widths[name], rank) if rank and tag.is_block_matrix else None
        first = 0 if block is None else piece.offset + block.start
        found.append(Member(name, outside if tag.resblock is None else tag.resblock, block, derive(seed, "compression", name, first)))
    return found


def build(
    section: CompressionSection,
    names: Sequence[str],
    pieces: Sequence[Piece],
    widths: Mapping[str, int],
    tags: Mapping[str, ParameterTag],
    topology: NodeTopology | None,
    devices: tuple[torch.device, torch.device],
    seed: int,
    *,
    again: bool = False,
) -> Compression:
    """Build the compression of a rank's pieces. If it is off, or there is only one machine, the result just adds errors from a checkpoint to a gradient. Collective.

    Args:
        devices: device of the gradients, and device of messages.
        again: it was built before in this process, which said what is compressed.

    Raises:
        ConfigError: the compression rank does not divide over the processes of a machine.
    """
    nodes, node, processes = (1, 0, 1) if topology is None else (topology.nodes, topology.node, topology.node_size)
    is_on = section.method == "powersgd" and nodes > 1
    check_rank(section, nodes, processes)
    if section.method == "powersgd" and nodes == 1 and not again and speaks_for_all():
        log.info("compression is off: there is one machine, so nothing is sent between machines")
    by_name = {piece.name: piece for piece in pieces}
    members = members_of(names, by_name, widths, tags, section.rank if is_on else 0, seed)
    held = [by_name[member.name] for member in members if tags[member.name].is_block_matrix]
    exchange = Exchange(None if topology is None else topology.between, nodes, section.wire, devices[1])
    layout = _layout(members, by_name, topology) if is_on else ""
    if is_on and speaks_for_all():
        compressed = sum(member.block.elements for member in members if member.block is not None)
        share = compressed / sum(piece.length for piece in pieces)
        log.info("compression: rank %d between %d machines, for %.0f %% of the elements of rank 0's gradients", section.rank, nodes, 100 * share)
    return Compression(section, members, ErrorBuffers(held, section.rest, devices[0]), exchange, node=node, slots=slots_of(tags), layout=layout)


def _layout(members: Sequence[Member], pieces: Mapping[str, Piece], topology: NodeTopology | None) -> str:
    """A hash of what all ranks of a machine compress; it differs for other ZeRO stages, compression ranks and numbers of processes."""
    mine: Any = [(m.name, pieces[m.name].offset, m.block.start, m.block.rows, m.block.rank) for m in members if m.block is not None]
    every: list[Any] = [mine]
    if topology is not None and topology.node_size > 1:
        every = [None] * topology.node_size
        dist.all_gather_object(every, mine, group=topology.within)
    if not any(every) and speaks_for_all():
        log.warning("compression: the factors would be no smaller than the gradients; a lower compression.rank compresses")
    return hashlib.sha256(repr(every).encode()).hexdigest()[:16]
