"""Which crops of a picture are mirrored in a code set (encode.mirror)."""

from __future__ import annotations

from collections.abc import Sequence

from data_pipeline.sides import names_a_side
from infra.seeds import derive


def is_mirrored(seed: int, record_id: str, crop: int, captions: Sequence[str], never: Sequence[str]) -> bool:
    """Whether a crop is mirrored: every second one of a picture, where no caption holds one of the words ``never``. Half of the pictures, by (seed, id), begin with it."""
    return (derive(seed, "mirror", record_id) + crop) % 2 == 1 and not names_a_side(captions, never)
