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
"""For each owner the matrices that it computes: the ranks of the first machine that shard together, then those of the second, and so on."""


def cut(elements: int, start: int, share: int, ranks: int) -> tuple[tuple[int, int], ...]:
    """The pieces of a parameter that begins at ``start`` of a flat vector of which each rank has ``share`` elements: first element and length for each rank."""
    ends = [min(max(rank * share - start, 0), elements) for rank in range(ranks + 1)]
    return tuple((first, last - first) for first, last in pairwise(ends))


def rounds(matrices: Iterable[Matrix], ranks: int, element_bytes: int, machines: int = 1) -> list[Round]:
    """Deal matrices to owners and rounds, from names and shapes alone: the largest first, each to the owner with the least to compute, and of several such to the
    one that holds most of it.

    Args:
        ranks: those that shard together.
        machines: replicas that share the work; 1: each does all of it.
    """
    owners = range(ranks * machines)
    load, owned = [0 for _ in owners], [list[Matrix]() for _ in owners]
    for matrix in sorted(matrices, key=lambda m: (-m.operations, m.name)):
        owner = min(owners, key=lambda owner: (load[owner], -matrix.held[owner % ranks][1]))
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


def by_machine(dealt: Round, ranks: int) -> list[Round]:
    """The parts of a round that each machine computes."""
    return [dealt[start : start + ranks] for start in range(0, len(dealt), ranks)]


def given(dealt: Round, rank: int, owner: int) -> int:
    """Elements of a machine's part of a round that a rank brings to an owner, and gets back from it."""
    return sum(matrix.held[rank][1] for matrix in dealt[owner])


@dataclass(frozen=True)
class Load:
    """What an update of the matrices takes on one rank."""

    sent: tuple[int, ...]
    """Bytes to each rank of the sharding group, both ways together; none to itself."""
    between: float
    """Bytes to the ranks of other machines that have the same shard: updates that their machines have not computed."""
    held: int
    """Bytes of messages and matrices at once, at most."""
    operations: int


def loads(dealt: Sequence[Round], ranks: int, element_bytes: int) -> list[Load]:
    """What these rounds take on each of their owners."""
    parts = [by_machine(each, ranks) for each in dealt]
    pieces = [[[sum(given(part, rank, owner) for owner in range(ranks)) for rank in range(ranks)] for part in each] for each in parts]
    found = []
    for machine, rank in ((machine, rank) for machine in range(len(parts[0])) for rank in range(ranks)):
        sent, held, operations = [0] * ranks, 0, 0
        for each, elements in zip(parts, pieces, strict=True):
            mine, part = each[machine][rank], each[machine]
            for other in range(ranks):
                sent[other] += element_bytes * (given(part, rank, other) + given(part, other, rank)) * (other != rank)
            message, whole = elements[machine][rank] * (ranks > 1), sum(matrix.elements for matrix in mine)  # one rank alone computes in the message
            held = max(held, message + whole + max((matrix.working for matrix in mine), default=0))
            held = max(held, elements[machine][rank] + max(each_machine[rank] for each_machine in elements) * (len(each) > 1))
            operations += sum(matrix.operations for matrix in mine)
        machines = len(parts[0])
        shard = element_bytes * sum(each_machine[rank] for elements in pieces for each_machine in elements)
        found.append(Load(tuple(sent), shard * (machines - 1) / machines, element_bytes * held, operations))
    return found
