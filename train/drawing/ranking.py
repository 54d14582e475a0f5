"""What orders candidates: the run's own contrastive model, or one of open_clip."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from data_pipeline.tokenizer import Tokenizer
from model.clip import Clip


class Ranker(Protocol):
    """Maps pictures and captions to unit vectors, whose cosines say how well they fit."""

    def encode_image(self, pixels_B3YX: Tensor) -> Tensor:
        """Square pictures in [0, 1] -> [B, E]."""

    def encode_caption(self, caption: str) -> Tensor:
        """-> [1, E]."""


@dataclass(frozen=True)
class OwnClip:
    """A contrastive model that stage clip has trained, with the tokenizer that it was trained with."""

    clip: Clip
    tokenizer: Tokenizer

    def encode_image(self, pixels_B3YX: Tensor) -> Tensor:
        return self.clip.encode_image(pixels_B3YX)

    def encode_caption(self, caption: str) -> Tensor:
        ids, length = self.tokenizer.encode(caption)
        device = next(self.clip.parameters()).device
        return self.clip.encode_text(torch.from_numpy(ids)[None].to(device), torch.tensor([length], device=device))
