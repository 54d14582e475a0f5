"""Floating-point operations of the dVAE, counted from its sizes: two for each product of a convolution. No torch."""

from __future__ import annotations

from model.config import DVAEConfig


def encoder_flops(cfg: DVAEConfig) -> float:
    """Floating-point operations of the encoder's forward pass on one picture, logits included."""
    return 2.0 * (_stem(cfg) + sum(_group(cfg, i) for i in range(cfg.groups)) + _last_width(cfg) * cfg.vocab * cfg.grid**2)


def decoder_flops(cfg: DVAEConfig) -> float:
    """Floating-point operations of the decoder's forward pass on one picture from relaxed codes."""
    products = float(cfg.vocab * cfg.init_width * cfg.grid**2)
    n_in = cfg.init_width
    for i in reversed(range(cfg.groups)):
        n_out = cfg.width * 2**i
        products += _blocks(cfg, n_in, n_out, (1, 9, 9, 9)) * _side(cfg, i) ** 2
        n_in = n_out
    return 2.0 * (products + cfg.width * 6 * cfg.image_size**2)


def train_flops(cfg: DVAEConfig) -> float:
    """Operations of the forward and backward pass of one picture: three times the forward pass, minus the gradient of the picture itself; without recomputation."""
    return 3.0 * (encoder_flops(cfg) + decoder_flops(cfg)) - 2.0 * _stem(cfg)


def _stem(cfg: DVAEConfig) -> float:
    return 3.0 * cfg.width * 7**2 * cfg.image_size**2


def _last_width(cfg: DVAEConfig) -> int:
    return int(cfg.width * 2 ** (cfg.groups - 1))


def _side(cfg: DVAEConfig, group: int) -> int:
    """Rows and columns at which an encoder group works; the corresponding decoder group has the same."""
    return max(cfg.image_size // 2**group, cfg.grid)


def _group(cfg: DVAEConfig, i: int) -> float:
    n_out = cfg.width * 2**i
    return _blocks(cfg, cfg.width * 2 ** max(0, i - 1), n_out, (9, 9, 9, 1)) * _side(cfg, i) ** 2


def _blocks(cfg: DVAEConfig, n_in: int, n_out: int, taps: tuple[int, int, int, int]) -> float:
    """Products of a group of residual blocks at one position."""
    total = 0.0
    for block in range(cfg.blocks_per_group):
        first, hidden = (n_in if block == 0 else n_out), n_out // 4
        widths = (first, hidden, hidden, hidden, n_out)
        total += sum(widths[k] * widths[k + 1] * taps[k] for k in range(4)) + (first * n_out if first != n_out else 0)
    return total
