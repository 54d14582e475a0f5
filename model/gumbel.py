"""Noise that belongs to a picture's seed, a position and a code, whatever is drawn beside it and in whichever order.

B pictures, Q positions, N image codes.
"""

import torch
from torch import Tensor

# Another implementation (train/drawing/cpu_kernels.py) takes these too.
WEYL = 0x9E3779B97F4A7C15 - 2**64
MIX_1, MIX_2 = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
CODE_BITS = 32  # of a counter; the bits above them are the position's
UNIT = 2.0**-53
LARGEST = 1 - 2.0**-24  # of fp32 below 1, so that the noise is finite


def gumbel_noise(seeds_B: Tensor, positions_BQ: Tensor, codes: int) -> Tensor:
    """Standard Gumbel noise, fp32 [B, Q, N]: a pure function of (seed, position, code), equal on every device up to rounding of the logarithms.

    The argmax of logits plus this noise is a draw from their softmax (Gumbel 1954). The generator is splitmix64 at (position, code), its key the
    mixed seed: no state, so any position can be drawn before, after or beside any other, and again.

    Args:
        seeds_B: int64.
        positions_BQ: int64, 0 or above.
        codes: N.
    """
    code_N = torch.arange(codes, device=seeds_B.device)
    counter_BQN = (positions_BQ[..., None] << CODE_BITS) + code_N + 1
    bits_BQN = mixed(counter_BQN.mul_(WEYL).add_(mixed(seeds_B.clone())[:, None, None]))
    # 53 bits near 0, where fp32 resolves them: the largest noises, which decide, come from the smallest numbers.
    uniform_BQN = _shifted(bits_BQN, 11).float().add_(0.5).mul_(UNIT).clamp_(max=LARGEST)
    return uniform_BQN.neg_().log1p_().neg_().log_().neg_()


def mixed(x: Tensor) -> Tensor:
    """splitmix64's finaliser, in place; products of int64 wrap as those of unsigned numbers do."""
    x.bitwise_xor_(_shifted(x, 30)).mul_(MIX_1)
    x.bitwise_xor_(_shifted(x, 27)).mul_(MIX_2)
    return x.bitwise_xor_(_shifted(x, 31))


def _shifted(x: Tensor, places: int) -> Tensor:
    """A logical shift to the right: torch's own repeats the sign."""
    return (x >> places) & ((1 << (64 - places)) - 1)
