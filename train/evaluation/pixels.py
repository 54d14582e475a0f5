"""Similarity of pictures by their pixels: PSNR and SSIM. Shapes: B batch, C channels, Y X rows and columns; values in [0, 1]."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_WINDOW, _SIGMA, _K1, _K2 = 11, 1.5, 0.01, 0.03


def psnr(a_BCYX: Tensor, b_BCYX: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture in dB, [B]."""
    mse_B = (a_BCYX - b_BCYX).square().mean((1, 2, 3)).clamp_min(1e-10)
    return -10 * torch.log10(mse_B)


def ssim(a_BCYX: Tensor, b_BCYX: Tensor) -> Tensor:
    """Structural similarity of each picture, [B], at most 1 (Wang et al. 2004).

    With a Gaussian window of 11 x 11 pixels and sigma 1.5, K1 = 0.01, K2 = 0.03. Each channel is compared by itself; the result is the mean over channels
    and over the positions at which the whole window lies inside the picture.

    Raises:
        ValueError: the pictures are smaller than the window.
    """
    channels, rows, columns = a_BCYX.shape[1:]
    if min(rows, columns) < _WINDOW:
        raise ValueError(f"pictures of {rows} x {columns} pixels: SSIM needs at least {_WINDOW} x {_WINDOW}")
    x_W = torch.arange(_WINDOW, dtype=torch.float32, device=a_BCYX.device) - _WINDOW // 2
    g_W = torch.exp(-(x_W**2) / (2 * _SIGMA**2))
    g_W /= g_W.sum()

    def blur(t_BCYX: Tensor) -> Tensor:
        down = g_W.view(1, 1, -1, 1).expand(channels, 1, -1, 1)
        return F.conv2d(F.conv2d(t_BCYX, down, groups=channels), down.transpose(2, 3), groups=channels)

    mean_a, mean_b = blur(a_BCYX), blur(b_BCYX)
    var_a, var_b, cov = blur(a_BCYX**2) - mean_a**2, blur(b_BCYX**2) - mean_b**2, blur(a_BCYX * b_BCYX) - mean_a * mean_b
    c1, c2 = _K1**2, _K2**2
    map_BCYX = (2 * mean_a * mean_b + c1) * (2 * cov + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return map_BCYX.mean((1, 2, 3))
