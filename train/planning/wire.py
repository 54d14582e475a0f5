"""The fragments of parameters that each GPU of a machine has under ZeRO, and the bytes that compression sends for them. The engine counts the same bytes at its
collectives. Needs no torch.

Stage 3 divides every parameter evenly. Stages 1 and 2 concatenate the parameters of a group, pad them to a multiple of twice the number of GPUs, and divide the
result evenly (DeepSpeed 0.19.8). The groups are those of train/engines/zero/groups.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from model.config import StreamShape, TransformerConfig
from model.width import UNSCALED, WidthRatios, width_ratios
from train.engines.zero.compression.fragments import Block, block_of, payload_bytes, sent_bytes
from train.optimizer.muon_schedule import Matrix

_ALIGNMENT = 2


@dataclass(frozen=True)
class Parameter:
    """One parameter of the transformer."""

    name: str
    elements: int
    width: int
    """Number of columns of a matrix; 1 for a vector."""
    resblock: int | None
    is_block_matrix: bool
    decays: bool
    ratios: WidthRatios = UNSCALED


def parameters(cfg: TransformerConfig, shape: StreamShape) -> Iterator[Parameter]:
    """All parameters of the transformer, in the order of the model."""
    for p in _listed(cfg, shape):
        yield replace(p, ratios=width_ratios(cfg, p.name, is_block_matrix=p.is_block_matrix))


def _listed(cfg: TransformerConfig, shape: StreamShape) -> Iterator[Parameter]:
    d = cfg.width

    def table(name: str, rows: int) -> Parameter:
        return Parameter(f"{name}.weight", rows * d, d, None, False, True)

    def norm(name: str, block: int | None) -> Iterator[Parameter]:
        for leaf in ("weight", "bias"):
            yield Parameter(f"{name}.{leaf}", d, 1, block, False, False)

    yield from (table("text_tokens", shape.text_vocab), table("text_positions", shape.text_tokens), table("text_padding", shape.text_tokens))
    yield from (table("text_start", 1), table("image_tokens", shape.image_vocab), table("image_rows", shape.grid), table("image_columns", shape.grid))
    yield table("image_start", 1)
    for block in range(2 * cfg.layers):
        yield from norm(f"resblocks.{block}.norm", block)
        matrices = [("mlp_1", d, 4 * d), ("mlp_2", d, d)] if block % 2 else [(name, d, d) for name in ("q", "k", "v", "post")]
        for name, width, outputs in matrices:
            elements = 4 * d * d if block % 2 else d * d
            yield Parameter(f"resblocks.{block}.{name}.weight", elements, width, block, True, True)
            yield Parameter(f"resblocks.{block}.{name}.bias", outputs, 1, block, False, False)
        for name in ("q_norm", "k_norm") if cfg.qk_norm and block % 2 == 0 else ():
            yield Parameter(f"resblocks.{block}.{name}.weight", d // cfg.heads, 1, block, False, False)
    yield from norm("final_norm", None)
    yield from (table("text_unembedding", shape.text_vocab), table("image_unembedding", shape.image_vocab))


@dataclass(frozen=True)
class Fragment:
    """The part of a parameter that one GPU holds."""

    parameter: Parameter
    offset: int
    length: int

    def block(self, rank: int) -> Block | None:
        """The block of it that is compressed, if there is one."""
        p = self.parameter
        return block_of(self.offset, self.length, p.elements, p.width, rank) if p.is_block_matrix else None


def fragments(
    found: list[Parameter], stage: int, gpus: int, *, by_resblock: bool, half: bool, packed: bool, orthogonal: bool = False
) -> list[list[Fragment]]:
    """The fragments of each GPU of a machine.

    Args:
        by_resblock: each resblock has its own groups, as it does with gradient scales.
        half: gradients of block matrices are sent in 16 bits; block matrices then have separate groups.
        packed: moments of block matrices have 16 bits; block matrices then have separate groups too.
        orthogonal: Muon updates block matrices, which then have separate groups too.
    """
    if stage == 3:
        each = {p.name: -(-p.elements // gpus) for p in found}
        return [[f for p in found if (f := _cut(p, gpu * each[p.name], (gpu + 1) * each[p.name])).length > 0] for gpu in range(gpus)]
    groups: dict[tuple[object, ...], list[Parameter]] = {}
    for p in sorted(found, key=lambda p: p.resblock is not None):
        is_apart = (half or packed or orthogonal) and p.is_block_matrix
        groups.setdefault((p.resblock if by_resblock else None, is_apart, p.decays, p.ratios), []).append(p)
    out: list[list[Fragment]] = [[] for _ in range(gpus)]
    for members in groups.values():
        total = sum(p.elements for p in members)
        share = -(-total // (_ALIGNMENT * gpus)) * _ALIGNMENT
        start = 0
        for p in members:
            for gpu in range(start // share, min((start + p.elements - 1) // share + 1, gpus)):
                out[gpu].append(_cut(p, gpu * share - start, (gpu + 1) * share - start))
            start += p.elements
    return out


def matrices(held: list[list[Fragment]]) -> list[Matrix]:
    """The block matrices, with the piece of each GPU of those that together hold a copy."""
    pieces = [{fragment.parameter: (fragment.offset, fragment.length) for fragment in each if fragment.parameter.is_block_matrix} for each in held]
    found = {parameter: None for each in pieces for parameter in each}
    return [Matrix(p.name, p.elements // p.width, p.width, tuple(each.get(p, (0, 0)) for each in pieces)) for p in found]


def touched(held: list[list[Fragment]]) -> int:
    """Elements of all parameters of which a GPU holds a fragment, on the GPU with the most."""
    return max(sum(fragment.parameter.elements for fragment in each) for each in held)


def _cut(p: Parameter, start: int, stop: int) -> Fragment:
    start, stop = max(start, 0), min(stop, p.elements)
    return Fragment(p, start, stop - start)


@dataclass(frozen=True)
class Sent:
    """What one GPU sends to other machines in an update."""

    factors: float
    """Bytes of the factors P and Q."""
    exact: float
    """Bytes of what is not compressed."""
    refresh: float
    """Bytes of new projections, averaged over updates."""
    compressed: int
    """Number of gradient elements that the factors represent."""
    short: int
    """Number of elements of P."""
    basis: int
    """Number of elements of Q, and also of the fixed projection Q0."""
    operations: float
    """Floating-point operations of the products P, Q and D, and of making P orthonormal."""

    @property
    def total(self) -> float:
        return self.factors + self.exact + self.refresh


def sent(held: list[Fragment], rank: int, wire: str, nodes: int, refresh_every: int = 0) -> Sent:
    """What a GPU with these fragments sends."""
    blocks = [block for fragment in held if (block := fragment.block(rank)) is not None]
    compressed = sum(block.elements for block in blocks)
    sides = [(min(block.rows, block.width), max(block.rows, block.width), block.rank) for block in blocks]
    p, q = sum(short * r for short, _, r in sides), sum(long * r for _, long, r in sides)
    exact = 4 * (sum(fragment.length for fragment in held) - compressed)
    return Sent(
        factors=sent_bytes(payload_bytes(p, wire, nodes) + payload_bytes(q, wire, nodes), nodes),
        exact=sent_bytes(exact, nodes),
        refresh=sent_bytes(4 * compressed, nodes) / refresh_every if refresh_every else 0.0,
        compressed=compressed,
        short=p,
        basis=q,
        # Three products take 2 r operations for each element; Householder's reflections and the computation of Q from them take 4 r^2 for each row.
        operations=float(6 * sum(short * long * r for short, long, r in sides) + 4 * sum(short * r * r for short, _, r in sides)),
    )
