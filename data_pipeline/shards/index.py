"""The index of a set's version, as training processes hold it: every rank has all shards of a set in memory, of which a large set has a hundred thousand.

The entries of index.json are dictionaries of a kilobyte each in Python. So they are checked and packed while the file is parsed, a few thousand at a time, and what
they have in common, which is nearly all, is kept once.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

from data_pipeline.shards import links
from data_pipeline.shards.schema import PIECE, Index, check_columns, check_piece, read_index
from infra import node_folder
from infra.commands import launcher
from infra.errors import DataError


@dataclass(frozen=True, slots=True)
class Shard:
    """One MDS file of a set."""

    basename: str
    """Its name below the set: 'part-.../shard.00000.mds'."""
    samples: int
    bytes: int
    source: str
    """The entry of data.sources that its records came from."""
    _hashes: tuple[tuple[str, str], ...]
    _common: dict[str, Any]
    """What its entry has beside these; shards that are alike share it."""

    @property
    def hashes(self) -> dict[str, str]:
        """Algorithm -> hash of the file."""
        return dict(self._hashes)

    @property
    def entry(self) -> dict[str, Any]:
        """Its entry in index.json."""
        raw = {"basename": self.basename, "bytes": self.bytes, "hashes": self.hashes}
        return self._common | {"samples": self.samples, "raw_data": raw}


def read_shards(url: str, schema: str, sources: dict[str, str]) -> list[Shard]:
    """The shards in the index of a version, which never changes: the ranks of a node fetch it once.

    Args:
        url: index.json of the version.
        schema: of the set; each shard must have its columns.
        sources: part -> source.

    Raises:
        DataError: the index is missing or damaged, names a part that is not in ``sources``, or has columns of another schema.
    """
    links.check(url)
    rows = _Rows(url, schema, sources)
    found = node_folder.json_once(url, alike=True, taken=rows)
    if isinstance(found, dict) and found.get("shards") == list(range(rows.count)):
        return rows.shards()
    read_index(url)  # says what is wrong
    raise DataError(
        f"{url}: damaged, it has entries of shards outside of its list 'shards'; run '{launcher('validate', url.rpartition('/versions/')[0])}'."
    )


class _Rows:
    """Takes the entries of shards out of an index that is being parsed. In their place it leaves their numbers, from 0 on."""

    def __init__(self, url: str, schema: str, sources: dict[str, str]) -> None:
        self._url, self._schema, self._sources = url, schema, sources
        self._waiting: list[dict[str, Any]] = []
        self._shards: list[Shard] = []
        self._common: dict[tuple[Any, ...], dict[str, Any]] = {}

    @property
    def count(self) -> int:
        return len(self._shards) + len(self._waiting)

    def __call__(self, found: dict[str, Any]) -> Any:
        """What stands in the parsed file for an object that is complete."""
        if "raw_data" not in found:
            return found
        if len(self._waiting) == PIECE:
            self._pack()
        self._waiting.append(found)
        return self.count - 1

    def shards(self) -> list[Shard]:
        self._pack()
        return self._shards

    def _pack(self) -> None:
        check_piece({"shards": self._waiting}, Index, self._url, "shards", len(self._shards))
        for entry in self._waiting:
            self._shards.append(self._packed(entry))
        self._waiting = []

    def _packed(self, entry: dict[str, Any]) -> Shard:
        raw = entry.pop("raw_data")
        name, samples = raw["basename"], entry.pop("samples")
        source = self._sources.get(part := name.partition("/")[0])
        if source is None:
            where = launcher("validate", self._url.rpartition("/versions/")[0])
            raise DataError(f"{self._url}: lists shards of {part}, which is no part in the manifest; run '{where}'.")
        # Equal lists are one list (``alike``), so their identity is enough here, and no two that differ have the same.
        key = tuple((word, id(value) if isinstance(value, list) else repr(value)) for word, value in sorted(entry.items()))
        common = self._common.get(key)
        if common is None:
            check_columns(self._schema, entry, f"{self._url}: {name}")
            common = self._common[key] = entry
        hashes = tuple((sys.intern(word), value) for word, value in raw["hashes"].items())
        return Shard(name, int(samples), int(raw["bytes"]), source, hashes, common)
