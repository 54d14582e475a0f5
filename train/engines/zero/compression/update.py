"""Compression in an update, in two halves: ``exchange`` before the flags and norms of all ranks are known, ``settle`` when it is known which resblocks are updated.

Everything is computed on the device, in true units of the gradient, without waiting for it. Machines stay equal bit for bit if they compute alike, because all that
they do with P and Q starts from the same sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from infra.seeds import derive
from train.engines.zero.compression import low_rank
from train.engines.zero.compression.buffers import ErrorBuffers
from train.engines.zero.compression.exchange import Exchange
from train.engines.zero.compression.fragments import Block


@dataclass(frozen=True)
class Member:
    """A piece of a parameter, in the list of gradients."""

    name: str
    slot: int
    """Its resblock, or the last slot for parameters outside resblocks."""
    block: Block | None
    """The part of it that is compressed."""
    seed: int = 0
    """Seed of its Q0."""


@dataclass(frozen=True)
class Watched:
    """Squared norms for each member, float64, in true units; 0 for members without a block, and where one of both is not finite. Both are of sums over machines,
    estimated by sketches."""

    owed: Tensor
    """Of the errors before an update: what was asked for by earlier updates and was not sent yet."""
    asked: Tensor
    """Of the compressed parts of the update's gradients."""


_PROBES = 16
"""Vectors of a sketch: a norm of a matrix is known to a sixth at worst, and that of a resblock, of several matrices of higher rank, to some percent."""


@dataclass
class _Batch:
    """Blocks of the same resblock and shape, which are computed together."""

    places: list[int]
    """Their places in the list of members."""
    index: Tensor
    """``places`` on the device."""
    q0: Tensor
    p: Tensor = field(default_factory=lambda: torch.empty(0))
    q: Tensor = field(default_factory=lambda: torch.empty(0))


