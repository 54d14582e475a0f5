"""Keys of stage encode: section encode. No torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from data_pipeline import sides
from data_pipeline.config import LanguageCode
from infra.config import Section

Precision = Literal["auto", "bf16", "fp16", "fp32"]


class EncodeSection(Section):
    """Encoding of images as codes."""

    crops: int = Field(default=1, gt=0)
    """Crops of each image by Listing 2, each in a shard set of its own; epoch e reads crop e mod crops."""
    mirror: bool = False
    """Mirror every second crop of each training picture, unless one of its captions holds a word of left and right, or of writing, clocks and flags; half of the
    pictures begin with the mirrored one. Needs crops of at least 2."""
    mirror_languages: tuple[LanguageCode, ...] = ()
    """Languages whose words keep a picture as it is (data_pipeline/sides.py); empty: all that are known."""
    mirror_words: tuple[str, ...] = ()
    """Further words that do, in any language; * at an end stands for any letters."""
    batch: int = Field(default=64, gt=0)
    """Images per forward pass; the last batch of a part is padded, so that codes depend on their part only."""
    precision: Precision = "fp32"
    """Arithmetic of the large matrix products, as in the training stages. Codes depend on it: with another value they are made again."""
    threads: int = Field(default=1, gt=0)
    """Threads of a process for arithmetic on a CPU. The last bits of sums depend on it, so with another value codes are made again; use more processes instead."""
    decoders: int = Field(default=2, gt=0)
    """Threads of a process that decode the next images meanwhile."""
    scale_max: float = Field(default=9 / 8, ge=1)
    """Listing 2: largest resize target, divided by the image size."""
    min_code_use: float = Field(default=0.0, ge=0, le=1)
    """Refuse a dVAE that uses a smaller share of its codes on validation images."""

    @model_validator(mode="after")
    def _mirrors_some_crops(self) -> Self:
        self.unmirrored()
        if self.mirror and self.crops < 2:
            raise ValueError("mirror = true with crops = 1: each picture would still be seen one way only; set crops = 2 or more")
        return self

    def unmirrored(self) -> tuple[str, ...]:
        """All words that keep a picture as it is."""
        return sides.words(self.mirror_languages, self.mirror_words)
