"""Error buffers in checkpoints, and what happens to them if a run continues with another layout (docs/compression.md).

If every machine restores its own buffers, training continues bit for bit. With another number of machines, the sum of all buffers is divided evenly. Errors
that no longer belong to a compressed block (all of them, if compression is off or there is only one machine) are *pending*: they are added to the gradient of the
next update.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from train.config_compression import CompressionSection
from train.engines.zero.compression.buffers import ErrorBuffers, decoded
from train.engines.zero.compression.exchange import Exchange
from train.engines.zero.compression.update import CompressedUpdate, Member
from train.weights.fragments import Fragment

log = logging.getLogger(__name__)

PREFIX = "compression"
_SUM = "sum"


def speaks_for_all() -> bool:
    """Whether this rank is the one that says what is the same on all."""
    return not dist.is_initialized() or dist.get_rank() == 0


class Compression:
    """The compression of a run's updates, with its state."""

    def __init__(
        self, section: CompressionSection, members: Sequence[Member], buffers: ErrorBuffers, exchange: Exchange, *, node: int, slots: int, layout: str
    ) -> None:
        """
        Args:
            node: number of this machine.
            slots: number of slots: one for each resblock, and one for all other parameters.
            layout: identifies what is compressed on all ranks of a machine; empty: nothing is.
        """
        self.section, self.buffers, self.wire, self.node, self.slots, self.layout = section, buffers, exchange, node, slots, layout
        self.update = CompressedUpdate(members, buffers, exchange, section.refresh_every)
        self.members = self.update.members
        self.pending: set[int] = set()
        """Slots whose errors outside compressed blocks still have to be added to a gradient."""

    @property
    def is_active(self) -> bool:
        """Whether anything is compressed; if not, this object only adds pending errors to a gradient."""
        return bool(self.layout)

    @property
    def is_done(self) -> bool:
        return not self.is_active and not self.pending

    @torch.no_grad()
    def pay(self, tensors: list[Tensor], factors: Sequence[float]) -> None:
        """Add pending errors to this machine's gradients, before these are summed over machines."""
        for tensor, member in zip(tensors, self.members, strict=True):
            if member.slot in self.pending and member.name in self.buffers.tensors:
                for start, length in _outside(member, tensor.numel()):
                    tensor.narrow(0, start, length).add_(self.buffers.read(member.name, start, length) / factors[member.slot])

    def settle(self, applied: Sequence[bool]) -> None:
        """See ``CompressedUpdate.settle``. Errors that were pending in updated slots are now paid, and set to zero."""
        if self.is_active:
            self.update.settle(applied)
        for member in self.members:
            if member.slot in self.pending and applied[member.slot] and member.name in self.buffers.tensors:
                buffer = self.buffers.tensors[member.name]
                for start, length in _outside(member, buffer.numel()):
                    buffer.narrow(0, start, length).zero_()
        self.pending -= {slot for slot, was_applied in enumerate(applied) if was_applied}

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores besides tensors; the same on all ranks."""
        kept = self.section.error_buffers
        rest = "fp32" if kept == _SUM else self.buffers.rest
        facts = {"nodes": self.wire.nodes, "error_buffers": kept, "rest": rest, "layout": self.layout, "pending": sorted(self.pending)}
        return facts | {"basis": self.section.refresh_every > 0 and self.is_active}

    def fragments(self) -> dict[str, Fragment]:
        """What this rank has to save: its machine's own buffers, or, on the first machine, the sum over all machines; and Q0, if it changes. Collective."""
        found: dict[str, Fragment] = {}
        if self.section.error_buffers == "own":
            found |= self.buffers.fragments(f"{PREFIX}/error/{self.node}", self.buffers.tensors)
        else:
            total = {name: decoded(tensor).clone() for name, tensor in self.buffers.tensors.items()}
            if self.wire.nodes > 1:
                total = {name: self.wire.sum([tensor], wire="fp32")[0] for name, tensor in total.items()}
            found |= self.buffers.fragments(f"{PREFIX}/error/{_SUM}", total) if not self.node else {}
        return found | (self._bases() if not self.node and self.state()["basis"] else {})

    def _bases(self) -> dict[str, Fragment]:
        places = self.buffers.pieces
        views = {f"{PREFIX}/basis/{name}@{places[name].offset}": q0.view(-1) for name, q0 in self.update.bases().items()}
        return {name: Fragment(view, 0, view.numel()) for name, view in views.items()}

    def restored(self, stored: dict[str, Any] | None) -> Iterator[dict[str, Fragment]]:
        """Restore from a checkpoint with this ``state``. Yields groups of fragments, which the caller fills one after the other; equally many on every rank."""
        self.buffers.tensors = self.buffers.empty(self.buffers.rest)
        self.pending = set()
        if stored is None:
            if speaks_for_all():
                log.warning("compression: the checkpoint holds no error buffers; they start at zero")
            return
        is_own = stored["error_buffers"] == "own"
        alike = is_own and stored["nodes"] == self.wire.nodes
        kept = [str(self.node)] if alike else [str(node) for node in range(stored["nodes"])] if is_own else [_SUM]
        total = self.buffers.empty("fp32")
        for source in kept:
            held = self.buffers.empty(stored["rest"])
            yield self.buffers.fragments(f"{PREFIX}/error/{source}", held)
            for name, tensor in held.items():
                total[name] += decoded(tensor)
        for name, tensor in total.items():
            self.buffers.write(name, 0, tensor if alike else tensor / self.wire.nodes)
        if stored["layout"] == self.layout:
            self.pending = set(stored["pending"])
        else:
            self.pending = set(range(self.slots))  # all slots, so that it is the same on all ranks
        if stored["basis"] and stored["layout"] == self.layout and self.section.refresh_every:
            yield self._bases()
        self._say(stored, alike)

    def _say(self, stored: dict[str, Any], alike: bool) -> None:
        if not speaks_for_all():
            return
        whose = f"error buffers of {stored['nodes']} machines" if stored["nodes"] > 1 else "error buffers of one machine"
        if not self.is_active:
            log.warning("compression is off: the %s are added to the next update, once", whose)
        elif not alike:
            log.warning("compression: the sum of the %s is divided over %d", whose, self.wire.nodes)
        if self.is_active and self.pending:
            log.warning("compression: other parts of the matrices are compressed than before; what the others owe is added to the next update")


def _outside(member: Member, length: int) -> list[tuple[int, int]]:
    """Start and length of the ranges of a piece that are not compressed."""
    if member.block is None:
        return [(0, length)]
    end = member.block.start + member.block.elements
    return [(start, size) for start, size in ((0, member.block.start), (end, length - end)) if size]
