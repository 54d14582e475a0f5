"""What the pipeline asks of anything that turns pictures into codes and back, whoever trained it. Kinds are built in model/tokenizer_kinds.py.

Shapes: B batch, Y X rows and columns (of pixels or of the code grid), S side of a picture.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from model.config import DVAEConfig


class ImageTokenizer(nn.Module, ABC):
    """Pictures in [0, 1] to a square grid of codes, and codes to pictures."""

    def __init__(self, cfg: DVAEConfig) -> None:
        super().__init__()
        self.cfg = cfg

    @property
    def vocab(self) -> int:
        """Number of codes."""
        return self.cfg.vocab

    @property
    def grid(self) -> int:
        """Codes along each axis of a picture."""
        return self.cfg.grid

    @torch.no_grad()
    def encode(self, pixels_B3YX: Tensor) -> Tensor:
        """Pictures [B, 3, S, S] in [0, 1] -> codes [B, grid, grid], int64, without noise.

        Raises:
            ValueError: the pictures do not have the size dvae.image_size.
        """
        check_pixels(pixels_B3YX, self.cfg.image_size)
        return self._encode(pixels_B3YX)

    @torch.no_grad()
    def decode(self, codes_BYX: Tensor) -> Tensor:
        """Codes [B, grid, grid] -> pictures [B, 3, S, S] in [0, 1].

        Raises:
            ValueError: the codes have another grid, or are out of range.
        """
        low, high = (int(value) for value in codes_BYX.aminmax()) if codes_BYX.numel() else (0, 0)
        if low < 0 or high >= self.vocab:
            raise ValueError(f"codes from {low} to {high}: dvae.vocab = {self.vocab} accepts 0 to {self.vocab - 1}; are they of another dVAE?")
        check_codes(codes_BYX, self.grid)
        return self._decode(codes_BYX)

    @abstractmethod
    def _encode(self, pixels_B3YX: Tensor) -> Tensor:
        """``encode`` of pictures of the right size."""

    @abstractmethod
    def _decode(self, codes_BYX: Tensor) -> Tensor:
        """``decode`` of codes that there are."""


def check_pixels(pixels_B3YX: Tensor, image_size: int) -> None:
    """
    Raises:
        ValueError: not a batch of pictures of this size.
    """
    expected = (3, image_size, image_size)
    if pixels_B3YX.ndim != 4 or pixels_B3YX.shape[1:] != expected:
        raise ValueError(
            f"pictures of shape {list(pixels_B3YX.shape)}: expected [batch, {', '.join(map(str, expected))}]; crop them or change dvae.image_size"
        )


def check_codes(codes_BYX: Tensor, grid: int) -> None:
    """
    Raises:
        ValueError: not a batch of integer codes on this grid.
    """
    if codes_BYX.ndim != 3 or codes_BYX.shape[1:] != (grid, grid) or codes_BYX.is_floating_point():
        raise ValueError(
            f"codes of shape {list(codes_BYX.shape)} and {codes_BYX.dtype}: expected integers [batch, {grid}, {grid}], "
            f"the grid of dvae.image_size / dvae.downsample"
        )
