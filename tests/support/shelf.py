"""A source of boxes with pairs, of which some fail: for tests of the stage prepare."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.prepare import parts
from data_pipeline.prepare.plan import SPLITS, Plan
from data_pipeline.shards.shard_set import IMAGE_SCHEMA, ShardSet, open_set
from data_pipeline.sources.pairs import Census, InputShard, Pair, Unreadable
from infra import storage
from infra.errors import DataError
from infra.world import World


def picture(number: int, size: int = 24) -> bytes:
    """A picture unlike the others: noise in 4 x 4 blocks."""
    out = io.BytesIO()
    blocks = np.random.default_rng(number).integers(0, 256, (size // 4, size // 4, 3), dtype=np.uint8)
    Image.fromarray(blocks.repeat(4, 0).repeat(4, 1)).save(out, "PNG")
    return out.getvalue()


def pair(number: int, **fields: Any) -> Pair:
    facts = {"id": f"id-{number}", "captions": (f"a red picture with number {number}",), "image": picture(number), "source": "shelf"}
    return Pair(**(facts | {"license": "CC0-1.0", "group": f"group-{number}"} | fields))


@dataclass
class Shelf:
    """A source in memory: shards of pairs, and what happens when a shard is read."""

    boxes: list[list[Pair | Unreadable]]
    broken: Mapping[int, str | Exception] = field(default_factory=dict)
    """Shard -> what reading it ends in; words are those of a DataError."""
    reads: list[str] = field(default_factory=list)
    name: str = "shelf"
    census: Census = field(default_factory=Census)

    def shards(self) -> Iterator[InputShard]:
        for number, box in enumerate(self.boxes):
            yield InputShard(f"box-{number}", f"{len(box)} pairs")

    def read(self, shard: InputShard, wanted: Callable[[str], bool]) -> Iterator[Pair | Unreadable]:
        self.reads.append(shard.name)
        number = int(shard.name.removeprefix("box-"))
        for found in self.boxes[number]:
            if isinstance(found, Unreadable) or wanted(found.group):
                yield found
        error = self.broken.get(number)
        if error is not None:
            raise DataError(error) if isinstance(error, str) else error

    def url(self, name: str) -> str:
        return name

    def version(self) -> str:
        return "shelf/1"

    def credits(self) -> dict[str, str]:
        return {"shelf": "Made for tests, CC0."}


def boxes(*sizes: int, first: int = 0) -> list[list[Pair | Unreadable]]:
    made: list[list[Pair | Unreadable]] = []
    for size in sizes:
        made.append([pair(first + number) for number in range(size)])
        first += size
    return made


def run(plan: Plan, url: str, ranks: int = 1) -> list[parts.Share]:
    return [parts.run(plan, url, World(rank, ranks, rank, ranks)) for rank in range(ranks)]


def open_splits(url: str, version: dict[str, Any] | None = None) -> dict[str, ShardSet]:
    versions = {split: version["splits"][split]["version"] if version else "" for split in SPLITS}
    return {split: open_set(storage.join(url, split), IMAGE_SCHEMA, version=versions[split]) for split in SPLITS}


def ids(url: str, version: dict[str, Any] | None = None) -> list[str]:
    return sorted(record["id"] for shard_set in open_splits(url, version).values() for record in shard_set.records())


def tree(url: Path) -> dict[str, str]:
    return {str(path.relative_to(url)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(url.rglob("*")) if path.is_file()}
