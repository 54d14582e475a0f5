"""Keys that change what stage dalle learns from the same pictures and captions: part of section dalle_fit. No torch."""

from __future__ import annotations

from pydantic import Field

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
