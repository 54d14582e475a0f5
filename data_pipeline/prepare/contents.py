"""What inputs hold, recorded beside the sets: an input of which only the time or the ETag is another is read once, and keeps the part that it has.

    <images>/inputs/<unit>-<shape>-<inputs>-<part>.json      16 digits each; written before the part is finished

Parts are named by names, sizes and times (or ETags) of their files, because these cost no look into them. A move, a copy, rsync or another store changes
times and ETags and nothing else: of inputs whose names and sizes (their *shape*) are those of a finished part, the records are read and compared with the digest of
those that the part was made from, which costs no read of its own: it is taken while the part is written. Where they are equal, a record says that these inputs' part is
that one, so that nothing is filtered, encoded or read again. What is compared is what the reader gives, so of a share of the data (``data.share``) no more is read than
for the part itself, and images that rows name are compared with the rest.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from functools import cached_property
from operator import attrgetter
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from data_pipeline.prepare.plan import SPLITS, Plan, Unit
from data_pipeline.shards import links
from data_pipeline.shards.shard_set import part_done
from data_pipeline.sources.pairs import Found, Pair, Source, Unreadable
from infra import storage, stored
from infra.digests import digest

FOLDER = "inputs"
_NAME = re.compile(r"([0-9a-f]{16})-([0-9a-f]{16})-([0-9a-f]{16})-([0-9a-f]{16})\.json")
_LOOKED_AT = 16  # records of an input of the same name, by which it is said why a part is made


class RecordsDigest:
    """Digest of what a reader gives of one unit, in order: the same wherever the input lies, and whatever its files are called above the source."""

    def __init__(self, source: Source) -> None:
        self._source, self._hash = source, hashlib.sha256()

    def add(self, found: Found) -> None:
        if isinstance(found, Pair):
            named = "" if found.source == self._source.name else found.source  # a record that brings no source of its own has the source's URL
            self._add("pair", found.id, list(found.captions), named, found.license, found.group, found.split, found.given, len(found.image))
            self._hash.update(found.image)
            if found.also:
                self._add("also", *found.also)
        elif isinstance(found, Unreadable):
            self._add("unreadable", found.id, found.reason)
        else:
            self._add("not read", found.suffix, found.count)

    def leave_out(self, group: str) -> None:
        """A record of this group lies beyond data.share."""
        self._add("left out", group)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()

    def _add(self, *facts: Any) -> None:
        self._hash.update(digest(list(facts)).encode())


class Content(stored.Stored):
    """A record of what a unit's files contain."""

    part: stored.Sha256
    """Digest that names the part."""
    content: stored.Sha256
    """Of the records that were read (``RecordsDigest``)."""
    shard: str
    sizes: str
    facts: Annotated[dict[str, Any], Field(max_length=100)]
    """``Plan.facts`` of the plan that made the part."""


class _Place(NamedTuple):
    """The name of a record, in its four components."""

    unit: str
    shape: str
    inputs: str
    part: str

    @property
    def file(self) -> str:
        return "-".join(self) + ".json"


class Contents:
    """The records beside the image sets of a plan. They are listed once, at the first question."""

    def __init__(self, plan: Plan, images_url: str) -> None:
        """
        Args:
            plan: of the stage.
            images_url: place of the image sets.
        """
        self.plan, self.images = plan, images_url
        self.recognised = 0
        """Units that ``recognise`` recognised."""

    @cached_property
    def _places(self) -> list[_Place]:
        names = storage.list_files(storage.join(self.images, FOLDER))
        return [_Place(*match.groups()) for name in names if (match := _NAME.fullmatch(name))]

    @cached_property
    def _by_inputs(self) -> dict[tuple[str, str], _Place]:
        return {(place.shape, place.inputs): place for place in self._places}

    @cached_property
    def _by_shape(self) -> dict[str, list[_Place]]:
        return _grouped(self._places, attrgetter("shape"))

    @cached_property
    def _by_unit(self) -> dict[str, list[_Place]]:
        return _grouped(self._places, attrgetter("unit"))

    def inputs(self, unit: Unit) -> str:
        """The digest that names a unit's part: the unit's own digest, or that of a part that is recorded to have been made from the same bytes."""
        own, shape = self.plan.inputs(unit), self.plan.shape(unit)
        place = self._by_inputs.get((shape[:16], own[:16])) if shape else None
        return own if place is None or place.part == own[:16] else str(self._read(place)["part"])

    def candidates(self, unit: Unit) -> list[str]:
        """Digests of finished parts that may be the unit's, which only a look at the bytes of its files can tell; empty if that is known already."""
        own, shape = self.plan.inputs(unit), self.plan.shape(unit)
        if not shape or (shape[:16], own[:16]) in self._by_inputs:
            return []
        return [place.part for place in self._by_shape.get(shape[:16], []) if place.part == place.inputs and self.is_done(place.part)]

    def recognise(self, unit: Unit, content: Callable[[], str]) -> bool:
        """Whether the part that a unit's inputs name is there under the name of another one, that was made from the same records; it is recorded then.

        Args:
            unit: whose part is not there under its own name.
            content: reads the records and gives their digest; called if there is a part to compare with.
        """
        parts = self.candidates(unit)
        if not parts:
            return False
        found = content()
        shape = self.plan.shape(unit)[:16]
        equal = [place for place in self._by_shape.get(shape, []) if place.part in parts and self._read(place)["content"] == found]
        if not equal:
            return False
        self.record(unit, str(self._read(equal[0])["part"]), found)
        self.recognised += 1
        return True

    def record(self, unit: Unit, part: str, content: str) -> None:
        """Say from which records a part was made; before the part is finished, so that none is without."""
        own, shape = self.plan.inputs(unit), self.plan.shape(unit)
        if not shape:
            return
        facts = {"part": part, "content": content, "shard": unit.shard.name, "sizes": unit.shard.sizes, "facts": self.plan.facts(unit)}
        place = _Place(self._unit(unit), shape[:16], own[:16], part[:16])
        url = storage.join(self.images, FOLDER, place.file)
        links.check(url)
        storage.write_json(url, facts)
        self._by_inputs[(place.shape, place.inputs)] = place
        self._by_shape.setdefault(place.shape, []).append(place)

    def why(self, unit: Unit) -> str:
        """Why a unit's part is made, in words: what is another since the part of the input of this name was made last."""
        before = [self._read(place) for place in self._by_unit.get(self._unit(unit), [])[:_LOOKED_AT]]
        if not before:
            return "new"
        now = self.plan.facts(unit) | {"the size of its files, or their names": unit.shard.sizes}
        differences = [
            sorted(
                key for key, value in now.items() if (record["facts"] | {"the size of its files, or their names": record["sizes"]}).get(key) != value
            )
            for record in before
        ]
        nearest = min(differences, key=len)
        return f"another value of {', '.join(nearest)}" if nearest else "its part was deleted, or never finished"

    def is_done(self, inputs: str) -> bool:
        """Whether the part is finished in both splits."""
        return all(part_done(storage.join(self.images, split), inputs) for split in SPLITS)

    def _unit(self, unit: Unit) -> str:
        return digest([self.plan.entries[unit.source].name, unit.shard.name])[:16]

    def _read(self, place: _Place) -> dict[str, Any]:
        return stored.read(storage.join(self.images, FOLDER, place.file), Content, "delete it: its input is read again")


def _grouped(places: list[_Place], key: Callable[[_Place], str]) -> dict[str, list[_Place]]:
    found: dict[str, list[_Place]] = {}
    for place in places:
        found.setdefault(key(place), []).append(place)
    return found
