"""Which rank orthogonalises which matrix, and in which round; what that sends, holds and computes. No torch, because ``plan`` counts with the rules of the engine.

ZeRO cuts matrices anywhere, so each is brought to one rank, its owner, and what comes of it is brought back (train/engines/zero/whole_matrices.py). All ranks
compute at the same time: a round has matrices of every owner, and one message each way.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest

STEPS = 5
"""Steps of the Newton-Schulz iteration."""
ROUND_BYTES = 64 << 20
"""Matrices that an owner takes in a round: at most so many bytes as they travel, but at least one matrix."""
FP32, BF16 = 4, 2


def wire_bytes(precision: str) -> int:
    """Bytes of an element on the wire, and in the iteration: fp32 where the resblocks compute in fp32, bf16 otherwise."""
    return FP32 if precision == "fp32" else BF16


@dataclass(frozen=True)
class Matrix:
    """A block matrix, and which part of it each rank of the sharding group holds."""

    name: str
    rows: int
    columns: int
    held: tuple[tuple[int, int], ...]
    """For each rank first element and length of its piece of the flattened matrix; length 0: it has none."""

    @property
    def elements(self) -> int:
        return self.rows * self.columns

    @property
    def operations(self) -> int:
        """Floating-point operations of the iteration: three products a step, with no more rows than columns."""
        short, long = sorted((self.rows, self.columns))
        return STEPS * (4 * short * short * long + 2 * short**3)

    @property
    def working(self) -> int:
        """Most elements that the iteration holds at once: the matrix as it came, was and becomes, and two products of the shorter side."""
        short, long = sorted((self.rows, self.columns))
        return 3 * short * long + 2 * short * short


Round = tuple[tuple[Matrix, ...], ...]
"""For each rank the matrices that it computes."""


def cut(elements: int, start: int, share: int, ranks: int) -> tuple[tuple[int, int], ...]:
    """The pieces of a parameter that begins at ``start`` of a flat vector of which each rank has ``share`` elements: first element and length for each rank."""
    ends = [min(max(rank * share - start, 0), elements) for rank in range(ranks + 1)]
    return tuple((first, last - first) for first, last in pairwise(ends))


def rounds(matrices: Iterable[Matrix], ranks: int, element_bytes: int) -> list[Round]:
    """Deal matrices to owners and rounds, from names and shapes alone: the largest first, each to the rank with the least to compute, and of several such to the
    one that holds most of it."""
    load, owned = [0] * ranks, [[] for _ in range(ranks)]  # type: ignore[var-annotated]
    for matrix in sorted(matrices, key=lambda m: (-m.operations, m.name)):
        owner = min(range(ranks), key=lambda rank: (load[rank], -matrix.held[rank][1]))
        load[owner] += matrix.operations
        owned[owner].append(matrix)
    return list(zip_longest(*(_batches(each, ROUND_BYTES // element_bytes) for each in owned), fillvalue=()))


def _batches(matrices: Sequence[Matrix], most: int) -> list[tuple[Matrix, ...]]:
    found: list[list[Matrix]] = []
    for matrix in matrices:
        if not found or sum(m.elements for m in found[-1]) + matrix.elements > most:
            found.append([])
        found[-1].append(matrix)
    return [tuple(batch) for batch in found]


def given(dealt: Round, rank: int, owner: int) -> int:
    """Elements of a round that a rank brings to an owner, and gets back from it."""
    return sum(matrix.held[rank][1] for matrix in dealt[owner])


@dataclass(frozen=True)
class Load:
    """What an update of the matrices takes on one rank."""

    sent: tuple[int, ...]
    """Bytes to each rank of the sharding group, both ways together; none to itself."""
    held: int
    """Bytes of messages and matrices at once, at most."""
    operations: int


def load_of(dealt: Sequence[Round], rank: int, element_bytes: int) -> Load:
    """What these rounds take on a rank."""
    sent, held, operations = [0] * (len(dealt[0]) if dealt else 1), 0, 0
    for each in dealt:
        for other in range(len(each)):
            if other != rank:
                sent[other] += element_bytes * (given(each, rank, other) + given(each, other, rank))
        mine = each[rank]
        messages = sum(matrix.elements for matrix in mine)
        messages += sum(given(each, rank, owner) for owner in range(len(each))) * (len(each) > 1)  # one rank alone computes in the message
        held = max(held, element_bytes * (messages + max((matrix.working for matrix in mine), default=0)))
        operations += sum(matrix.operations for matrix in mine)
    return Load(tuple(sent), held, operations)
