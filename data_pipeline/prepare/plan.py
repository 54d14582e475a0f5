"""The work of the stage 'prepare': the input shards of all sources, and everything that the records of each depend on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any

from data_pipeline.config import DataConfig, FilterConfig, SourceConfig
from data_pipeline.filters.judge import fingerprint
from data_pipeline.prepare.identity import IDENTITY
from data_pipeline.prepare.named_images import Look, Looks
from data_pipeline.shards.spellings import read_takedown, spellings
from data_pipeline.shards.versions import Part
from data_pipeline.sources.open_source import open_source
from data_pipeline.sources.pairs import InputShard, Pair, Source
from infra import storage
from infra.digests import digest
from infra.seeds import derive

SPLITS = ("train", "validation")
_VERSION = 2  # version of the content of parts: raise it to have finished parts written again
_FURTHER = " with the ids of further rows"  # parts of such inputs were once without them; other parts keep their names
_KEYS = {
    "filters": "filters",
    "seed": "run.seed",
    **{key: f"data.{key}" for key in ("render_size", "min_side", "validation_share", "share", "shard_bytes")},
}
_AT_MERGE = {"duplicates": True, "near_duplicate_bits": 0, "validation_overlap": True}  # filters that run at the merge and do not change parts


def split_of(group: str, seed: int, validation_share: float) -> str:
    """'validation' or 'train', by a stable hash of the group, so that adding data never moves a record to the other split."""
    return "validation" if derive(seed, "split", group) < validation_share * 2**63 else "train"


@dataclass(frozen=True)
class Unit:
    """One unit of work: an input shard becomes one part of each split."""

    source: int
    """Position in ``data.sources``."""
    shard: InputShard


@dataclass(frozen=True)
class Plan:
    """Sources and units of work. Every process makes the same plan from the same inputs."""

    data: DataConfig
    filters: FilterConfig
    min_side: int
    seed: int
    sources: list[Source]
    units: list[Unit]

    @cached_property
    def entries(self) -> tuple[SourceConfig, ...]:
        """The entries of data.sources, each with the name that is the prefix of its records' ids."""
        return named(self.data.sources)

    @cached_property
    def carves(self) -> bool:
        """Whether the validation split is taken from records that are marked as train: no source has other records, and none is configured otherwise.

        Decided by the names of the input shards, so that every process decides alike.
        """
        said = set[str]()
        for unit in self.units:
            told = self.entries[unit.source].split
            said |= {told} if told else unit.shard.splits
        return said == {"train"} and any(not entry.split for entry in self.entries)

    @cached_property
    def taken_down(self) -> frozenset[str]:
        """Ids that no new part may hold.

        Raises:
            DataError: data.takedown names no readable list.
        """
        return spellings(read_takedown(self.data.takedown), self.bases)

    @cached_property
    def bases(self) -> dict[str, str]:
        """Name of a source -> the folder to which its ids are relative."""
        return {entry.name: storage.glob(entry.url)[0] for entry in self.entries if not entry.is_emoji}

    def wanted(self, group: str) -> bool:
        """Whether records of this group are used: a share ``data.share`` of all groups, chosen by a stable hash."""
        # Another hash than that of the split, by which the first groups would all belong to validation.
        return self.data.share >= 1 or derive(self.seed, "split", "kept", group) < self.data.share * 2**63

    def group(self, pair: Pair) -> str:
        """The key that decides the split: the group that the record names, else a hash of its image file, which does not depend on the kind of source."""
        return pair.group if pair.given else f"image/{blake2b(pair.image, digest_size=16).hexdigest()}"

    def split(self, source: int, brought: str, group: str) -> str:
        """The split of a record: the one that it names, unless validation has to be taken from records marked as train."""
        if brought and not (self.carves and not self.entries[source].split):
            return brought
        return split_of(group, self.seed, self.data.validation_share)

    def inputs(self, unit: Unit) -> str:
        """Digest of everything that the unit's records depend on; it names the part. Where a source lies is not among it.

        Raises:
            UnreachableError: the storage gives no answer about the images that its rows name.
        """
        look = self.look(unit)
        return self._digest(unit, f"{unit.shard.version} {look.digest}" if look else unit.shard.version)

    def look(self, unit: Unit) -> Look | None:
        """Sizes and times of the images that the unit's rows name, as they are when it is asked first; None: they name none."""
        if not unit.shard.names_images:
            return None
        key = (unit.source, unit.shard.name)
        if key not in self._looked:
            self._looked[key] = self._looks.at(self.sources[unit.source].images(unit.shard, self.wanted))
        return self._looked[key]

    @cached_property
    def _looks(self) -> Looks:
        return Looks()

    @cached_property
    def _looked(self) -> dict[tuple[int, str], Look]:
        return {}

    def shape(self, unit: Unit) -> str:
        """The same with names and sizes of files in place of their times and ETags: of two inputs with one shape a look at their bytes tells whether they
        are one. Empty: there are no files to look at."""
        return self._digest(unit, f"sizes {unit.shard.sizes}") if unit.shard.sizes else ""

    def _digest(self, unit: Unit, version: str) -> str:
        version += _FURTHER if unit.shard.joins else ""
        shard = [unit.shard.name, version, unit.shard.keys, unit.shard.span]
        return digest([_VERSION, self._source(unit), self.sources[unit.source].version(), shard, self._shaping])

    def _source(self, unit: Unit) -> dict[str, Any]:
        entry = self.entries[unit.source]
        unnamed = {"weight"} | entry.at_default() | (set() if entry.is_emoji else {"url"})
        return entry.model_dump(mode="json", exclude=unnamed)

    def facts(self, unit: Unit) -> dict[str, Any]:
        """What the unit's part depends on besides the bytes of its input, by key, so that a later plan can say why it makes the part again."""
        source = {f"data.sources: {key}": value for key, value in self._source(unit).items()}
        keys = {_KEYS.get(key, key): value for key, value in self._shaping.items()}
        if unit.shard.joins:
            keys["the ids of further rows of an image, which parts hold now"] = True
        if look := self.look(unit):
            keys["the size or time of an image that its rows name"] = look.digest
        return {"the reader": [_VERSION, self.sources[unit.source].version().partition(" {")[0]], **source, **keys}

    def part(self, unit: Unit, inputs: str) -> Part:
        """The part of a unit.

        Args:
            unit: a unit of this plan.
            inputs: the digest that names the part: ``inputs(unit)``, or that of an input with the same content (``data_pipeline/prepare/contents.py``).
        """
        return Part(inputs, self.data.sources[unit.source].url)

    def settings(self) -> dict[str, Any]:
        """The settings that shaped the set, for its manifests."""
        rule = {} if all(entry.is_emoji for entry in self.entries) else {"identity": IDENTITY, "bases": self.bases}
        return {**rule, **self._shaping, "sources": [source.url for source in self.data.sources], "filters": self.filters.model_dump(mode="json")}

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
        } | ({"validation": "from train"} if self.carves else {})


