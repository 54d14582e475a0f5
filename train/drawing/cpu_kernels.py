"""The arithmetic of drawing on a CPU for few positions at a time, compiled by numba: one call computes a layer, and reads its weights once.

Torch's products of one row reach a third of the memory bandwidth, and the overhead of each of its many small operations is as large as the arithmetic.
Every position is computed by the same sums in the same order, whatever else is computed in the pass, so the result does not depend on batches or windows.

R rows = B pictures x Q states of each, D width, E outputs, H heads, K width of a head, C captions of T states, P places of past states, N codes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba import prange
from numba.core import event

from model import gumbel

PLAIN, ADDED, GELU = 0, 1, 2
"""What is done with a product: it replaces the output, is added to it, or replaces it after quick GELU."""

# The compiler may reorder sums and fuse products. It must not assume that there are no NaNs, because they have to reach the output.
_FAST_MATH = {"reassoc", "contract", "nsz", "arcp"}
_GELU_SLOPE = np.float32(1.702)
_LOG2_E = np.float32(1.44269504)
# 2^r for r in [-0.5, 0.5], with a relative error of 2e-7 (Cephes, exp2f).
_POWERS = tuple(np.float32(x) for x in (1.535336188319500e-4, 1.339887440266574e-3, 9.618437357674640e-3, 5.550332471162809e-2, 2.402264791363012e-1))
_LN_2, _ONE, _HALF = np.float32(6.931472028550421e-1), np.float32(1), np.float32(0.5)
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
_LARGEST_POWER, _BIAS, _MANTISSA_BITS = np.float32(126), np.int32(127), np.int32(23)


def _compiled(**options: Any) -> Callable[[Any], Any]:
    """numba.njit that keeps its result on disk, if there is a folder that it can write to."""

    def compile_(function: Any) -> Any:
        settings = {"fastmath": _FAST_MATH, "error_model": "numpy"} | options
        try:
            return numba.njit(cache=True, **settings)(function)
        except RuntimeError as error:
            if "cannot cache" not in str(error):
                raise
            return numba.njit(**settings)(function)

    return compile_


class _First(event.Listener):
    """Calls a function when the first kernel is compiled. Those that are on disk are not."""

    say: Callable[[], None] | None = None

    def on_start(self, event: Any) -> None:
        """numba begins to compile."""
        say, self.say = self.say, None
        if say is not None:
            say()

    def on_end(self, event: Any) -> None:
        """numba has compiled."""


_FIRST = _First()
event.register("numba:compile", _FIRST)


def when_compiling(say: Callable[[], None]) -> None:
    """Call a function once, when this process next begins to compile a kernel."""
    _FIRST.say = say


def use_threads(count: int) -> None:
    """Like torch.set_num_threads, but at most as many as there are cores."""
    numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))


@_compiled()
def _exp(x: Any) -> Any:
    """e^x, written so that the compiler can vectorise it, which it cannot do with a call of the C library."""
    y = x * _LOG2_E
    y = y if y > -_LARGEST_POWER else -_LARGEST_POWER
    y = y if y < _LARGEST_POWER else _LARGEST_POWER
    whole = np.floor(y + _HALF)
    r = y - whole
    p = _POWERS[0]
    p = p * r + _POWERS[1]
    p = p * r + _POWERS[2]
    p = p * r + _POWERS[3]
    p = p * r + _POWERS[4]
    p = p * r + _LN_2
    p = p * r + _ONE
    power = p * np.int32((np.int32(whole) + _BIAS) << _MANTISSA_BITS).view(np.float32)
    return power if x == x else x


@_compiled()
def _dot(a_D: Any, b_D: Any) -> Any:
    total = np.float32(0)
    for d in range(a_D.shape[0]):
        total += np.float32(a_D[d]) * b_D[d]
    return total


@_compiled()
def _norm(x_RD: Any, weight_D: Any, bias_D: Any, eps: float, out_RD: Any) -> None:
    width = x_RD.shape[1]
    for r in range(x_RD.shape[0]):
        total = np.float32(0)
        for d in range(width):
            total += x_RD[r, d]
        mean = total / np.float32(width)
        squares = np.float32(0)
        for d in range(width):
            squares += (x_RD[r, d] - mean) * (x_RD[r, d] - mean)
        scale = _ONE / np.sqrt(squares / np.float32(width) + np.float32(eps))
        for d in range(width):
            out_RD[r, d] = (x_RD[r, d] - mean) * scale * weight_D[d] + bias_D[d]


@_compiled()
def _norm_heads(qkv_RE: Any, part: int, gain_K: Any, eps: float) -> None:
    """Normalise each head of the queries (part 0) or of the keys (part 1) in place."""
    width, size = qkv_RE.shape[1] // 3, gain_K.shape[0]
    for r in range(qkv_RE.shape[0]):
        for first in range(part * width, (part + 1) * width, size):
            total = np.float32(0)
            for k in range(size):
                total += qkv_RE[r, first + k]
            mean = total / np.float32(size)
            squares = np.float32(0)
            for k in range(size):
                squares += (qkv_RE[r, first + k] - mean) * (qkv_RE[r, first + k] - mean)
            scale = _ONE / np.sqrt(squares / np.float32(size) + np.float32(eps))
            for k in range(size):
                qkv_RE[r, first + k] = (qkv_RE[r, first + k] - mean) * scale * gain_K[k]


@_compiled()
def _turn_heads(qkv_RE: Any, turns: Any, first_B: Any, text: int, head_width: int) -> None:
    """Turn queries and keys by their places in place (model/queries.py); states beyond the last turn as the last."""
    states, width = qkv_RE.shape[0] // first_B.shape[0], qkv_RE.shape[1] // 3
    for r in range(qkv_RE.shape[0]):
        at = min(text + first_B[r // states] + r % states, turns.shape[1] - 1)
        for part in range(2):
            for head in range(part * width, (part + 1) * width, head_width):
                for k in range(head_width // 2):
                    cos, sin = turns[part, at, k, 0], turns[part, at, k, 1]
                    a, b = qkv_RE[r, head + 2 * k], qkv_RE[r, head + 2 * k + 1]
                    qkv_RE[r, head + 2 * k] = a * cos - b * sin
                    qkv_RE[r, head + 2 * k + 1] = b * cos + a * sin


@_compiled(parallel=True)
def _product(x_RD: Any, weight_ED: Any, scale_E: Any, bias_E: Any, out_RE: Any, then: int) -> None:
    """``x @ (weight * scale).T + bias``; each weight is read from memory once, for all rows."""
    for e in prange(weight_ED.shape[0]):
        for r in range(x_RD.shape[0]):
            value = _dot(weight_ED[e], x_RD[r]) * scale_E[e] + bias_E[e]
            if then == ADDED:
                out_RE[r, e] += value
            else:
                out_RE[r, e] = value
    if then == GELU:
        flat = out_RE.reshape(-1)
        for i in range(flat.shape[0]):
            flat[i] = flat[i] / (_ONE + _exp(-_GELU_SLOPE * flat[i]))


@_compiled()
def _softmax(scores_P: Any, count: int) -> None:
    largest = scores_P[0]
    for i in range(1, count):
        largest = max(largest, scores_P[i])
    total = np.float32(0)
    for i in range(count):
        scores_P[i] = _exp(scores_P[i] - largest)
    for i in range(count):
        total += scores_P[i]
    for i in range(count):
        scores_P[i] /= total


@_compiled()
def place_of(state: int, places: int, grid: int, is_transposed: bool) -> int:
    """See ``PastCache.place``."""
    return state % grid * grid + state // grid if is_transposed else state % places


@_compiled(parallel=True)
def _attend(
    qkv_RE: Any, text_k_CHTK: Any, text_v_CHTK: Any, caption_B: Any, past_k_BHPK: Any, past_v_BHPK: Any, first_B: Any, offsets: Any, grid: int,
    is_transposed: bool, out_RD: Any,
) -> None:  # fmt: skip
    """Sums over the text first, and then over image positions from the oldest on. The order is the same for any window, whether a position is in the cache or is
    computed in the same pass."""
    pictures, heads, places, head_width = past_k_BHPK.shape
    width, text, states = heads * head_width, text_k_CHTK.shape[2], qkv_RE.shape[0] // pictures
    for bh in prange(pictures * heads):
        b, h = bh // heads, bh % heads
        c, first, columns = caption_B[b], first_B[b], slice(h * head_width, (h + 1) * head_width)
        scores = np.empty(text + offsets.shape[0], np.float32)
        query = np.empty(head_width, np.float32)
        for q in range(states):
            row, state = b * states + q, first + q
            out = out_RD[row, columns]
            query[:] = qkv_RE[row, columns] / np.float32(np.sqrt(head_width))
            for t in range(text):
                scores[t] = _dot(text_k_CHTK[c, h, t], query)
            count = text
            for d in offsets:
                key = state - d
                if key >= first:
                    scores[count] = _dot(qkv_RE[b * states + key - first, width + h * head_width : width + (h + 1) * head_width], query)
                    count += 1
                elif key >= 0:
                    scores[count] = _dot(past_k_BHPK[b, h, place_of(key, places, grid, is_transposed)], query)
                    count += 1
            _softmax(scores, count)
            out[:] = np.float32(0)
            for t in range(text):
                _add(out, scores[t], text_v_CHTK[c, h, t])
            count = text
            for d in offsets:
                key = state - d
                if key >= first:
                    _add(out, scores[count], qkv_RE[b * states + key - first, 2 * width + h * head_width : 2 * width + (h + 1) * head_width])
                    count += 1
                elif key >= 0:
                    _add(out, scores[count], past_v_BHPK[b, h, place_of(key, places, grid, is_transposed)])
                    count += 1


@_compiled()
def _add(out_K: Any, weight: Any, value_K: Any) -> None:
    for k in range(out_K.shape[0]):
        out_K[k] += weight * value_K[k]


@_compiled()
def keep(qkv_RE: Any, past_k_BHPK: Any, past_v_BHPK: Any, first_B: Any, counts_B: Any, grid: int, is_transposed: bool) -> None:
    """Store keys and values of the first positions of a pass in the cache, the oldest first."""
    pictures, heads, places, head_width = past_k_BHPK.shape
    width, states = heads * head_width, qkv_RE.shape[0] // pictures
    if places == 0:
        return
    for b in range(pictures):
        for q in range(counts_B[b]):
            at, row = place_of(first_B[b] + q, places, grid, is_transposed), b * states + q
            for h in range(heads):
                past_k_BHPK[b, h, at] = qkv_RE[row, width + h * head_width : width + (h + 1) * head_width]
                past_v_BHPK[b, h, at] = qkv_RE[row, 2 * width + h * head_width : 2 * width + (h + 1) * head_width]


@_compiled()
def embed(codes_BI: Any, first_B: Any, codes_ND: Any, rows_WD: Any, columns_WD: Any, start_1D: Any, out_RD: Any) -> None:
    """Input states of image slots. Slot 0 holds the start, every other slot the code before it. Slots beyond the last repeat the last."""
    pictures, grid = first_B.shape[0], rows_WD.shape[0]
    states = out_RD.shape[0] // pictures
    for b in range(pictures):
        for q in range(states):
            out, before = out_RD[b * states + q], min(first_B[b] + q - 1, codes_BI.shape[1] - 1)
            if before < 0:
                out[:] = start_1D[0]
            else:
                code = codes_ND[codes_BI[b, before]]
                for d in range(out.shape[0]):
                    out[d] = code[d] + (rows_WD[before // grid, d] + columns_WD[before % grid, d])


@_compiled()
def layer(
    x_RD: Any, norms: Any, eps: Any, gains: Any, turns: Any, matrices: Any, texts: Any, past: Any, places: Any, scratch: Any, qkv_RE: Any
) -> None:
    """Compute one layer on the states ``x``, in place.

    Args:
        norms: weight and bias of the norms before attention and before the MLP.
        eps: epsilon of both norms, and of those of queries and keys.
        gains: [K] of the norms of queries and of keys; empty arrays if there are none.
        turns: [2, S, K/2, 2] of rotary positions; an empty array if there are none.
        matrices: (weight, scale, bias) of queries, keys and values, of the projection after attention, and of the two of the MLP.
        texts: keys, values [C, H, T, K], and the caption of each picture.
        past: keys and values [B, H, P, K].
        places: the first position of each picture; the distances that the mask allows, the largest first; the grid; whether the cache stores column by column.
        scratch: buffers [R, D], [R, D], [R, 4 D].
        qkv_RE: receives queries, keys and values.
    """
    (weight_1, bias_1), (weight_2, bias_2) = norms
    qkv, post, mlp_1, mlp_2 = matrices
    text_k, text_v, caption_B = texts
    first_B, offsets, grid, is_transposed = places
    normed_RD, out_RD, inner_RF = scratch
    _norm(x_RD, weight_1, bias_1, eps[0], normed_RD)
    _product(normed_RD, qkv[0], qkv[1], qkv[2], qkv_RE, PLAIN)
    for part in range(2):
        if gains[part].shape[0]:
            _norm_heads(qkv_RE, part, gains[part], eps[2])
    if turns.shape[1]:
        _turn_heads(qkv_RE, turns, first_B, text_k.shape[2], text_k.shape[3])
    _attend(qkv_RE, text_k, text_v, caption_B, past[0], past[1], first_B, offsets, grid, is_transposed, out_RD)
    _product(out_RD, post[0], post[1], post[2], x_RD, ADDED)
    _norm(x_RD, weight_2, bias_2, eps[1], normed_RD)
    _product(normed_RD, mlp_1[0], mlp_1[1], mlp_1[2], inner_RF, GELU)
    _product(inner_RF, mlp_2[0], mlp_2[1], mlp_2[2], x_RD, ADDED)


@_compiled()
def head(x_RD: Any, norm: Any, eps: float, matrix: Any, normed_RD: Any, out_RN: Any) -> None:
    """Logits of the next codes."""
    _norm(x_RD, norm[0], norm[1], eps, normed_RD)
    _product(normed_RD, matrix[0], matrix[1], matrix[2], out_RN, PLAIN)


@_compiled()
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
    return z + (p * z * z * z - _HALF * z * z)


@_compiled()
def _log(x: Any) -> Any:
    """Logarithm of a positive, normal number, without a call of the C library."""
    above = np.int32(np.float32(x).view(np.int32) - _SQRT_HALF_BITS)
    power = np.int32(above >> _MANTISSA_BITS)
    z = np.int32(np.float32(x).view(np.int32) - np.int32(power << _MANTISSA_BITS)).view(np.float32) - _ONE
    whole = np.float32(power)
    return _log_near_one(z) + whole * _LN_2_LOW + whole * _LN_2_HIGH


@_compiled()
def _uniform(key: Any, counter: Any) -> Any:
    """A uniform number from a mixed seed and a counter, as in ``gumbel_noise``."""
    x = counter * _WEYL + key
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    x = x ^ (x >> np.uint64(31))
    return (np.float32(np.int64(x >> np.uint64(11))) + _HALF) * _UNIT


@_compiled()
def _gumbel(uniform: Any) -> Any:
    # Not min(), and not a choice between two calls: with either, the compiler cannot vectorise the loop around this.
    u = uniform if uniform < _LARGEST else _LARGEST
    is_near = np.float32(u < _NEAR)
    return -_log(-(_log_near_one(-u) * is_near + _log(_ONE - u) * (_ONE - is_near)))


@_compiled(parallel=True)
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
