"""Heads of a contrastive model whose towers are networks that others have trained, and which stay as they are.

B pairs, F features of a tower, E shared embedding.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from model.clip import Scaled
from model.config import ClipConfig

IMAGE_FEATURES = 1280
"""Of EfficientNet-Lite0."""
TEXT_FEATURES = 384
"""Of all-MiniLM-L6-v2."""


class FrozenHeads(Scaled):
    """Maps features of pictures and of captions into one embedding space. One matrix each: on a few thousand photographs an inner layer finds fewer (docs/drawing.md)."""

    def __init__(self, cfg: ClipConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.image_head, self.text_head = (
            nn.Sequential(nn.LayerNorm(features, elementwise_affine=False), nn.Linear(features, cfg.embed))
            for features in (IMAGE_FEATURES, TEXT_FEATURES)
        )
        self.add_scale()

    def embed_image(self, features_BF: Tensor) -> Tensor:
        """Features [B, IMAGE_FEATURES] to unit vectors [B, E]."""
        return F.normalize(self.image_head(features_BF), dim=1)

    def embed_text(self, features_BF: Tensor) -> Tensor:
        """Features [B, TEXT_FEATURES] to unit vectors [B, E]."""
        return F.normalize(self.text_head(features_BF), dim=1)
