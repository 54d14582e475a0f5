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

PLAIN, ADDED, GELU = 0, 1, 2
"""What is done with a product: it replaces the output, is added to it, or replaces it after quick GELU."""

# The compiler may reorder sums and fuse products. It must not assume that there are no NaNs, because they have to reach the output.
_FAST_MATH = {"reassoc", "contract", "nsz", "arcp"}
_GELU_SLOPE = np.float32(1.702)
_LOG2_E = np.float32(1.44269504)
# 2^r for r in [-0.5, 0.5], with a relative error of 2e-7 (Cephes, exp2f).
_POWERS = tuple(np.float32(x) for x in (1.535336188319500e-4, 1.339887440266574e-3, 9.618437357674640e-3, 5.550332471162809e-2, 2.402264791363012e-1))
_LN_2, ONE, HALF = np.float32(6.931472028550421e-1), np.float32(1), np.float32(0.5)
_LEAST, _GREATEST, _SIGN = np.int32(-(2**31)), np.int32(2**31 - 1), np.int32(31)
_LARGEST_POWER, _BIAS, MANTISSA_BITS = np.float32(126), np.int32(127), np.int32(23)


def compiled(**options: Any) -> Callable[[Any], Any]:
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


@compiled()
def _exp(x: Any) -> Any:
    """e^x, written so that the compiler can vectorise it, which it cannot do with a call of the C library."""
    y = x * _LOG2_E
    y = y if y > -_LARGEST_POWER else -_LARGEST_POWER
    y = y if y < _LARGEST_POWER else _LARGEST_POWER
    whole = np.floor(y + HALF)
    r = y - whole
    p = _POWERS[0]
    p = p * r + _POWERS[1]
    p = p * r + _POWERS[2]
    p = p * r + _POWERS[3]
    p = p * r + _POWERS[4]
    p = p * r + _LN_2
    p = p * r + ONE
    power = p * np.int32((np.int32(whole) + _BIAS) << MANTISSA_BITS).view(np.float32)
    return power if x == x else x


@compiled()
def _dot(a_D: Any, b_D: Any) -> Any:
    total = np.float32(0)
    for d in range(a_D.shape[0]):
        total += np.float32(a_D[d]) * b_D[d]
    return total


@compiled()
def norm(x_RD: Any, weight_D: Any, bias_D: Any, eps: float, out_RD: Any) -> None:
    """Layer norm."""
    width = x_RD.shape[1]
    for r in range(x_RD.shape[0]):
        total = np.float32(0)
        for d in range(width):
            total += x_RD[r, d]
        mean = total / np.float32(width)
        squares = np.float32(0)
        for d in range(width):
            squares += (x_RD[r, d] - mean) * (x_RD[r, d] - mean)
        scale = ONE / np.sqrt(squares / np.float32(width) + np.float32(eps))
        for d in range(width):
            out_RD[r, d] = (x_RD[r, d] - mean) * scale * weight_D[d] + bias_D[d]


@compiled()
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
            scale = ONE / np.sqrt(squares / np.float32(size) + np.float32(eps))
            for k in range(size):
                qkv_RE[r, first + k] = (qkv_RE[r, first + k] - mean) * scale * gain_K[k]


@compiled()
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


@compiled()
def norm_and_turn(qkv_RE: Any, gains: Any, eps: float, turns: Any, first_B: Any, text: int, head_width: int) -> None:
    """Queries and keys as the model compares them, in place: normalised and turned, where it does so."""
    for part in range(2):
        if gains[part].shape[0]:
            _norm_heads(qkv_RE, part, gains[part], eps)
    if turns.shape[1]:
        _turn_heads(qkv_RE, turns, first_B, text, head_width)


@compiled()
def gelu(x_F: Any) -> None:
    """Quick GELU in place."""
    for i in range(x_F.shape[0]):
        x_F[i] = x_F[i] / (ONE + _exp(-_GELU_SLOPE * x_F[i]))


@compiled(parallel=True)
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
        gelu(out_RE.reshape(-1))


@compiled()
def _softmax(scores_P: Any, count: int) -> None:
    # Floats in the order of their bits, because a maximum of floats that may be NaN is not vectorised. A NaN is either the largest, or its exponential is NaN.
    bits_P, top = scores_P.view(np.int32), _LEAST
    for i in range(count):
        bits = np.int32(bits_P[i] ^ ((bits_P[i] >> _SIGN) & _GREATEST))
        top = bits if bits > top else top
    largest = np.int32(top ^ ((top >> _SIGN) & _GREATEST)).view(np.float32)
    total = np.float32(0)
    for i in range(count):
        scores_P[i] = _exp(scores_P[i] - largest)
    for i in range(count):
        total += scores_P[i]
    for i in range(count):
        scores_P[i] /= total


@compiled()
def place_of(state: int, places: int, grid: int, is_transposed: bool) -> int:
    """See ``PastCache.place``."""
    return state % grid * grid + state // grid if is_transposed else state % places


