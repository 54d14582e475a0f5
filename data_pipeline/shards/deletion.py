"""Deletion in a shard set: superseded versions with the parts that no other version has, and parts with records that were taken down. Unfinished parts are
never touched, because another process may be writing them."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from data_pipeline.shards import links
from data_pipeline.shards.schema import read_manifest
from data_pipeline.shards.shard_set import DONE, MANIFEST, VERSIONS, ShardSet
from data_pipeline.shards.spellings import bases_of, without_match
from infra import storage

_VERSION = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Superseded:
    """The superseded versions of one shard set, and the parts that go with them."""

    set_url: str
    versions: list[str]
    """Names of folders below ``versions``."""
    parts: list[str]
    """Names of the parts that only these versions have."""

    def carry_out(self) -> None:
        """Delete the parts first and then the versions: after an interruption the versions still tell which parts are left to delete."""
        for part in self.parts:
            links.check(storage.join(self.set_url, part, DONE))
            storage.delete(storage.join(self.set_url, part, DONE))
            storage.delete_prefix(storage.join(self.set_url, part))
        for version in self.versions:
            links.check(storage.join(self.set_url, VERSIONS, version, MANIFEST))
            storage.delete(storage.join(self.set_url, VERSIONS, version, MANIFEST))
            storage.delete_prefix(storage.join(self.set_url, VERSIONS, version))


def plan_superseded(set_url: str, pinned: frozenset[str], before: float) -> Superseded | None:
    """Find the versions of a set that are not the newest, not pinned, and older than a given time; None if there are none.

    Args:
        set_url: place of the shard set.
        pinned: content hashes to keep, because somebody refers to them; hashes of other things among them do no harm.
        before: seconds since 1970, by the storage's clock.

    Raises:
        DataError: a manifest cannot be read, or holds an invalid name of a part; then nothing may be deleted.
    """
    if not storage.exists(storage.join(set_url, MANIFEST)):
        return None  # nothing was merged yet, or a purge is under way
    newest = str(read_manifest(storage.join(set_url, MANIFEST))["content_hash"])
    needed, dropped, versions = _parts(storage.join(set_url, MANIFEST)), set[str](), []
    for name in storage.list_files(storage.join(set_url, VERSIONS)):
        version, _, file = name.partition("/")
        if file != MANIFEST or not _VERSION.fullmatch(version):
            continue
        url = storage.join(set_url, VERSIONS, name)
        identity = str(read_manifest(url)["content_hash"])
        if identity == newest or identity in pinned or not identity.startswith(version) or storage.modified(url) >= before:
            needed |= _parts(url)
        else:
            dropped |= _parts(url)
            versions.append(version)
    return Superseded(set_url, sorted(versions), sorted(dropped - needed)) if versions else None


def _parts(url: str) -> set[str]:
    return {str(part["name"]) for part in read_manifest(url)["parts"]}


@dataclass(frozen=True)
class Purge:
    """The parts and versions of one shard set that must be deleted to remove the records of a take-down list."""

    set_url: str
    records: int
    """Number of records that are on the list."""
    parts: list[str]
    """Names of the parts that hold such records."""
    versions: list[str]
    """URLs of the versions that have such parts."""

    def carry_out(self) -> None:
        """Delete the parts first and then the versions: after an interruption the versions still tell which parts are left to delete."""
        storage.delete(storage.join(self.set_url, MANIFEST))
        for part in self.parts:
            links.check(storage.join(self.set_url, part, DONE))
            storage.delete(storage.join(self.set_url, part, DONE))
            storage.delete_prefix(storage.join(self.set_url, part))
        for url in self.versions:
            links.check(storage.join(url, MANIFEST))
            storage.delete(storage.join(url, MANIFEST))
            storage.delete_prefix(url)


def plan_purge(set_url: str, ids: frozenset[str]) -> Purge | None:
    """Find the parts of any version of a set that hold records with these ids; None if there are none.

    A part without its marker counts, too: an interrupted purge has begun to delete it.

    Raises:
        DataError: a manifest cannot be read, or holds an invalid name of a part; then nothing may be deleted.
    """
    names = [name for name in storage.list_files(storage.join(set_url, VERSIONS)) if name.endswith(f"/{MANIFEST}")]
    affected: dict[str, int] = {}
    versions = []
    for name in names:
        manifest = read_manifest(storage.join(set_url, VERSIONS, name))
        whole = [part for part in manifest["parts"] if storage.exists(storage.join(set_url, part["name"], DONE))]
        begun = {part["name"]: 0 for part in manifest["parts"] if part not in whole}
        opened = ShardSet(set_url, manifest | {"parts": whole}, ids)
        parts = np.searchsorted(opened.starts, opened.taken_down, side="right") - 1
        hit = begun | {opened.parts[part]["name"]: int(count) for part, count in zip(*np.unique(parts, return_counts=True), strict=True)}
        if hit:
            versions.append(storage.join(set_url, VERSIONS, name.removesuffix(f"/{MANIFEST}")))
            affected |= hit
    return Purge(set_url, sum(affected.values()), sorted(affected), versions) if affected else None


def unmatched(set_urls: list[str], lines: list[str]) -> list[str]:
    """The lines of a take-down list that name no record in any version of some sets.

    Raises:
        DataError: a manifest or a file of ids cannot be read.
    """
    left = lines
    for set_url in set_urls:
        for name in storage.list_files(storage.join(set_url, VERSIONS)):
            if left and name.endswith(f"/{MANIFEST}"):
                manifest = read_manifest(storage.join(set_url, VERSIONS, name))
                whole = [part for part in manifest["parts"] if storage.exists(storage.join(set_url, part["name"], DONE))]
                opened = ShardSet(set_url, manifest | {"parts": whole})
                left = without_match(left, bases_of(manifest["settings"]), opened.named_ids())
    return left