def named(sources: tuple[SourceConfig, ...]) -> tuple[SourceConfig, ...]:
    """Sources with their names filled in: of those without a name the first gets the empty name, and each further one a number."""
    found, number = [], 0
    for entry in sources:
        if entry.name or entry.is_emoji:
            found.append(entry)
            continue
        found.append(entry.model_copy(update={"name": str(number) if number else ""}))
        number += 1
    return tuple(found)


def make_plan(data: DataConfig, filters: FilterConfig, image_size: int, seed: int) -> Plan:
    """List the input shards of every source; no record is read.

    Args:
        data: the section ``data``.
        filters: the section ``filters``.
        image_size: side in pixels of the crops that training will take; the default of data.min_side.
        seed: run.seed.

    Raises:
        ConfigError: an entry of data.sources cannot be a source.
        DataError: a source is missing or empty.
    """
    sources = [open_source(entry, data) for entry in named(data.sources)]
    units = [Unit(number, shard) for number, source in enumerate(sources) for shard in source.shards()]
    return Plan(data, filters, data.min_side or image_size, seed, sources, units)


def spread(units: list[Unit], count: int) -> Iterator[Unit]:
    """At most ``count`` units, evenly spaced: a sample of all sources."""
    taken = min(count, len(units))
    return (units[position * len(units) // taken] for position in range(taken))
