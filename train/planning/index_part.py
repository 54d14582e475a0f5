"""A rank's part of a checkpoint's index as it would be written, of what the rank would hold: hashes stand for data that nobody has."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from train.weights import layout
from train.weights.checkpoint_index import part_of
from train.weights.checkpoint_storage import PIECE_BYTES

NO_HASH = hashlib.sha256(b"").hexdigest()


def index_part(rank: int, rows: Mapping[str, layout.Row]) -> bytes:
    """The bytes of the part of a rank that holds these rows, and writes its tensors in their order."""
    tensors, position = {}, 0
    for name, (offset, length, kind) in rows.items():
        size = length * layout.width_of(kind)
        tensors[name] = {"start": position, "offset": offset, "length": length, "sha256": [NO_HASH] * -(-size // PIECE_BYTES)}
        position += size
    return part_of(rank, PIECE_BYTES, tensors)
