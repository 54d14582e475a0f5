"""Samples of data without reading all of it: random rows of a shard set, and records from the beginning of a few input shards of a source.

A row of a set costs two small reads, one for its offsets and one for its bytes, so that this takes seconds for a set of any size on S3.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.shards.shard_set import ShardSet
from data_pipeline.sources.pairs import Pair, Source, Unreadable
from infra.seeds import generator

SOURCE_SHARDS = 8
"""How many input shards of a source are sampled."""
_SPREAD = 2  # n records of an input shard are drawn from its first 2 n


def random_rows(images_or_codes: ShardSet, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """``count`` random records (all, if there are fewer) of the visible ones, in the order of the set.

    Raises:
        DataError: a file is missing, truncated or damaged.
    """
    return images_or_codes.rows_at(visible_positions(images_or_codes.stored, images_or_codes.removed, count, seed))


def visible_positions(stored: int, removed: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    """At most ``count`` distinct random positions from 0 to ``stored`` - 1 that are not in ``removed`` (which is sorted): int64, sorted."""
    visible = stored - len(removed)
    rng = generator(seed, "sample", "inspect")
    ranks = np.sort(rng.choice(visible, min(count, visible), replace=False)) if visible > 0 else np.zeros(0, np.int64)
    # The k-th visible position is k plus the number of removed positions before it; removed[i] - i visible positions lie before removed[i].
    return (ranks + np.searchsorted(removed - np.arange(len(removed)), ranks, side="right")).astype(np.int64)


@dataclass
class SourceSample:
    """A sample of a source's records."""

    shards: int
    """Number of input shards of the source."""
    pairs: list[Pair] = field(default_factory=list)
    unreadable: Counter[str] = field(default_factory=Counter)
    """Reason -> number of unreadable records among those that were read."""
    looked_into: int = 0
    """Number of input shards that were sampled."""


def sample_source(source: Source, count: int, seed: int = 0) -> SourceSample:
    """At most ``count`` random records from the beginnings of a few random input shards.

    Raises:
        DataError: the source is missing or empty, or one of the input shards is broken.
    """
    listed = list(source.shards())
    rng = generator(seed, "sample", "inspect")
    chosen = sorted(rng.choice(len(listed), min(len(listed), SOURCE_SHARDS), replace=False))
    found = SourceSample(shards=len(listed), looked_into=len(chosen))
    for left, index in zip(range(len(chosen), 0, -1), chosen, strict=True):
        quota = -(-(count - len(found.pairs)) // left)  # later shards make up for short ones
        pairs: list[Pair] = []
        for item in source.read(listed[index], lambda group: True):
            if isinstance(item, Unreadable):
                found.unreadable[item.reason] += 1
            elif isinstance(item, Pair):
                pairs.append(item)
            if len(pairs) >= _SPREAD * quota:
                break
        picked = sorted(rng.choice(len(pairs), min(quota, len(pairs)), replace=False)) if pairs else []
        found.pairs += [pairs[i] for i in picked]
    return found


def count_source(source: Source) -> tuple[int, Counter[str]]:
    """The number of records of a source, and of unreadable records by reason. Reads its whole index but no image.

    Raises:
        DataError: the source is missing or empty, or an input shard is broken.
    """
    count, unreadable = 0, Counter[str]()

    def wanted(group: str) -> bool:
        nonlocal count
        count += 1
        return False

    for shard in source.shards():
        unreadable.update(item.reason for item in source.read(shard, wanted) if isinstance(item, Unreadable))
    return count, unreadable
