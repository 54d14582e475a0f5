"""Near-duplicates by Hamming distance: against the plain definition, in bounded time for clusters."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from data_pipeline.filters import near_duplicates as module
from data_pipeline.filters.near_duplicates import MAX_BITS, near_duplicates


def by_definition(hashes: NDArray[np.uint64], bits: int) -> list[int]:
    values = [int(value) for value in hashes]
    return [next((j for j in range(i) if (values[i] ^ values[j]).bit_count() <= bits), -1) for i in range(len(values))]


def clustered(rng: np.random.Generator, count: int) -> NDArray[np.uint64]:
    """Random hashes, of which half are copies of others with 0 to 9 bits flipped."""
    hashes = rng.integers(0, 2**64, count, dtype=np.uint64)
    for place in rng.integers(0, count, count // 2):
        hashes[place] = hashes[rng.integers(0, count)]
        for bit in rng.integers(0, 64, rng.integers(0, 10)).tolist():
            hashes[place] ^= np.uint64(1 << bit)
    return hashes


@pytest.mark.parametrize("bits", range(MAX_BITS + 1))
@pytest.mark.parametrize("bands", [3, 4, 5])
def test_every_distance_and_number_of_bands_agrees_with_the_definition(bits: int, bands: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BANDS", (bands,))
    hashes = clustered(np.random.default_rng(bits), 300)
    found = near_duplicates(hashes, bits)
    assert found.dtype == np.int64 and found.tolist() == by_definition(hashes, bits)
    assert (found >= 0).sum() > 5, "the hashes must hold something to find"


@given(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 255) | st.sampled_from([0, 2**64 - 1, 2**63]), max_size=40), st.integers(0, MAX_BITS))
def test_any_hashes_agree_with_the_definition(values: list[int], bits: int) -> None:
    hashes = np.array(values, dtype=np.uint64)
    assert near_duplicates(hashes, bits).tolist() == by_definition(hashes, bits)


def test_small_blocks_give_the_same_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = clustered(np.random.default_rng(3), 400)
    expected = near_duplicates(hashes, 4)
    monkeypatch.setattr(module, "_ROWS", 7)
    monkeypatch.setattr(module, "_COMPARISONS", 5)
    assert (near_duplicates(hashes, 4) == expected).all()


def test_the_answer_is_the_earliest_one_even_across_a_chain() -> None:
    # 0b1 is within one bit of 0 and of 0b11; 0b11 is not within one bit of 0.
    chain = np.array([0b11, 0b0, 0b1, 0b11, 0b0], dtype=np.uint64)
    assert near_duplicates(chain, 0).tolist() == [-1, -1, -1, 0, 1]
    assert near_duplicates(chain, 1).tolist() == [-1, -1, 0, 0, 1]
    assert near_duplicates(chain, 2).tolist() == [-1, 0, 0, 0, 0]


def test_no_and_one_hash_have_no_duplicates() -> None:
    assert near_duplicates(np.zeros(0, np.uint64), 4).tolist() == []
    assert near_duplicates(np.zeros(1, np.uint64), 4).tolist() == [-1]


def test_a_hundred_thousand_equal_hashes_are_no_hundred_million_comparisons() -> None:
    hashes = np.random.default_rng(0).integers(0, 2**64, 120_000, dtype=np.uint64)
    hashes[10_000:110_000] = hashes[5]
    start = time.process_time()
    found = near_duplicates(hashes, 4)
    assert (found[10_000:110_000] == 5).all() and (found >= 0).sum() == 100_000
    assert time.process_time() - start < 10


def test_bits_are_counted_the_same_without_bitwise_count(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).integers(0, 2**64, 1000, dtype=np.uint64)
    x[:2] = 0, 2**64 - 1
    assert module._count_bits(x).tolist() == [int(value).bit_count() for value in x]
    hashes = clustered(np.random.default_rng(4), 200)
    monkeypatch.delattr(np, "bitwise_count", raising=False)
    assert near_duplicates(hashes, 3).tolist() == by_definition(hashes, 3)


@pytest.mark.parametrize("bits", [-1, MAX_BITS + 1])
def test_a_distance_out_of_range_is_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=rf"bits = {bits}: expected 0 to {MAX_BITS}"):
        near_duplicates(np.zeros(2, np.uint64), bits)


@pytest.mark.parametrize("hashes", [np.zeros(2, np.int64), np.zeros((2, 2), np.uint64)])
def test_what_is_no_vector_of_hashes_is_refused(hashes: NDArray) -> None:
    with pytest.raises(ValueError, match="expected a vector of uint64"):
        near_duplicates(hashes, 1)