class CompressedUpdate:
    """Error buffers, Q0 and the two halves of an update."""

    def __init__(self, members: Sequence[Member], buffers: ErrorBuffers, exchange: Exchange, refresh_every: int) -> None:
        """
        Args:
            refresh_every: updates, including skipped ones, after which Q0 is computed anew from the sum of errors over machines; 0: Q0 is fixed.
        """
        self.members, self.buffers, self.wire, self.refresh_every = list(members), buffers, exchange, refresh_every
        self.watched: Watched | None = None
        """What the last ``exchange`` has estimated, if it was asked to."""
        self._tensors: list[Tensor] = []
        self._factors: list[float] = []
        self._contaminated = torch.zeros(len(self.members), dtype=torch.bool, device=buffers.device)
        places: dict[tuple[int, tuple[int, int, int]], list[int]] = {}
        for place, member in enumerate(self.members):
            if member.block is not None:
                places.setdefault((member.slot, member.block.shape), []).append(place)
        self.batches = [self._batch(found, shape) for (_, shape), found in places.items()]

    def _batch(self, places: list[int], shape: tuple[int, int, int]) -> _Batch:
        _, longer, rank = shape
        q0 = torch.stack([low_rank.gaussian(longer, rank, self.members[place].seed) for place in places])
        return _Batch(places, torch.tensor(places, device=self.buffers.device), q0.to(self.buffers.device))

    def bases(self) -> dict[str, Tensor]:
        """Q0 of each block, by the parameter's name, as views."""
        return {self.members[place].name: q0 for batch in self.batches for place, q0 in zip(batch.places, batch.q0, strict=True)}

    @torch.no_grad()
    def exchange(self, tensors: list[Tensor], factors: Sequence[float], update: int, *, watch: bool = False) -> Tensor:
        """Add the gradients to the errors, and sum factors over machines; parts that are not compressed are summed exactly, in place.

        Args:
            tensors: this rank's gradients in the order of the members, reduced within this machine. Compressed parts are not changed before ``settle``.
            factors: for each slot the factor that turns these into true gradients.
            update: number of the update, including skipped ones.
            watch: also estimate what compression owes (``watched``), which takes a small message of its own. Its bytes are not counted as those of an update.

        Returns:
            float64, for each member: the sum of squares of the summed gradient, in the units of ``tensors``; infinite if a gradient or an error is not finite.
        """
        self._tensors, self._factors = tensors, [factors[member.slot] for member in self.members]
        self.watched = self._watch(update) if watch else None
        self.wire.payload = 0
        finite = torch.ones(len(tensors), dtype=torch.bool, device=self.buffers.device)
        for place, member in enumerate(self.members):
            if member.block is not None:
                finite[place] = torch.linalg.vector_norm(tensors[place], dtype=torch.float32).isfinite()
                self._accumulate(place, member.block, finite[place])
        if self.refresh_every and update % self.refresh_every == 0:
            for batch in self.batches:
                (total,) = self.wire.sum([self._errors(batch)], wire="fp32")
                batch.q0.copy_(low_rank.refreshed(total.nan_to_num_(), batch.q0.shape[-1]))
        squares = self._exchange_factors().to(self.buffers.device)
        of_slot = torch.tensor(self._factors, dtype=torch.float64).to(squares.device, non_blocking=True)
        exact = [self._exact(place) for place in range(len(tensors))]
        parts = [part for pair in exact for part in pair if part.numel()]
        for part, total in zip(parts, self.wire.sum(parts, wire="fp32"), strict=True):
            part.copy_(total)
        for end in range(2):
            squares += torch.stack([torch.linalg.vector_norm(pair[end], dtype=torch.float32) for pair in exact]).double().square() * of_slot.square()
        squares.masked_fill_(~finite | self._contaminated, float("inf"))
        return squares / of_slot.square()

    def _watch(self, update: int) -> Watched:
        """Sketch errors and gradients, and sum the sketches over machines."""
        mine = []
        for batch in self.batches:
            members = [(self.members[place], place) for place in batch.places]
            probes = torch.stack(
                [low_rank.gaussian(batch.q0.shape[1], _PROBES, derive(member.seed, "compression", "probes", update)) for member, _ in members]
            )
            probes = probes.to(self.buffers.device, non_blocking=True)
            gradients = torch.stack(
                [_lying(self._gradient(place, member.block), member.block) for member, place in members if member.block is not None]
            )
            mine += [low_rank.sketch(self._errors(batch), probes), low_rank.sketch(gradients, probes)]
        sums = self.wire.sum(mine, wire="fp32")
        found = torch.zeros(2, len(self.members), dtype=torch.float64, device=self.buffers.device)
        for batch, owed, asked in zip(self.batches, sums[::2], sums[1::2], strict=True):
            found[:, batch.index] = torch.stack([low_rank.squares(owed), low_rank.squares(asked)])
        return Watched(*torch.where(found.isfinite().all(0), found, 0.0))

    def _gradient(self, place: int, block: Block) -> Tensor:
        """The part of a gradient that is compressed, in true units, fp32."""
        return self._tensors[place].narrow(0, block.start, block.elements).float() * self._factors[place]

    def _accumulate(self, place: int, block: Block, finite: Tensor) -> None:
        """Add a gradient to its error, unless it is not finite."""
        name, start = self.members[place].name, block.start
        gradient = self._gradient(place, block)
        self.buffers.write(name, start, self.buffers.read(name, start, block.elements) + torch.where(finite, gradient, 0.0))

    def _errors(self, batch: _Batch) -> Tensor:
        """The errors of a batch as matrices with no more rows than columns (transposed if necessary)."""
        found = []
        for place in batch.places:
            name, block = self.members[place].name, self.members[place].block
            assert block is not None
            found.append(_lying(self.buffers.read(name, block.start, block.elements), block))
        return torch.stack(found)

    def _exchange_factors(self) -> Tensor:
        """Exchange P and then Q, in one message each. Returns the squared norms of the projections in true units; P is orthonormal, so they are those of Q (paper
        E.2)."""
        squares = torch.zeros(len(self.members), dtype=torch.float64, device=self.buffers.device)
        mine = []
        for batch in self.batches:
            errors = self._errors(batch)
            self._contaminated[batch.index] = ~errors.abs().amax((1, 2)).isfinite()
            mine.append(low_rank.left(errors, batch.q0))
        for batch, p in zip(self.batches, self.wire.factors(mine), strict=True):
            batch.p = p
        self._make_orthonormal()
        mine = [low_rank.right(self._errors(batch), batch.p) for batch in self.batches]
        for batch, q in zip(self.batches, self.wire.factors(mine), strict=True):
            batch.q = q
            squares[batch.index] = q.double().square().sum((1, 2))
        return squares

    def _make_orthonormal(self) -> None:
        """Orthonormalise all P of the same shape at once, because each factorisation is small."""
        alike: dict[torch.Size, list[_Batch]] = {}
        for batch in self.batches:
            alike.setdefault(batch.p.shape[1:], []).append(batch)
        for batches in alike.values():
            whole = low_rank.orthonormal(torch.cat([batch.p for batch in batches]))
            for batch, p in zip(batches, whole.split([len(batch.places) for batch in batches]), strict=True):
                batch.p = p

    def _exact(self, place: int) -> tuple[Tensor, Tensor]:
        """The parts of a gradient before and after its block, as views; without a block, the whole gradient."""
        tensor, block = self._tensors[place], self.members[place].block
        if block is None:
            return tensor, tensor[:0]
        return tensor[: block.start], tensor[block.start + block.elements :]

    @torch.no_grad()
    def settle(self, applied: Sequence[bool]) -> None:
        """In slots that are updated, replace the gradients by the projections, and subtract these from the errors. In other slots the errors keep the gradient, which
        is sent later; an error that is not finite becomes zero.

        Args:
            applied: whether each slot is updated.
        """
        for batch in self.batches:
            if not applied[self.members[batch.places[0]].slot]:
                self._keep(batch)
                continue
            for place, found in zip(batch.places, low_rank.product(batch.p, batch.q), strict=True):
                name, block = self.members[place].name, self.members[place].block
                assert block is not None
                projection = (found.mT if block.is_upright else found).reshape(-1)
                error = self.buffers.read(name, block.start, block.elements)
                self.buffers.write(name, block.start, error - projection / self.wire.nodes)
                self._tensors[place].narrow(0, block.start, block.elements).copy_(projection / self._factors[place])
            batch.p = batch.q = torch.empty(0)
        self._tensors = []

    def _keep(self, batch: _Batch) -> None:
        for place in batch.places:
            name, block = self.members[place].name, self.members[place].block
            assert block is not None
            error = self.buffers.read(name, block.start, block.elements)
            self.buffers.write(name, block.start, torch.where(self._contaminated[place], 0.0, error))
        batch.p = batch.q = torch.empty(0)


def _lying(flat: Tensor, block: Block) -> Tensor:
    """The rows of a block as a matrix with no more rows than columns."""
    matrix = flat.view(block.rows, block.width)
    return matrix.mT if block.is_upright else matrix
