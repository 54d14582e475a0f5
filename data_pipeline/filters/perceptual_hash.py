"""The perceptual hash of a picture: 64 bits that hardly change with encoding, scaling and mild changes of brightness, but differ between different pictures.

It is the well-known pHash: the picture is reduced to 32 x 32 grey levels, and each of the 8 x 8 lowest DCT coefficients gives a bit, which says whether it is
above their median. It is computed in integers, so that all machines agree. Half of the bits are set, so distances are even.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray
from PIL import Image

DECODE_SIDE = 64
"""A picture with both sides at least this long is large enough, so a JPEG may be decoded at a reduced scale."""

FLAT = 2.0
"""Standard deviation of the grey levels below which a picture has no structure to hash."""

_SIDE, _LOW = 32, 8
_ANGLES = np.pi / (2 * _SIDE) * np.outer(np.arange(_LOW), 2 * np.arange(_SIDE) + 1)
_COSINES_LS = np.rint(np.cos(_ANGLES) * (1 << 12)).astype(np.int64)


def perceptual_hash(grey_YX: NDArray[np.uint8], file: bytes) -> int:
    """Hash of a picture, an unsigned 64-bit integer.

    Args:
        grey_YX: its grey levels.
        file: its encoded bytes. A flat picture (one colour, a faint gradient) has no structure to hash: its bits would come from noise, or be the same for
            every colour. Its hash is a digest of these bytes instead, which equals no other picture's.
    """
    small_SS = np.asarray(Image.fromarray(grey_YX).resize((_SIDE, _SIDE), Image.Resampling.LANCZOS))
    if small_SS.std() < FLAT:
        return int.from_bytes(hashlib.blake2b(file, digest_size=8).digest(), "little")
    low_LL = _COSINES_LS @ small_SS.astype(np.int64) @ _COSINES_LS.T
    bits = low_LL > np.median(low_LL)
    return int.from_bytes(np.packbits(bits.ravel()).tobytes(), "big")
