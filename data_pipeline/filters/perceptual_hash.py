"""The perceptual hash: 64 bits that survive encoding, scaling and mild changes of brightness, and differ between different pictures.

It is the well-known pHash: 32 x 32 grey levels, their 8 x 8 lowest DCT coefficients, each a bit: above the median or not. In integers, so that
machines agree. Half of the bits are set, hence distances are even.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image

DECODE_SIDE = 64
"""Pictures of which both sides are at least this are enough: a JPEG may be decoded at a smaller scale."""

FLAT = 2.0
"""Standard deviation of the grey levels below which a picture has no structure to hash."""

_SIDE, _LOW = 32, 8
_ANGLES = np.pi / (2 * _SIDE) * np.outer(np.arange(_LOW), 2 * np.arange(_SIDE) + 1)
_COSINES_LS = np.rint(np.cos(_ANGLES) * (1 << 12)).astype(np.int64)


def perceptual_hash(grey_YX: NDArray[np.uint8], file: bytes) -> int:
    """Hash of a picture, an unsigned 64-bit integer.

    Args:
        grey_YX: its grey levels.
        file: its encoded bytes. A picture that is flat (one colour, a faint gradient) has no structure: its bits would be those of the noise, or
            the same for every colour. It gets a digest of these bytes instead, and so equals nothing but itself.
    """
    small_SS = np.asarray(Image.fromarray(grey_YX).resize((_SIDE, _SIDE), Image.Resampling.LANCZOS))
    if small_SS.std() < FLAT:
        return int.from_bytes(hashlib.blake2b(file, digest_size=8).digest(), "little")
    low_LL = _COSINES_LS @ small_SS.astype(np.int64) @ _COSINES_LS.T
    bits = low_LL > np.median(low_LL)
    return int.from_bytes(np.packbits(bits.ravel()).tobytes(), "big")
