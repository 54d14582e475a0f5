"""Integrity checks of a shard set as a whole: manifest, index, versions, excluded positions, and that no id appears twice."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.audit.check_parts import PartJob, Problem, Rules
from data_pipeline.shards import links
from data_pipeline.shards.part_files import INDEX, U64
from data_pipeline.shards.schema import read_index, read_manifest
from data_pipeline.shards.shard_set import EXCLUDED, IDS, MANIFEST, version_url
from infra import storage
from infra.digests import digest
from infra.errors import DataError, UnreachableError


@dataclass
class Layout:
    """The content of a set's files outside its parts."""

    url: str
    version_url: str = ""
    """Folder of the version."""
    manifest: dict[str, Any] = field(default_factory=dict)
    shards: list[dict[str, Any]] = field(default_factory=list)
    """Entries of the index."""
    excluded: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    """Positions of stored records that do not belong to the version."""
    problems: list[Problem] = field(default_factory=list)

    def jobs(self, rules: Rules) -> list[PartJob]:
        """A job for each part that the manifest names."""
        owned: dict[str, list[dict[str, Any]]] = {}
        for entry in self.shards:
            owned.setdefault(entry["raw_data"]["basename"].partition("/")[0], []).append(entry)
        return [PartJob(self.url, part, tuple(owned.get(part["name"], ())), rules, self.version_url) for part in self.manifest.get("parts", ())]


def read_layout(url: str, version: str = "") -> Layout:
    """Read and check the files of a set outside its parts.

    Args:
        url: place of the set.
        version: first characters of a content hash; empty: the newest version.
    """
    layout = Layout(url)
    try:
        place = storage.join(version_url(url, version), MANIFEST) if version else storage.join(url, MANIFEST)
        layout.manifest = read_manifest(place)
        layout.version_url = version_url(url, str(layout.manifest["content_hash"]))
        index = storage.join(layout.version_url, INDEX)
        layout.shards = read_index(index)
        if not version:
            layout.problems += _copies(layout)
        layout.excluded = _read_excluded(layout, storage.join(layout.version_url, EXCLUDED))
        layout.problems += _sums(layout, place, index)
    except UnreachableError:
        raise
    except DataError as error:
        name, _, what = str(error).partition(": ")
        layout.problems.append(Problem(name, what.rstrip(".")))
    # Both must be deleted: a merge does not write an existing version again, nor the copies at the top if the newest manifest is the same.
    wrong = tuple(place for place in (storage.join(url, MANIFEST), layout.version_url) if place)
    layout.problems = [replace(problem, delete=wrong) for problem in layout.problems]
    return layout


def _copies(layout: Layout) -> list[Problem]:
    """Compare the newest version's files with their copies at the top of the set, which other programs read."""
    found, name = [], layout.version_url.rpartition("/")[2]
    if read_manifest(storage.join(layout.version_url, MANIFEST)) != layout.manifest:
        found.append(Problem(storage.join(layout.url, MANIFEST), f"is not the manifest of version {name}, which it names"))
    if read_index(storage.join(layout.url, INDEX)) != layout.shards:
        found.append(Problem(storage.join(layout.url, INDEX), f"is not the index of version {name}"))
    return found


def _read_excluded(layout: Layout, place: str) -> NDArray[np.int64]:
    said, stored = layout.manifest["excluded"], int(layout.manifest["stored"])
    links.check(place)
    data = storage.read_bytes(place)
    complaints = []
    if hashlib.sha256(data).hexdigest() != said["sha256"]:
        complaints.append("damaged: its SHA-256 is not the manifest's")
    if len(data) != 8 * said["count"]:
        complaints.append(f"{len(data)} bytes; the manifest counts {said['count']} positions of 8")
    positions = np.frombuffer(data[: len(data) // 8 * 8], U64)
    if (positions >= stored).any() or (np.diff(positions.astype(np.float64)) <= 0).any():
        complaints.append(f"its positions do not rise, or leave 0 to {stored - 1}")
    layout.problems += [Problem(place, what) for what in complaints]
    return positions[positions < stored].astype(np.int64)


def _sums(layout: Layout, place: str, index: str) -> list[Problem]:
    manifest, found = layout.manifest, []
    parts = sum(int(part["count"]) for part in manifest["parts"])
    if parts != manifest["stored"] or manifest["stored"] - manifest["excluded"]["count"] != manifest["count"]:
        what = f"its parts hold {parts} records, it counts {manifest['stored']} stored, {manifest['excluded']['count']} excluded and {manifest['count']} to be read"
        found.append(Problem(place, what))
    samples = sum(int(shard["samples"]) for shard in layout.shards)
    if samples != manifest["stored"]:
        found.append(Problem(index, f"lists {samples} records, the manifest {manifest['stored']}"))
    # The hash covers what parts hold, and not their names.
    parts_only = [{key: value for key, value in part.items() if key != "name"} for part in manifest["parts"]]
    content = {key: value for key, value in manifest.items() if key not in ("content_hash", "producer")} | {"parts": parts_only}
    if digest(content) != manifest["content_hash"]:
        found.append(Problem(place, "its content hash is not that of its content: it was changed by hand, or is damaged"))
    names = {part["name"] for part in manifest["parts"]}
    strays = sorted({shard["raw_data"]["basename"].partition("/")[0] for shard in layout.shards} - names)
    if strays:
        found.append(Problem(index, f"lists shards of {strays[0]}, which is no part in the manifest"))
    return found


def shown_ids(layout: Layout, ids: Sequence[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    """The ids (as in ids.u64) of all parts in order, without those of excluded records."""
    joined = np.concatenate([*ids, np.zeros(0, U64)])
    return np.delete(joined, layout.excluded[layout.excluded < len(joined)])


def read_ids(layout: Layout) -> list[NDArray[np.uint64]]:
    """ids.u64 of every part.

    Raises:
        DataError: one is missing.
    """
    return [np.frombuffer(storage.read_bytes(storage.join(layout.url, part["name"], IDS)), U64) for part in layout.manifest["parts"]]


def repeated(ids: NDArray[np.uint64]) -> int:
    """How many records repeat the id of another one, and so would be read twice."""
    return len(ids) - len(np.unique(ids))
