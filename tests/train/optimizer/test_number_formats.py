"""The 16-bit formats 1-6-9 and 0-6-10: every code, the vectors of docs/paper.md 4 and 10.8, and rounding against exact arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train.optimizer.number_formats import SIGNED_169, UNSIGNED_0610, Format

FORMATS = pytest.mark.parametrize("fmt", [SIGNED_169, UNSIGNED_0610], ids=lambda f: f.name)
ALL_CODES = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16)


def exact(fmt: Format, code: int) -> Fraction:
    """The value by the definition, in exact arithmetic."""
    code &= 0xFFFF
    sign = -1 if fmt.signed and code & 0x8000 else 1
    code &= 0x7FFF if fmt.signed else 0xFFFF
    if code == 0:
        return Fraction(0)
    exponent, significand = code >> fmt.significand, code & ((1 << fmt.significand) - 1)
    return sign * Fraction(2) ** (exponent - 60) * (1 + Fraction(significand, 1 << fmt.significand))


def one(fmt: Format, value: float) -> float:
    return fmt.decode(fmt.encode(torch.tensor([value], dtype=torch.float32))).item()


@FORMATS
def test_every_code_comes_back(fmt: Format) -> None:
    assert torch.equal(fmt.encode(fmt.decode(ALL_CODES)), ALL_CODES)


@FORMATS
def test_values_are_those_of_the_definition(fmt: Format) -> None:
    values = fmt.decode(ALL_CODES).double().tolist()
    assert all(Fraction(value) == exact(fmt, code) for value, code in zip(values, ALL_CODES.tolist(), strict=True))


def test_the_vectors_of_the_paper_sheet() -> None:
    assert SIGNED_169.largest == 15.984375 and UNSIGNED_0610.largest == 15.9921875
    assert SIGNED_169.smallest == pytest.approx(8.6906e-19, rel=1e-4) and UNSIGNED_0610.smallest == pytest.approx(8.6821e-19, rel=1e-4)
    assert one(SIGNED_169, 1.0) == 1.0 and one(UNSIGNED_0610, 1.0) == 1.0 and one(SIGNED_169, -1.0) == -1.0
    assert SIGNED_169.encode(torch.tensor([1.0, -1.0])).tolist() == [60 << 9, (60 << 9) - 32768]
    assert UNSIGNED_0610.encode(torch.tensor([1.0])).tolist() == [(60 << 10) - 65536]
    assert one(SIGNED_169, 2.0**-60) == 0.0, "exactly 2**-60 would be code 0"


@FORMATS
def test_ties_go_away_from_zero(fmt: Format) -> None:
    step = 2.0**-fmt.significand
    assert one(fmt, 1 + step / 2) == 1 + step
    assert one(fmt, 1 + 1.5 * step) == 1 + 2 * step, "to even would go down"
    assert one(fmt, math.nextafter(1 + step / 2, 0.0) - 1e-7) == 1.0
    if fmt.signed:
        assert one(fmt, -1 - step / 2) == -1 - step


@FORMATS
def test_what_is_out_of_range_saturates_or_vanishes(fmt: Format) -> None:
    low = -fmt.largest if fmt.signed else 0.0
    assert one(fmt, float("inf")) == one(fmt, 16.0) == one(fmt, 1e30) == one(fmt, float("nan")) == fmt.largest
    assert one(fmt, -float("inf")) == one(fmt, -1e30) == low
    assert one(fmt, fmt.smallest) == fmt.smallest
    assert one(fmt, fmt.smallest * (1 - 1e-6)) == 0.0 and one(fmt, 1e-40) == 0.0
    assert UNSIGNED_0610.encode(torch.tensor([-3.0])).item() == 0


@FORMATS
@given(st.floats(min_value=2.0**-59, max_value=15.875, width=32), st.booleans())
def test_rounding_is_to_the_nearest_code(fmt: Format, value: float, negative: bool) -> None:
    if negative and fmt.signed:
        value = -value
    code = int(fmt.encode(torch.tensor([value])).item()) & 0xFFFF
    error = abs(exact(fmt, code) - Fraction(value))
    for neighbour in (code - 1, code + 1):
        if neighbour & (0x7FFF if fmt.signed else 0xFFFF) > 0:
            other = abs(exact(fmt, neighbour) - Fraction(value))
            assert error < other or (error == other and abs(exact(fmt, code)) > abs(exact(fmt, neighbour)))


def test_shapes_and_half_precision_inputs_are_kept() -> None:
    x = torch.randn(3, 5, dtype=torch.float16)
    assert SIGNED_169.decode(SIGNED_169.encode(x)).shape == (3, 5)
    assert torch.allclose(SIGNED_169.decode(SIGNED_169.encode(x)), x.float(), rtol=2**-10)
