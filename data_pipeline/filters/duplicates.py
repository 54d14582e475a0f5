"""Duplicates across all parts, which no single input shard can show. They are found when parts are merged, from 32 bytes a record; records are not moved.

Records are ordered: first the validation split, then the training split, each in the order of the plan. Of equal records the first is kept. Appended data
come last, so they never hide older records, except training images that overlap a new validation image.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from data_pipeline.config import FilterConfig
from data_pipeline.filters.near_duplicates import near_duplicates

REPEATED_ID = "repeated id"
EXACT = "exact duplicate"
NEAR = "near-duplicate image"
OVERLAP = "overlaps validation"

U64 = NDArray[np.uint64]


@dataclass
class Found:
    """The records that are hidden as duplicates."""

    validation: NDArray[np.int64]
    """Sorted positions in the validation split."""
    train: NDArray[np.int64]
    """Sorted positions in the training split."""
    pairs: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """Reason -> (position, position of the record that it repeats), counted over the validation split followed by the training split."""


def find(ids: tuple[U64, U64], prints: tuple[U64, U64], filters: FilterConfig) -> Found:
    """Search both splits.

    Args:
        ids: id hashes of validation and training records.
        prints: content and perceptual hashes of both, uint64 [count, 2 or more columns].
        filters: says which searches are on.
    """
    count = len(ids[0])
    both, content = np.concatenate(ids), np.concatenate([part[:, 0] for part in prints])
    hidden = np.zeros(len(both), bool)
    pairs: dict[str, list[tuple[int, int]]] = {}

    def hide(reason: str, earlier: NDArray[np.int64], candidates: NDArray[np.bool_]) -> None:
        chosen = np.flatnonzero(candidates & (earlier >= 0) & ~hidden)
        hidden[chosen] = True
        if len(chosen):
            pairs[reason] = [(int(position), int(earlier[position])) for position in chosen]

    everywhere = np.ones(len(both), bool)
    hide(REPEATED_ID, first_equal(both), everywhere)
    if filters.duplicates:
        hide(EXACT, first_equal(content), everywhere)
    near = filters.near_duplicate_bits >= 0
    if near or filters.validation_overlap:
        visible = np.flatnonzero(~hidden)  # a record that is hidden already must not hide others
        perceptual = np.concatenate([part[:, 1] for part in prints])
        border = int(np.searchsorted(visible, count))
        blocks = [visible] if filters.validation_overlap else [visible[:border], visible[border:]]
        earlier = np.full(len(both), -1, np.int64)
        for block in blocks:
            match = near_duplicates(perceptual[block], max(0, filters.near_duplicate_bits))
            earlier[block] = np.where(match >= 0, block[match], -1)
        overlapping = (np.arange(len(both)) >= count) & (earlier < count)
        if filters.validation_overlap:
            hide(OVERLAP, earlier, overlapping)
        if near:
            hide(NEAR, earlier, ~overlapping)
    positions = np.flatnonzero(hidden)
    return Found(positions[positions < count], positions[positions >= count] - count, pairs)


def first_equal(values: U64) -> NDArray[np.int64]:
    """For each value the index of the first equal one; -1 if it is the first itself."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    earliest = first[inverse.reshape(-1)].astype(np.int64)
    return np.where(earliest == np.arange(len(values)), -1, earliest)
