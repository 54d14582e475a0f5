"""What the stage 'prepare' has to do: the input shards of all sources, and what each one's records depend on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from data_pipeline.config import DataConfig, FilterConfig
from data_pipeline.filters.judge import fingerprint
from data_pipeline.shards.shard_set import read_takedown
from data_pipeline.shards.versions import Part
from data_pipeline.sources.open_source import open_source
from data_pipeline.sources.pairs import InputShard, Source
from infra.digests import digest
from infra.seeds import derive

SPLITS = ("train", "validation")
_VERSION = 2  # of what a part holds; a change does finished parts again
_AT_MERGE = {"duplicates": True, "near_duplicate_bits": 0, "validation_overlap": True}  # these filters need all parts, and change none


def split_of(group: str, seed: int, validation_share: float) -> str:
    """'validation' or 'train', by a stable hash of the group: adding data never moves a sample."""
    return "validation" if derive(seed, "split", group) < validation_share * 2**63 else "train"


@dataclass(frozen=True)
class Unit:
    """One unit of work: an input shard becomes one part of each split."""

    source: int
    """Position in ``data.sources``."""
    shard: InputShard


@dataclass(frozen=True)
class Plan:
    """Sources and units. Every process makes the same plan from the same inputs."""

    data: DataConfig
    filters: FilterConfig
    min_side: int
    seed: int
    sources: list[Source]
    units: list[Unit]

    @cached_property
    def taken_down(self) -> frozenset[str]:
        """Ids that no new part may hold.

        Raises:
            DataError: data.takedown names no readable list.
        """
        return read_takedown(self.data.takedown)

    def wanted(self, group: str) -> bool:
        """Whether records of this group are used: the first ``data.share`` of groups by stable hash."""
        # Not the hash of the split: the first groups by that one would all be validation.
        return self.data.share >= 1 or derive(self.seed, "split", "kept", group) < self.data.share * 2**63

    def split(self, group: str) -> str:
        """The split of a group whose source brings none."""
        return split_of(group, self.seed, self.data.validation_share)

    def inputs(self, unit: Unit) -> str:
        """Digest of everything that the unit's records depend on; it names the part."""
        source = self.data.sources[unit.source].model_dump(mode="json", exclude={"weight"})
        shard = [unit.shard.name, unit.shard.version, unit.shard.keys, unit.shard.span]
        return digest([_VERSION, source, self.sources[unit.source].version(), shard, self._shaping])

    def part(self, unit: Unit) -> Part:
        return Part(self.inputs(unit), self.data.sources[unit.source].url)

    def settings(self) -> dict[str, Any]:
        """What shaped the set; goes to the manifests."""
        return {**self._shaping, "sources": [source.url for source in self.data.sources], "filters": self.filters.model_dump(mode="json")}

    @cached_property
    def _shaping(self) -> dict[str, Any]:
        return {
            "filters": fingerprint(self.filters.model_copy(update=_AT_MERGE)),
            "render_size": self.data.render_size if any(source.is_emoji for source in self.data.sources) else None,
            "min_side": self.min_side,
            "validation_share": self.data.validation_share,
            "share": self.data.share,
            "seed": self.seed,
            "shard_bytes": self.data.shard_bytes,
        }


def make_plan(data: DataConfig, filters: FilterConfig, image_size: int, seed: int) -> Plan:
    """List the input shards of every source; no record is read.

    Args:
        data: the section.
        filters: the section.
        image_size: side in pixels of what training will cut; the default of data.min_side.
        seed: run.seed.

    Raises:
        ConfigError: an entry of data.sources cannot be a source.
        DataError: a source is missing or empty.
    """
    sources = [open_source(entry, data) for entry in data.sources]
    units = [Unit(number, shard) for number, source in enumerate(sources) for shard in source.shards()]
    return Plan(data, filters, data.min_side or image_size, seed, sources, units)


def spread(units: list[Unit], count: int) -> Iterator[Unit]:
    """At most ``count`` units, evenly spaced: a sample of all sources."""
    taken = min(count, len(units))
    return (units[position * len(units) // taken] for position in range(taken))
