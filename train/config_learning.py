"""Keys that change what stage dalle learns from the same pictures and captions: parts of sections dalle_fit and encode. No torch."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from data_pipeline import sides
from data_pipeline.config import LanguageCode
from infra.config import Section
from infra.config_keys import GOING_ON


class LearningSection(Section):
    """Options beside the paper's recipe, all off by default (docs/small_data.md)."""

    caption_dropout: float = Field(default=0.0, ge=0, lt=1, json_schema_extra=GOING_ON)
    """Share of training samples without their caption, so that pictures can be drawn with classifier-free guidance; the paper has none. Other samples in each
    epoch."""
    replace_codes: float = Field(default=0.0, ge=0, lt=1, json_schema_extra=GOING_ON)
    """Share of the image codes that the model reads as another, random code in training, others in each epoch; it is still to predict the right ones."""
    replace_pieces: float = Field(default=0.0, ge=0, lt=1, json_schema_extra=GOING_ON)
    """The same for the pieces of captions."""
    z_loss: float = Field(default=0.0, ge=0, json_schema_extra=GOING_ON)
    """Weight of the squared logarithm of the softmax's denominator, which the gradient gets in addition to each token's cross-entropy; losses are shown without it."""


class MirrorSection(Section):
    """Mirrored crops in code sets, off by default (docs/small_data.md)."""

    crops: int = Field(default=1, gt=0)
    """Crops of each image by Listing 2, each in a shard set of its own; epoch e reads crop e mod crops."""
    mirror: bool = False
    """Mirror every second crop of each training picture, unless one of its captions holds a word of left and right, or of writing, clocks and flags; half of the
    pictures begin with the mirrored one. Needs crops of at least 2."""
    mirror_languages: tuple[LanguageCode, ...] = ()
    """Languages whose words keep a picture as it is (data_pipeline/sides.py); empty: all that are known."""
    mirror_words: tuple[str, ...] = ()
    """Further words that do, in any language; * at an end stands for any letters."""

    @model_validator(mode="after")
    def _mirrors_some_crops(self) -> Self:
        self.unmirrored()
        if self.mirror and self.crops < 2:
            raise ValueError("mirror = true with crops = 1: each picture would still be seen one way only; set crops = 2 or more")
        return self

    def unmirrored(self) -> tuple[str, ...]:
        """All words that keep a picture as it is."""
        return sides.words(self.mirror_languages, self.mirror_words)
