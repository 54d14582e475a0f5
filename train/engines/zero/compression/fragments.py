"""Which rows of a rank's fragments are compressed, and how many bytes are sent for them. No torch, because ``plan`` counts with the same rules as the engine.

A fragment is a contiguous piece of a flattened matrix (train.engines.zero.shards). Its whole rows form a matrix, which is compressed; incomplete rows at either
end are sent exactly. Stage 3 cuts matrices between rows if the number of rows is divisible by the GPUs of a machine; stages 1 and 2 cut anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Block:
    """The whole rows of one fragment."""

    start: int
    """Its first element, counted in the fragment."""
    rows: int
    width: int
    rank: int
    """Rank of its factors."""

    @property
    def elements(self) -> int:
        return self.rows * self.width

    @property
    def is_upright(self) -> bool:
        """Whether it has more rows than columns. Then it is transposed before it is compressed, so that the matrix to orthonormalise has fewer rows (paper E.2)."""
        return self.rows > self.width

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shorter side, longer side and rank; blocks with equal ones are computed together."""
        return min(self.rows, self.width), max(self.rows, self.width), self.rank

    @property
    def factors(self) -> int:
        """Number of elements of P and Q together."""
        return self.rank * (self.rows + self.width)


def is_worthwhile(block: Block) -> bool:
    """Whether the factors have fewer elements than the block; otherwise it is sent exactly."""
    return block.factors < block.elements


def block_of(offset: int, length: int, total: int, width: int, rank: int) -> Block | None:
    """The block of a fragment that is compressed; None if nothing is.

    Args:
        offset: first element of the fragment in the flattened matrix.
        length: elements of the fragment.
        total: elements of the matrix.
        width: columns of the matrix.
        rank: total rank of the matrix; a fragment gets a part of it in proportion to its rows (rank / GPUs for even shards).
    """
    first, last = -(-offset // width), (offset + length) // width
    rows = last - first
    if rows <= 0:
        return None
    found = Block(first * width - offset, rows, width, min(max(1, rank * rows * width // total), rows, width))
    return found if is_worthwhile(found) else None


def sent_bytes(payload: int, nodes: int) -> float:
    """Bytes that one rank sends to sum a payload over nodes: a reduce-scatter and an all-gather, each without the rank's own part."""
    return 2 * (nodes - 1) * payload / nodes


def payload_bytes(elements: int, wire: str, nodes: int) -> int:
    """Bytes of the payload of factors in a wire format. Codes are divided into equal parts, one for each node, and padded with zeros for that."""
    if wire == "1-6-9":
        return 2 * (-(-elements // nodes) * nodes)
    return elements * {"fp32": 4, "bf16": 2}[wire]
