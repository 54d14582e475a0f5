"""The paper's two 16-bit storage formats: 1-6-9 (signed) and 0-6-10 (unsigned), sign-exponent-significand bits (paper B.2, E.2; docs/paper.md 4).

    1-6-9    +-2**(e - 60) * (1 + m / 512)     bit 15 sign, 14 to 9 exponent, 8 to 0 significand; largest 15.984375
    0-6-10     2**(e - 60) * (1 + m / 1024)    bits 15 to 10 exponent, 9 to 0 significand;        largest 15.9921875

The bias is 60. There are no subnormals, infinities or NaN. Code 0 is zero, so 2**-60 itself cannot be stored. Magnitudes below the smallest become zero, those above
the largest and infinities become the largest, NaN becomes the largest value. Rounding is to nearest, ties away from zero. Codes are stored as the bits of int16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_BIAS, _FLOAT_BIAS, _FLOAT_SIGNIFICAND = 60, 127, 23
_MAGNITUDE = 0x7FFF_FFFF


@dataclass(frozen=True)
class Format:
    """One of the two formats. ``encode`` and ``decode`` work elementwise on tensors of any shape."""

    name: str
    significand: int
    """Number of bits of the significand."""
    signed: bool

    @property
    def largest(self) -> float:
        """Largest value: 2**3 * (2 - 2**-significand)."""
        return 8.0 * (2.0 - 2.0**-self.significand)

    @property
    def smallest(self) -> float:
        """Smallest value above zero: code 1."""
        return 2.0**-_BIAS * (1.0 + 2.0**-self.significand)

    @property
    def shift(self) -> int:
        """How many bits of a float32's significand the format drops."""
        return _FLOAT_SIGNIFICAND - self.significand

    @property
    def rebias(self) -> int:
        """What is subtracted from the shifted bits of a float32 to get a code."""
        return (_FLOAT_BIAS - _BIAS) << self.significand

    def encode(self, x: Tensor) -> Tensor:
        """Convert floating-point values to codes (int16)."""
        x = x.float()
        low = -self.largest if self.signed else 0.0
        bits = x.nan_to_num(self.largest, self.largest, low).clamp(low, self.largest).view(torch.int32)
        magnitude = bits & _MAGNITUDE
        code = ((magnitude + (1 << (self.shift - 1))) >> self.shift) - self.rebias
        code = torch.where(magnitude.view(torch.float32) < self.smallest, 0, code)
        if self.signed:
            code |= (bits >> 16) & 0x8000
        return code.to(torch.int16)

    def decode(self, code: Tensor) -> Tensor:
        """Convert codes to values (float32)."""
        bits = code.to(torch.int32) & 0xFFFF
        magnitude = bits & 0x7FFF if self.signed else bits
        value = torch.where(magnitude == 0, 0, (magnitude + self.rebias) << self.shift)
        if self.signed:
            value |= (bits & 0x8000) << 16
        return value.view(torch.float32)


SIGNED_169 = Format("1-6-9", 9, True)
"""For Adam's mean, and for what PowerSGD sends."""
UNSIGNED_0610 = Format("0-6-10", 10, False)
"""For Adam's variance."""
