"""The choice of codes on a CPU, compiled by numba: scores, and the noise of (seed, position, code), as model/gumbel.py makes it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import prange

from model import gumbel
from train.drawing.cpu_kernels import HALF, MANTISSA_BITS, ONE, compiled

# log(1 + z) for 1 + z in [sqrt(1/2), sqrt(2)], with a relative error of 1e-7 (Cephes, logf); and log(2) as the sum of two numbers, the first with few bits.
_LOGS = tuple(
    np.float32(x)
    for x in (
        7.0376836292e-2,
        -1.1514610310e-1,
        1.1676998740e-1,
        -1.2420140846e-1,
        1.4249322787e-1,
        -1.6668057665e-1,
        2.0000714765e-1,
        -2.4999993993e-1,
        3.3333331174e-1,
    )
)
_LN_2_HIGH, _LN_2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_SQRT_HALF_BITS, _NEAR = np.int32(0x3F3504F3), np.float32(0.25)
_WEYL, _MIX_1, _MIX_2 = (np.uint64(x % 2**64) for x in (gumbel.WEYL, gumbel.MIX_1, gumbel.MIX_2))
_CODE_BITS, _UNIT, _LARGEST = np.uint64(gumbel.CODE_BITS), np.float32(gumbel.UNIT), np.float32(gumbel.LARGEST)


@compiled()
def _log_near_one(z: Any) -> Any:
    p = _LOGS[0]
    p = p * z + _LOGS[1]
    p = p * z + _LOGS[2]
    p = p * z + _LOGS[3]
    p = p * z + _LOGS[4]
    p = p * z + _LOGS[5]
    p = p * z + _LOGS[6]
    p = p * z + _LOGS[7]
    p = p * z + _LOGS[8]
    return z + (p * z * z * z - HALF * z * z)


@compiled()
def _log(x: Any) -> Any:
    """Logarithm of a positive, normal number, without a call of the C library."""
    above = np.int32(np.float32(x).view(np.int32) - _SQRT_HALF_BITS)
    power = np.int32(above >> MANTISSA_BITS)
    z = np.int32(np.float32(x).view(np.int32) - np.int32(power << MANTISSA_BITS)).view(np.float32) - ONE
    whole = np.float32(power)
    return _log_near_one(z) + whole * _LN_2_LOW + whole * _LN_2_HIGH


@compiled()
def _uniform(key: Any, counter: Any) -> Any:
    """A uniform number from a mixed seed and a counter, as in ``gumbel_noise``."""
    x = counter * _WEYL + key
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    x = x ^ (x >> np.uint64(31))
    return (np.float32(np.int64(x >> np.uint64(11))) + HALF) * _UNIT


@compiled()
def _gumbel(uniform: Any) -> Any:
    # Not min(), and not a choice between two calls: with either, the compiler cannot vectorise the loop around this.
    u = uniform if uniform < _LARGEST else _LARGEST
    is_near = np.float32(u < _NEAR)
    return -_log(-(_log_near_one(-u) * is_near + _log(ONE - u) * (ONE - is_near)))


@compiled(parallel=True)
def choose(scores_RN: Any, keys_R: Any, positions_R: Any, best_R: Any, code_R: Any) -> None:
    """For each row, the largest sum of score and noise, and its code. NaN if a score is NaN."""
    for r in prange(scores_RN.shape[0]):
        scores, base = scores_RN[r], np.uint64(positions_R[r]) << _CODE_BITS
        uniform = np.empty(scores.shape[0], np.float32)
        for n in range(scores.shape[0]):  # two loops, because the compiler can vectorise each of them
            uniform[n] = _uniform(keys_R[r], base + np.uint64(n + 1))
        for n in range(scores.shape[0]):
            scores[n] += _gumbel(uniform[n])
        best, code = scores[0], 0
        for n in range(scores.shape[0]):
            if scores[n] > best or scores[n] != scores[n]:
                best, code = scores[n], n
        best_R[r], code_R[r] = best, code
