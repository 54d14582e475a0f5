"""The loops of train/optimizer/adamw_cpu.py, in the subset of Python that numba compiles, and the LLVM operations that they need: fused multiply-add, and access to
the bits of a float."""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import float32, int16
from numba.extending import intrinsic

from train.optimizer.number_formats import SIGNED_169, UNSIGNED_0610, Format

_FLOAT, _INT32, _INT16 = ir.FloatType(), ir.IntType(32), ir.IntType(16)


def _word(value: int) -> ir.Constant:
    return ir.Constant(_INT32, value & 0xFFFF_FFFF)


@intrinsic
def fused(context, a, b, c):
    """a * b + c, rounded once."""

    def generate(context, builder, signature, arguments):
        return builder.fma(*arguments)

    return float32(float32, float32, float32), generate


def _decoder(fmt: Format) -> Any:
    """``Format.decode`` of one code."""

    @intrinsic
    def decode(context, code):
        def generate(context, builder, signature, arguments):
            bits = builder.zext(arguments[0], _INT32)
            magnitude = builder.and_(bits, _word(0x7FFF)) if fmt.signed else bits
            value = builder.shl(builder.add(magnitude, _word(fmt.rebias)), _word(fmt.shift))
            value = builder.select(builder.icmp_unsigned("==", magnitude, _word(0)), _word(0), value)
            if fmt.signed:
                value = builder.or_(value, builder.shl(builder.and_(bits, _word(0x8000)), _word(16)))
            return builder.bitcast(value, _FLOAT)

        return float32(int16), generate

    return decode


def _encoder(fmt: Format) -> Any:
    """``Format.encode`` of one value."""

    @intrinsic
    def encode(context, value):
        def generate(context, builder, signature, arguments):
            largest, lowest = (ir.Constant(_FLOAT, x) for x in (fmt.largest, -fmt.largest if fmt.signed else 0.0))
            x = arguments[0]
            x = builder.select(builder.fcmp_unordered("uno", x, x), largest, x)
            x = builder.select(builder.fcmp_ordered(">", x, largest), largest, x)
            x = builder.select(builder.fcmp_ordered("<", x, lowest), lowest, x)
            bits = builder.bitcast(x, _INT32)
            magnitude = builder.and_(bits, _word(0x7FFF_FFFF))
            code = builder.sub(builder.lshr(builder.add(magnitude, _word(1 << (fmt.shift - 1))), _word(fmt.shift)), _word(fmt.rebias))
            is_small = builder.fcmp_ordered("<", builder.bitcast(magnitude, _FLOAT), ir.Constant(_FLOAT, fmt.smallest))
            code = builder.select(is_small, _word(0), code)
            if fmt.signed:
                code = builder.or_(code, builder.and_(builder.lshr(bits, _word(16)), _word(0x8000)))
            return builder.trunc(code, _INT16)

        return int16(float32), generate

    return encode


_decode_mean, _encode_mean = _decoder(SIGNED_169), _encoder(SIGNED_169)
_decode_variance, _encode_variance = _decoder(UNSIGNED_0610), _encoder(UNSIGNED_0610)


def plain_moments(grad, mean, variance, mean_out, variance_out, factor, weight1, beta2, weight2, clip):
    """Compute the new moments in fp32; they are written in place and to the two output arrays."""
    for i in range(grad.shape[0]):
        g = grad[i] * factor
        m, v = mean[i], fused(weight2 * g, g, variance[i] * beta2)
        # Like torch.lerp, which starts from the nearer of the two ends.
        m = fused(weight1, g - m, m) if weight1 < np.float32(0.5) else fused(weight1 - np.float32(1), g - m, g)
        v = clip if v > clip else v
        mean[i] = mean_out[i] = m
        variance[i] = variance_out[i] = v


def packed_moments(grad, mean, variance, mean_out, variance_out, factor, weight1, beta2, weight2, clip):
    """Compute the new moments; they are written in place as 16-bit codes, and to the two output arrays in fp32, as they are before rounding."""
    for i in range(grad.shape[0]):
        g = grad[i] * factor
        m, v = _decode_mean(mean[i]), fused(weight2 * g, g, _decode_variance(variance[i]) * beta2)
        m = fused(weight1, g - m, m) if weight1 < np.float32(0.5) else fused(weight1 - np.float32(1), g - m, g)
        v = clip if v > clip else v
        mean_out[i], variance_out[i] = m, v
        mean[i], variance[i] = _encode_mean(m), _encode_variance(v)


def step(p, mean, root, inverse_correction, eps, decay, rate):
    """Compute the new master weights, in place."""
    for i in range(p.shape[0]):
        p[i] = p[i] * decay + (rate * mean[i]) / (root[i] * inverse_correction + eps)
