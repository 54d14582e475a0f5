"""Finds the 64-bit hashes that lie within a Hamming distance of an earlier one. The search is exact; it uses multi-index hashing (Norouzi et al. 2012).

If hashes are cut into m bands, two hashes at distance ``bits`` differ in at most ``bits // m`` bits in at least one band. So for each band and each way to
flip that many bits, a hash looks up the hashes with the flipped band, and only those are compared in full.

Letters: N hashes, U distinct hashes, R of these at a time, A of these with a match in the band, C comparisons, E comparisons with an earlier hash.
"""

from __future__ import annotations

import itertools
from math import comb

import numpy as np
from numpy.typing import NDArray

MAX_BITS = 7
"""Larger distances would need many more look-ups."""

_BANDS = (3, 4, 5)  # numbers of bands to choose from; a band has at most 22 bits, so that the table of its values stays small
_ROWS = 1 << 20  # look-ups at a time
_COMPARISONS = 1 << 21  # comparisons at a time
_LOOK_UP_COST = 3.0  # cost of one look-up, measured in comparisons


def near_duplicates(hashes_N: NDArray[np.uint64], bits: int) -> NDArray[np.int64]:
    """For each hash the smallest index of an earlier one within ``bits``, or -1.

    Args:
        hashes_N: uint64 hashes in order of arrival.
        bits: largest Hamming distance, 0 to ``MAX_BITS``.

    Returns:
        int64 [N]. Memory is O(N).

    Raises:
        ValueError: ``bits`` is out of range, or the hashes are not a vector of uint64.
    """
    if not 0 <= bits <= MAX_BITS:
        raise ValueError(f"bits = {bits}: expected 0 to {MAX_BITS}")
    if hashes_N.ndim != 1 or hashes_N.dtype != np.uint64:
        raise ValueError(f"hashes of dtype {hashes_N.dtype} and shape {hashes_N.shape}: expected a vector of uint64")
    # Equal hashes are merged first, because a cluster of them would make the number of comparisons quadratic.
    values_U, first_U, rank_N = np.unique(hashes_N, return_index=True, return_inverse=True)
    arrival_U = np.argsort(first_U)
    nearest_U = first_U.astype(np.int64)
    if bits:
        nearest_U[arrival_U] = first_U[arrival_U][_nearest(values_U[arrival_U], bits)]
    found_N = nearest_U[rank_N]
    return np.where(found_N < np.arange(len(hashes_N)), found_N, -1)


def _nearest(values_U: NDArray[np.uint64], bits: int) -> NDArray[np.int64]:
    """For each of some distinct values, in order of arrival: the smallest position of a value within ``bits`` of it; its own position if there is none before."""
    count = len(values_U)
    best_U = np.arange(count)
    bands = min(_BANDS, key=lambda number: _cost(count, bits, number))
    edges = np.linspace(0, 64, bands + 1).astype(int).tolist()
    for low, high in itertools.pairwise(edges):
        keys_U = ((values_U >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)).astype(np.int32)
        order_U = np.argsort(keys_U, kind="stable")  # by band, then by arrival
        starts = np.concatenate(([0], np.cumsum(np.bincount(keys_U, minlength=1 << (high - low)))))
        for flips in range(bits // bands + 1):
            for places in itertools.combinations(range(high - low), flips):
                flip = sum(1 << place for place in places)
                for row in range(0, count, _ROWS):
                    targets_R = keys_U[row : row + _ROWS] ^ flip
                    _look_up(values_U, best_U, order_U, row, starts[targets_R], starts[targets_R + 1], bits)
    return best_U


def _cost(count: int, bits: int, bands: int) -> float:
    """Expected cost of all look-ups and comparisons, if the hashes are evenly distributed."""
    width = 64 // bands
    look_ups = bands * sum(comb(width, flips) for flips in range(bits // bands + 1))
    return look_ups * (_LOOK_UP_COST + count / 2**width)


def _look_up(
    values_U: NDArray[np.uint64],
    best_U: NDArray[np.int64],
    order_U: NDArray[np.int64],
    row: int,
    starts_R: NDArray[np.int64],
    ends_R: NDArray[np.int64],
    bits: int,
) -> None:
    """Compare each value from ``row`` on with the values in its range of ``order_U``, and lower ``best_U`` where an earlier value lies within ``bits``."""
    asking_A = np.flatnonzero(ends_R > starts_R)
    starts_A, widths_A = starts_R[asking_A], (ends_R - starts_R)[asking_A]
    sums_A = np.cumsum(widths_A)
    first = 0
    while first < len(asking_A):
        done = int(sums_A[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(sums_A, done + _COMPARISONS, side="right")))
        chunk = slice(first, last)
        widths = widths_A[chunk]
        left_C = np.repeat(asking_A[chunk] + row, widths)
        within_C = np.arange(int(sums_A[last - 1]) - done) - np.repeat(sums_A[chunk] - widths - done, widths)
        right_C = order_U[np.repeat(starts_A[chunk], widths) + within_C]
        earlier_E = np.flatnonzero(right_C < left_C)
        left_E, right_E = left_C[earlier_E], right_C[earlier_E]
        near_E = _distance(values_U[left_E], values_U[right_E]) <= bits
        np.minimum.at(best_U, left_E[near_E], right_E[near_E])
        first = last


def _distance(a_C: NDArray[np.uint64], b_C: NDArray[np.uint64]) -> NDArray[np.uint8]:
    """Hamming distances."""
    differing_C = a_C ^ b_C
    if hasattr(np, "bitwise_count"):
        return np.bitwise_count(differing_C)
    return _count_bits(differing_C)


def _count_bits(x_C: NDArray[np.uint64]) -> NDArray[np.uint8]:
    """The number of set bits of each value, for numpy before 2.0."""
    ones, pairs, fours = (np.uint64(pattern) for pattern in (0x5555555555555555, 0x3333333333333333, 0x0F0F0F0F0F0F0F0F))
    x_C = x_C - ((x_C >> np.uint64(1)) & ones)
    x_C = (x_C & pairs) + ((x_C >> np.uint64(2)) & pairs)
    x_C = (x_C + (x_C >> np.uint64(4))) & fours
    return ((x_C * np.uint64(0x0101010101010101)) >> np.uint64(56)).astype(np.uint8)
