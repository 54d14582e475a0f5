"""Gaussian blur, for distances that leave out detail (paper Figure 9). Shapes: B batch, Y X rows and columns."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def blurred(pictures_B3YX: Tensor, radius: int) -> Tensor:
    """The pictures, blurred by a Gaussian whose standard deviation is ``radius`` pixels; 0 leaves them as they are. Edges are repeated."""
    if not radius:
        return pictures_B3YX
    reach = 3 * radius
    weights = torch.exp(-torch.arange(-reach, reach + 1, device=pictures_B3YX.device).float().square() / (2 * radius**2))
    kernel = (weights / weights.sum()).expand(3, 1, 1, -1)
    padded = F.pad(pictures_B3YX, (reach, reach, reach, reach), mode="replicate")
    rows = F.conv2d(padded, kernel, groups=3)
    return F.conv2d(rows, kernel.transpose(2, 3), groups=3)
