"""Small sets of codes with numbered ids, and loaders over them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.loading.loaders import ShardLoader
from data_pipeline.shards.shard_set import CODES_SCHEMA, CodeRecord, ShardSet
from data_pipeline.shards.versions import write_set
from infra.world import World

PARTS = (11, 0, 3, 23)  # a prime number of records, in parts of uneven size with one empty


COUNT = sum(PARTS)


def code_set(url: str, prefix: str = "id", parts: tuple[int, ...] = PARTS, shard_bytes: int = 600) -> ShardSet:
    ends = itertools.accumulate(parts)
    made = [
        [CodeRecord(f"{prefix}-{end - count + i}", [f"red {i}", "blue"], np.full(4, end - count + i, np.uint16), {}, 0, 0) for i in range(count)]
        for count, end in zip(parts, ends, strict=True)
    ]
    return write_set(url, made, CODES_SCHEMA, {"prefix": prefix}, shard_bytes=shard_bytes)


def loader(
    sets: list[ShardSet], world: World, batch: int = 6, seed: int = 0, cache_dir: str | Path = "", **options: Any
) -> ShardLoader[str, list[str]]:
    return ShardLoader(sets, cache_dir, world, batch, seed, transform=lambda record, epoch: f"{record['id']}@{epoch}", collate=list, **options)


def draw(ranks: list[ShardLoader[str, list[str]]], batches: int) -> list[list[str]]:
    """Global batches, each sorted."""
    return [sorted(sample for rank in ranks for sample in rank.next()) for _ in range(batches)]


def without(shard_set: ShardSet, *positions: int) -> ShardSet:
    """The set with records taken down."""
    fresh = ShardSet(shard_set.url, shard_set.manifest)
    vars(fresh)["removed"] = np.array(sorted(positions), np.int64)
    return fresh