@compiled()
def _past_scores(qkv_RE: Any, past_k_PK: Any, query_K: Any, place: Any, columns: Any, offsets: Any, scores: Any, count: int) -> int:
    """Scores of the image positions that a state sees, the oldest first, from place ``count`` on. Returns the number of all scores. A position is in the cache, or
    is computed in the same pass."""
    first, base, state, places, grid, is_transposed = place
    for d in offsets:
        key = state - d
        if key >= first:
            scores[count] = _dot(qkv_RE[base + key - first, columns], query_K)
            count += 1
        elif key >= 0:
            scores[count] = _dot(past_k_PK[place_of(key, places, grid, is_transposed)], query_K)
            count += 1
    return count


@compiled()
def _add_past(qkv_RE: Any, past_v_PK: Any, place: Any, columns: Any, offsets: Any, scores: Any, count: int, out_K: Any) -> None:
    """Add the values of these positions by their probabilities."""
    first, base, state, places, grid, is_transposed = place
    for d in offsets:
        key = state - d
        if key >= first:
            _add(out_K, scores[count], qkv_RE[base + key - first, columns])
            count += 1
        elif key >= 0:
            _add(out_K, scores[count], past_v_PK[place_of(key, places, grid, is_transposed)])
            count += 1


@compiled(parallel=True)
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
        c, begin = caption_B[b], h * head_width
        keys, values = slice(width + begin, width + begin + head_width), slice(2 * width + begin, 2 * width + begin + head_width)
        scores = np.empty(text + offsets.shape[0], np.float32)
        query = np.empty(head_width, np.float32)
        for q in range(states):
            row = b * states + q
            place = (first_B[b], b * states, first_B[b] + q, places, grid, is_transposed)
            out = out_RD[row, begin : begin + head_width]
            query[:] = qkv_RE[row, begin : begin + head_width] / np.float32(np.sqrt(head_width))
            for t in range(text):
                scores[t] = _dot(text_k_CHTK[c, h, t], query)
            count = _past_scores(qkv_RE, past_k_BHPK[b, h], query, place, keys, offsets, scores, text)
            _softmax(scores, count)
            out[:] = np.float32(0)
            for t in range(text):
                _add(out, scores[t], text_v_CHTK[c, h, t])
            _add_past(qkv_RE, past_v_BHPK[b, h], place, values, offsets, scores, text, out)


@compiled(parallel=True)
def attend_past(
    qkv_RE: Any, text_BHQT: Any, past_k_BHPK: Any, past_v_BHPK: Any, first_B: Any, offsets: Any, grid: int, is_transposed: bool, out_RD: Any
) -> None:
    """What of attention belongs to each picture alone. ``text_BHQT`` holds the scores of its caption, and receives their probabilities; ``out`` receives the sum
    over image positions."""
    pictures, heads, places, head_width = past_k_BHPK.shape
    width, text, states = heads * head_width, text_BHQT.shape[3], qkv_RE.shape[0] // pictures
    for bh in prange(pictures * heads):
        b, h = bh // heads, bh % heads
        begin = h * head_width
        keys, values = slice(width + begin, width + begin + head_width), slice(2 * width + begin, 2 * width + begin + head_width)
        scores = np.empty(text + offsets.shape[0], np.float32)
        query = np.empty(head_width, np.float32)
        for q in range(states):
            row = b * states + q
            place = (first_B[b], b * states, first_B[b] + q, places, grid, is_transposed)
            out = out_RD[row, begin : begin + head_width]
            query[:] = qkv_RE[row, begin : begin + head_width] / np.float32(np.sqrt(head_width))
            scores[:text] = text_BHQT[b, h, q]
            count = _past_scores(qkv_RE, past_k_BHPK[b, h], query, place, keys, offsets, scores, text)
            _softmax(scores, count)
            text_BHQT[b, h, q] = scores[:text]
            out[:] = np.float32(0)
            _add_past(qkv_RE, past_v_BHPK[b, h], place, values, offsets, scores, text, out)


@compiled()
def _add(out_K: Any, weight: Any, value_K: Any) -> None:
    for k in range(out_K.shape[0]):
        out_K[k] += weight * value_K[k]


@compiled()
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


@compiled()
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


@compiled()
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
    norm(x_RD, weight_1, bias_1, eps[0], normed_RD)
    _product(normed_RD, qkv[0], qkv[1], qkv[2], qkv_RE, PLAIN)
    norm_and_turn(qkv_RE, gains, eps[2], turns, first_B, text_k.shape[2], text_k.shape[3])
    _attend(qkv_RE, text_k, text_v, caption_B, past[0], past[1], first_B, offsets, grid, is_transposed, out_RD)
    _product(out_RD, post[0], post[1], post[2], x_RD, ADDED)
    norm(x_RD, weight_2, bias_2, eps[1], normed_RD)
    _product(normed_RD, mlp_1[0], mlp_1[1], mlp_1[2], inner_RF, GELU)
    _product(inner_RF, mlp_2[0], mlp_2[1], mlp_2[2], x_RD, ADDED)


@compiled()
def head(x_RD: Any, gain_and_bias: Any, eps: float, matrix: Any, normed_RD: Any, out_RN: Any) -> None:
    """Logits of the next codes."""
    norm(x_RD, gain_and_bias[0], gain_and_bias[1], eps, normed_RD)
    _product(normed_RD, matrix[0], matrix[1], matrix[2], out_RN, PLAIN)
