"""AREA resizing as in TensorFlow with ``align_corners=True``, computed for a part of the result only, and compiled by numba.

Along one axis of ``in`` input and ``out`` output pixels the scale is ``s = (in - 1) / (out - 1)``. Output pixel i is the integral of the piecewise constant
input over ``[i s, (i + 1) s]``, divided by s. For in > out, s exceeds in / out, so the last interval ends past the last pixel, which is then repeated.

The axes are independent, so an output pixel depends on a few neighbouring rows and columns only, its taps. Libraries do not do the same: OpenCV's AREA does
not align corners (and is slower), and matrix products multiply mostly by zeros. DECISIONS.md has the figures.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

_UNROLLED = (3,)
"""Numbers of taps for which the loops are compiled separately. Three taps suffice for any scale up to two, which most pictures have."""
_COMPILING = threading.Lock()

Pixels = NDArray[np.uint8]
"""An image: uint8, height x width x 3, RGB."""


@lru_cache(maxsize=1024)
def taps(size_in: int, size_out: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Input pixels and weights of AREA resizing along one axis.

    Returns:
        first: int64 [size_out], the first input pixel of each output pixel.
        weights: float32 [size_out, n], the weights of ``n`` pixels from there on; each row sums to one.

    Raises:
        ValueError: a side is not positive, or the output is larger than the input.
    """
    if not 0 < size_out <= size_in:
        raise ValueError(f"area resize from {size_in} to {size_out} pixels: expected 0 < output <= input")
    # In units of 1 / (out - 1) input pixels all borders are integers, so that rounding cannot add a tap.
    span, cell = (size_in - 1, size_out - 1) if size_out > 1 else (size_in, 1)
    if span == 0:
        span = cell = 1
    starts = np.arange(size_out, dtype=np.int64)[:, None] * span
    lowest = starts // cell
    count = int(((starts + span + cell - 1) // cell - lowest).max())
    if count < min(_UNROLLED) <= size_in:
        count = min(_UNROLLED)  # the additional taps have weight zero
    cells = lowest + np.arange(count)
    overlap = np.minimum(starts + span, (cells + 1) * cell) - np.maximum(starts, cells * cell)
    shares = np.maximum(overlap, 0) / span
    first = np.minimum(lowest[:, 0], max(0, size_in - count))
    weights = np.zeros((size_out, min(count, size_in)))
    # Past the last pixel, the last pixel is repeated.
    np.add.at(weights, (np.arange(size_out)[:, None], np.minimum(cells, size_in - 1) - first[:, None]), shares)
    first.setflags(write=False)
    narrow = weights.astype(np.float32)
    narrow.setflags(write=False)
    return first, narrow


def resize(image: Pixels, box: tuple[int, int, int, int], side: int, offset: tuple[int, int], target: int, flip: bool = False) -> Pixels:
    """Resize a square of an image to ``side`` x ``side`` pixels and return a part of ``target`` x ``target`` pixels of it, rounded half to even.

    Args:
        image: uint8 [height, width, 3].
        box: the square: left, top, right, bottom, in pixels of ``image``.
        side: side of the resized square.
        offset: left and top of the part to return, in the resized square.
        target: side of the part.
        flip: mirror the part left to right.

    Raises:
        ValueError: the square is not inside the image, or the part not inside the resized square.
    """
    left, top, right, bottom = box
    height, width = image.shape[:2]
    if not (0 <= left < right <= width and 0 <= top < bottom <= height and right - left == bottom - top):
        raise ValueError(f"box {box} of an image of {width} x {height} pixels: expected a square inside it")
    x, y = offset
    if not (0 <= x <= side - target and 0 <= y <= side - target and target > 0):
        raise ValueError(f"part of {target} pixels at {offset} of a square resized to {side}: expected it to lie inside")
    first, weights = taps(right - left, side)
    columns, column_weights = first[x : x + target], weights[x : x + target]
    start = int(columns[0])
    columns = columns - start
    if flip:
        columns, column_weights = columns[::-1].copy(), column_weights[::-1].copy()
    # One byte longer, because pixels are written four bytes at a time; the next pixel overwrites the fourth.
    out = np.empty(target * target * 3 + 1, np.uint8)
    rows = np.ascontiguousarray(image).reshape(height, width * 3)
    _kernel(weights.shape[1])(rows, top + first[y : y + target], weights[y : y + target], (left + start) * 3, 3 * columns, column_weights, out)
    return out[:-1].reshape(target, target, 3)


def _kernel(count: int) -> Callable[..., None]:
    """The compiled loops of ``resize`` for ``count`` taps. They are compiled once in a process (about a second, or read from numba's cache); thread-safe."""
    with _COMPILING:
        return _compiled(count if count in _UNROLLED else 0)


@lru_cache
def _compiled(known: int) -> Callable[..., None]:
    import numba  # here, because the import takes 0.2 s, which processes that never resize need not spend
    from numba import float32, int64, types, uint8

    def read_only(dtype: Any, axes: int) -> Any:
        return types.Array(dtype, axes, "C", readonly=True)

    indices, weights = read_only(int64, 1), read_only(float32, 2)
    signature = types.void(read_only(uint8, 2), indices, weights, int64, indices, weights, uint8[::1])
    # No fastmath, which reorders sums and fuses products: pixels must not depend on the features of the processor.
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    settings: Any = numba.config
    before, settings.SLP_VECTORIZE = settings.SLP_VECTORIZE, 1  # vectorises over the channels of a pixel; off by default in numba
    try:
        return numba.njit(signature, cache=True, **options)(_loops(known))
    except RuntimeError as error:
        if "cannot cache" not in str(error):
            raise
        return numba.njit(signature, **options)(_loops(known))  # numba's cache is not writable: compile in each process
    finally:
        settings.SLP_VECTORIZE = before


def _loops(known: int) -> Callable[..., None]:
    """The loops of ``resize``, in the subset of Python that numba compiles, for ``known`` taps; 0: for any number of taps."""
    from numba import uintp  # unsigned indices, for which numba skips the test for negative ones

    def loops(rows: Any, row_first: Any, row_weights: Any, start: Any, columns: Any, column_weights: Any, out: Any) -> None:
        height, width = row_first.shape[0], columns.shape[0]
        count = known if known else row_weights.shape[1]
        needed = max(columns[0], columns[width - 1]) + 3 * count
        line = np.zeros(needed + 1, np.float32)  # the weighted sum of some input rows
        place = uintp(0)
        for y in range(height):
            row = rows[row_first[y], start : start + needed]
            weight = row_weights[y, 0]
            for x in range(needed):
                line[x] = weight * np.float32(row[x])
            for tap in range(1, count):
                row = rows[row_first[y] + tap, start : start + needed]
                weight = row_weights[y, tap]
                for x in range(needed):
                    line[x] += weight * np.float32(row[x])
            for x in range(width):
                # Four channels (the fourth is not used) fill a vector register; three would not be vectorised.
                red = green = blue = more = np.float32(0)
                at = uintp(columns[x])
                for tap in range(count):
                    weight = column_weights[x, tap]
                    red += weight * line[at]
                    green += weight * line[at + uintp(1)]
                    blue += weight * line[at + uintp(2)]
                    more += weight * line[at + uintp(3)]
                    at += uintp(3)
                out[place] = np.uint8(np.int32(np.rint(red)))
                out[place + uintp(1)] = np.uint8(np.int32(np.rint(green)))
                out[place + uintp(2)] = np.uint8(np.int32(np.rint(blue)))
                out[place + uintp(3)] = np.uint8(np.int32(np.rint(more)))
                place += uintp(3)

    return loops
