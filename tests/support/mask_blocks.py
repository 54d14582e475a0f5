"""Blocks of pairs that a block-sparse kernel computes, counted from the rules: what the block masks of model/flex.py are compared to."""

from collections.abc import Iterator

from model.config import StreamShape, TransformerConfig
from model.offsets import Kind, mask_kind, offsets_of, transposed


def touched_blocks(kind: Kind, shape: StreamShape, cfg: TransformerConfig, block: int) -> int:
    """Blocks of ``block`` x ``block`` pairs that hold an allowed one: what a block-sparse kernel computes. Columns are laid out column by column."""
    return len(set(_touched(kind, shape, cfg, block)))


def _touched(kind: Kind, shape: StreamShape, cfg: TransformerConfig, block: int) -> Iterator[tuple[int, int]]:
    text, last = shape.text_tokens, (shape.states - 1) // block
    for query in range(text):
        yield from ((query // block, key) for key in range(query // block + 1))
    for query in range(text // block, last + 1):  # some image state, which sees all text
        yield from ((query, key) for key in range((text - 1) // block + 1))
    offsets = offsets_of(kind, shape, cfg)
    for query in range(shape.image_tokens):
        for d in offsets:
            if d <= query:
                places = [text + (transposed(i, shape.grid) if mask_kind(kind).is_transposed else i) for i in (query, query - d)]
                yield places[0] // block, places[1] // block
