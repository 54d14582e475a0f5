"""Chooses the captions that the stage generate draws. Groups are counted by the hashes that are stored beside the shards, so no image has to be read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.shards.shard_set import ShardSet
from infra.digests import id_hash
from infra.seeds import derive
from train.config import RunConfig

_RANGE = 1 << 25
"""About how many hashes are sorted at a time. For 250 million records, the files of hashes (6 GB) are read eight times."""
_NAMED = 4096
"""The names of at most this many groups are read, each by two small reads. If there are more, those with the smallest hashes are taken."""


@dataclass(frozen=True)
class Prompt:
    """A caption to draw."""

    caption: str
    id: str | None = None
    """Id of the record that the caption comes from."""
    split: str | None = None
    """That record's split."""
    truth: bytes | None = None
    """That record's image file."""


@dataclass(frozen=True)
class Groups:
    """Groups of a set, in the order of their hashes."""

    hash_G: NDArray[np.uint64]
    first_G: NDArray[np.int64]
    """Position of each group's first visible record."""
    count_G: NDArray[np.int64]
    """Number of each group's visible records."""

    def at(self, places: NDArray[Any]) -> Groups:
        return Groups(self.hash_G[places], self.first_G[places], self.count_G[places])


def prompts(cfg: RunConfig, training: ShardSet, validation: ShardSet) -> list[Prompt]:
    """generate.captions; if there are none, captions of validation concepts (the first in the order of a stable hash) and of the most frequent training concepts."""
    if cfg.generate.captions:
        return [Prompt(caption) for caption in cfg.generate.captions]
    chosen = held_out(validation, cfg.generate.num_captions, cfg.run.seed)
    if cfg.generate.num_known_captions:
        chosen += [_prompt(record) for record in _most_frequent(training, cfg.generate.num_known_captions)]
    return chosen


def held_out(validation: ShardSet, count: int, seed: int) -> list[Prompt]:
    """Captions of ``count`` validation concepts, or of all if there are fewer."""
    return [_prompt(record) for record in _held_out(validation, count, seed)]


def _prompt(record: dict[str, Any]) -> Prompt:
    return Prompt(record["captions"][0], record["id"], record["split"], record["image"])


def _held_out(images: ShardSet, count: int, seed: int) -> list[dict[str, Any]]:
    """The first record of each of ``count`` groups, chosen by a stable hash of the groups' names."""
    named = max(_NAMED, count)
    few = _merged((groups.at(np.arange(min(named, len(groups.hash_G)))) for groups in ranges(images)), named)
    return _first_records(images, few, lambda record: derive(seed, "sample", record["group"]), count)


def _most_frequent(images: ShardSet, count: int) -> list[dict[str, Any]]:
    """The first record of each of the ``count`` largest groups. Of equally large groups, those whose names come first are chosen."""
    named = max(_NAMED, count)
    few = _merged((groups.at(np.argsort(-groups.count_G, kind="stable")[:named]) for groups in ranges(images)), named, by_size=True)
    size = {int(value): int(number) for value, number in zip(few.hash_G, few.count_G, strict=True)}
    # Names are read for all groups that may be chosen: those that are at least as large as the last of the ``count`` largest.
    least = few.count_G[min(count, len(few.count_G)) - 1] if len(few.count_G) else 0
    return _first_records(
        images, few.at(np.flatnonzero(few.count_G >= least)), lambda record: (-size[id_hash(record["group"])], record["group"]), count
    )


def _first_records(images: ShardSet, groups: Groups, order: Callable[[dict[str, Any]], Any], count: int) -> list[dict[str, Any]]:
    return sorted(images.rows_at(groups.first_G), key=order)[:count]


def _merged(found: Iterable[Groups], most: int, by_size: bool = False) -> Groups:
    """At most ``most`` groups of all ranges: the largest, or the first in the order of their hashes."""
    kept = Groups(np.empty(0, np.uint64), np.empty(0, np.int64), np.empty(0, np.int64))
    for groups in found:
        kept = Groups(*(np.concatenate(pair) for pair in zip(_columns(kept), _columns(groups), strict=True)))
        kept = kept.at(np.argsort(-kept.count_G, kind="stable")[:most] if by_size else np.arange(min(most, len(kept.hash_G))))
        if not by_size and len(kept.hash_G) == most:
            break  # ranges come in the order of the hashes, so later ones hold only larger hashes
    return kept


def _columns(groups: Groups) -> tuple[NDArray[Any], ...]:
    return groups.hash_G, groups.first_G, groups.count_G


def ranges(images: ShardSet, most: int = _RANGE) -> Iterator[Groups]:
    """All groups of the visible records, in the order of their hashes, one range of hashes at a time.

    Args:
        images: an image set.
        most: about how many records a range has; one range is in memory at a time.
    """
    number = max(1, -(-images.count // most))
    edges = [(index << 64) // number for index in range(number + 1)]
    for low, high in pairwise(edges):
        hashes, positions = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
        for part, values_N in enumerate(images.group_hashes()):
            inside_N = (values_N >= np.uint64(low)) & (values_N <= np.uint64(high - 1))
            inside_N[images.removed_rows(part)] = False
            rows = np.flatnonzero(inside_N)
            hashes.append(values_N[rows])
            positions.append(rows + images.starts[part])
        hash_G, first_G, count_G = np.unique(np.concatenate(hashes), return_index=True, return_counts=True)
        yield Groups(hash_G, np.concatenate(positions)[first_G], count_G)
