"""Which rows of a rank's fragments are compressed, and what is sent for them. No torch: ``plan`` counts with the same rules as the engine.

A fragment is a contiguous piece of a flattened matrix (train.engines.zero.shards). Its whole rows are a matrix of their own, which is compressed; what hangs over
at either end travels exactly. Stage 3 cuts matrices into whole rows where the rows divide by the GPUs of a machine; stages 1 and 2 cut anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Block:
    """The whole rows of one fragment."""

    start: int
    """First element, in the fragment."""
    rows: int
    width: int
    rank: int
    """Of its factors."""

    @property
    def elements(self) -> int:
        return self.rows * self.width

    @property
    def is_upright(self) -> bool:
        """More rows than columns: it is compressed lying down, because what is made orthonormal then has the fewer rows (paper E.2)."""
        return self.rows > self.width

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shorter side, the longer side and the rank: blocks that agree in them are computed together."""
        return min(self.rows, self.width), max(self.rows, self.width), self.rank

    @property
    def factors(self) -> int:
        """Elements of P and Q."""
        return self.rank * (self.rows + self.width)


def is_worthwhile(block: Block) -> bool:
    """Whether the factors are fewer than the elements that they stand for; others travel exactly."""
    return block.factors < block.elements


def block_of(offset: int, length: int, total: int, width: int, rank: int) -> Block | None:
    """What is compressed of a fragment; None if nothing is.

    Args:
        offset: first element of the fragment in the flattened matrix.
        length: elements of the fragment.
        total: elements of the matrix.
        width: columns of the matrix.
        rank: total rank of the matrix, of which a fragment has a share by its rows: rank / GPUs for even shards.
    """
    first, last = -(-offset // width), (offset + length) // width
    rows = last - first
    if rows <= 0:
        return None
    found = Block(first * width - offset, rows, width, min(max(1, rank * rows * width // total), rows, width))
    return found if is_worthwhile(found) else None


def sent_bytes(payload: int, nodes: int) -> float:
    """Bytes that one rank sends to sum a payload over nodes: each part goes once around in order to be summed and once to be known, less the share that stays."""
    return 2 * (nodes - 1) * payload / nodes


def payload_bytes(elements: int, wire: str, nodes: int) -> int:
    """Bytes of a grouped sum of factors in a wire format. Codes are cut into equal parts, one for each node, so that some zeros may hang on."""
    if wire == "1-6-9":
        return 2 * (-(-elements // nodes) * nodes)
    return elements * {"fp32": 4, "bf16": 2}[wire]
