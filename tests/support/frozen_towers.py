"""Stand-ins for the frozen towers, whose weights are in packages that are not installed everywhere: seeded random matrices with features of the same widths."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model.frozen_clip import IMAGE_FEATURES, TEXT_FEATURES
from train.weights import towers

LINEAGE = dict(zip(towers.KINDS, ("a" * 64, "b" * 64), strict=True))


class Counted:
    """The stand-in for both, which counts what it was asked."""

    def __init__(self) -> None:
        self.pictures = self.captions = 0
        self._matrix = torch.randn(3 * 16, IMAGE_FEATURES, generator=torch.Generator().manual_seed(0))

    def image(self, pixels_B3YX: Tensor) -> Tensor:
        self.pictures += len(pixels_B3YX)
        return F.adaptive_avg_pool2d(pixels_B3YX, 4).flatten(1) @ self._matrix

    def text(self, captions: Sequence[str]) -> Tensor:
        self.captions += len(captions)
        seeds = [int.from_bytes(hashlib.sha256(caption.encode()).digest()[:4], "little") for caption in captions]
        return F.normalize(torch.stack([torch.randn(TEXT_FEATURES, generator=torch.Generator().manual_seed(seed)) for seed in seeds]), dim=1)


def stand_in(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """Replace the towers of this process."""
    counted = Counted()
    made = towers.Towers(counted.image, counted.text, LINEAGE, torch.device("cpu"))
    monkeypatch.setattr(towers, "check", lambda: None)
    monkeypatch.setattr(towers, "open_towers", lambda device: made)
    return counted
