"""What inputs hold, recorded beside the sets: an input of which only the time or the ETag is another is hashed once, and keeps the part that it has.

    <images>/inputs/<unit>-<shape>-<inputs>-<part>.json      16 digits each; written before the part

Parts are named by names, sizes and times (or ETags) of their files, because these cost no look into them. A move, a copy, rsync or another store changes
times and ETags and nothing else: of inputs whose names and sizes (their *shape*) are those of a finished part, the bytes are hashed and compared with what was
recorded when that part was made. Where they are equal, a record says that these inputs' part is that one, so that nothing is filtered, encoded or hashed again.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from operator import attrgetter
from typing import Annotated, Any, NamedTuple

from pydantic import Field

from data_pipeline.prepare.plan import SPLITS, Plan, Unit
from data_pipeline.shards import links
from data_pipeline.shards.shard_set import part_done
from infra import storage, stored
from infra.digests import digest
from infra.errors import DataError, UnreachableError

FOLDER = "inputs"
_NAME = re.compile(r"([0-9a-f]{16})-([0-9a-f]{16})-([0-9a-f]{16})-([0-9a-f]{16})\.json")
_CHUNK = 1 << 20
_FETCHES = 16  # files on S3 that are hashed at once


class Stopped(Exception):
    """The stop signal came in the middle of a shard."""


class Content(stored.Stored):
    """A record of what a unit's files contain."""

    part: stored.Sha256
    """Digest that names the part."""
    content: stored.Sha256
    """Of the bytes of the unit's files."""
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

    def __init__(self, plan: Plan, images_url: str, stop: Callable[[], bool] = lambda: False) -> None:
        """
        Args:
            plan: of the stage.
            images_url: place of the image sets.
            stop: asked while files are hashed; True ends it in ``Stopped``.
        """
        self.plan, self.images, self.stop = plan, images_url, stop
        self.recognised = 0
        """Units that ``find`` recognised by the bytes of their files."""
        self._hash = lru_cache(64)(self._hash_file)

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

    def find(self, unit: Unit) -> tuple[str, bool]:
        """The digest that names a unit's part, and whether the part is there; the unit's files are hashed where it takes that to know.

        Raises:
            UnreachableError: the storage gives no answer.
            Stopped: asked to.
        """
        named = self.inputs(unit)
        if self.is_done(named):
            return named, True
        inputs = self.settle(unit)
        self.recognised += inputs != named
        return inputs, inputs != named

    def settle(self, unit: Unit) -> str:
        """What ``inputs`` gives, once the bytes have been looked at and it is recorded: called before a part is written that is not there.

        Raises:
            UnreachableError: the storage gives no answer.
            Stopped: asked to.
        """
        own, shape = self.plan.inputs(unit), self.plan.shape(unit)
        if not shape or (shape[:16], own[:16]) in self._by_inputs:
            return self.inputs(unit)
        content = self._content(unit)
        if not content:
            return own
        parts = self.candidates(unit)
        equal = [place for place in self._by_shape.get(shape[:16], []) if place.part in parts and self._read(place)["content"] == content]
        part = str(self._read(equal[0])["part"]) if equal else own
        facts = {"part": part, "content": content, "shard": unit.shard.name, "sizes": unit.shard.sizes, "facts": self.plan.facts(unit)}
        place = _Place(self._unit(unit), shape[:16], own[:16], part[:16])
        url = storage.join(self.images, FOLDER, place.file)
        links.check(url)
        storage.write_json(url, facts)
        self._by_inputs[(place.shape, place.inputs)] = place
        self._by_shape.setdefault(place.shape, []).append(place)
        return part

    def why(self, unit: Unit) -> str:
        """Why a unit's part is made, in words: what is another since the part of the input of this name was made last."""
        before = [self._read(place) for place in self._by_unit.get(self._unit(unit), [])[:_FETCHES]]
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
        return stored.read(storage.join(self.images, FOLDER, place.file), Content, "delete it: its input is looked at again")

    def _content(self, unit: Unit) -> str:
        """Digest of the files' names and bytes; empty where one cannot be read, which its reader will say."""
        source = self.plan.sources[unit.source]
        try:
            urls = [source.url(name) for name in unit.shard.files]
            with ThreadPoolExecutor(_FETCHES if any(map(storage.is_remote, urls)) else 1) as pool:
                return digest(list(zip(unit.shard.files, pool.map(lambda url: self._hash(url, unit.shard.version), urls), strict=True)))
        except UnreachableError:
            raise
        except DataError:
            return ""

    def _hash_file(self, url: str, version: str) -> str:
        found = hashlib.sha256()
        with storage.open_stream(url) as stream:
            while chunk := stream.read(_CHUNK):
                found.update(chunk)
                if self.stop():
                    raise Stopped
        return found.hexdigest()


def _grouped(places: list[_Place], key: Callable[[_Place], str]) -> dict[str, list[_Place]]:
    found: dict[str, list[_Place]] = {}
    for place in places:
        found.setdefault(key(place), []).append(place)
    return found
