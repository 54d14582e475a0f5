"""Noise that depends only on a picture's seed, a position and a code; not on what else is drawn, nor on the order.

B pictures, Q positions, N image codes.
"""

import torch
from torch import Tensor

# These constants are also used by another implementation (train/drawing/cpu_kernels.py).
WEYL = 0x9E3779B97F4A7C15 - 2**64
MIX_1, MIX_2 = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
CODE_BITS = 32  # the lower bits of a counter hold the code, the upper ones the position
UNIT = 2.0**-53
LARGEST = 1 - 2.0**-24  # the largest fp32 number below 1, so that the noise is finite


def gumbel_noise(seeds_B: Tensor, positions_BQ: Tensor, codes: int) -> Tensor:
    """Standard Gumbel noise, fp32 [B, Q, N]: a pure function of (seed, position, code), equal on every device up to rounding of the logarithms.

    The argmax of logits plus this noise is a sample of their softmax (Gumbel 1954). The generator is splitmix64 with a counter made of (position, code), and the
    mixed seed as its key. It has no state, so positions can be drawn in any order, in parallel, and repeatedly.

    Args:
        seeds_B: int64.
        positions_BQ: int64, 0 or above.
        codes: N.
    """
    code_N = torch.arange(codes, device=seeds_B.device)
    counter_BQN = (positions_BQ[..., None] << CODE_BITS) + code_N + 1
    bits_BQN = mixed(counter_BQN.mul_(WEYL).add_(mixed(seeds_B.clone())[:, None, None]))
    # Uniform numbers near 0 give the largest noise, which decides the argmax. So 53 random bits are used, which fp32 can resolve near 0.
    uniform_BQN = _shifted(bits_BQN, 11).float().add_(0.5).mul_(UNIT).clamp_(max=LARGEST)
    return uniform_BQN.neg_().log1p_().neg_().log_().neg_()


def mixed(x: Tensor) -> Tensor:
    """splitmix64's finaliser, in place. Products of int64 wrap around like those of unsigned numbers."""
    x.bitwise_xor_(_shifted(x, 30)).mul_(MIX_1)
    x.bitwise_xor_(_shifted(x, 27)).mul_(MIX_2)
    return x.bitwise_xor_(_shifted(x, 31))


def _shifted(x: Tensor, places: int) -> Tensor:
    """A logical shift to the right; torch's own shift copies the sign bit."""
    return (x >> places) & ((1 << (64 - places)) - 1)
