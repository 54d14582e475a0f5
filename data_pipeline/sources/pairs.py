"""What sources yield: captioned images, records that cannot be read, and the shards in which both are found."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Pair:
    """One captioned image before filters and splits."""

    id: str
    """Unique among all sources, and stable: the same record has the same id in every run."""
    captions: tuple[str, ...]
    """At least one, the fullest first."""
    image: bytes
    """An encoded image file, as found or rendered."""
    source: str
    """Name of the source, for example 'twemoji' or the URL of a folder."""
    license: str
    """SPDX identifier, or 'unknown'."""
    group: str
    """Key of the split: pairs of one group never lie in different splits, unless they bring their own."""
    split: str = ""
    """'train' or 'validation' where the source brings its own, else empty."""


@dataclass(frozen=True)
class Unreadable:
    """One record that cannot be read. It is counted under its reason, and the rest of its shard goes on."""

    id: str
    reason: str
    """One of ``data_pipeline.sources.rows_to_pairs.REASONS``."""


@dataclass(frozen=True)
class InputShard:
    """One unit of work: a tar, row groups of a Parquet file, a byte range of a table, a run of file names."""

    name: str
    """Stable within its source, and readable: 'train-00000.tar', 'captions.tsv@0', 'a/000.png..a/999.png'."""
    version: str
    """Changes whenever the content of the shard may have."""
    keys: tuple[str, ...] = ()
    """Of sources that list names."""
    span: tuple[int, int] = (0, 0)
    """Bytes, or row groups: from the first up to, not including, the last."""


class Source(Protocol):
    """A list of shards that is cheap to make, and a way to read one of them, in any process."""

    name: str
    """``Pair.source`` of records that bring none."""

    def shards(self) -> Iterator[InputShard]:
        """The shards in a stable order. Files are listed, records are not read.

        Raises:
            DataError: the source is missing or empty.
        """
        ...

    def read(self, shard: InputShard, wanted: Callable[[str], bool]) -> Iterator[Pair | Unreadable]:
        """The records of a shard in a stable order.

        Args:
            shard: one of ``shards()``.
            wanted: asked for the group of each record, before its image is fetched or rendered where that can be avoided; others are left out.

        Raises:
            DataError: the shard as a whole is broken, or cannot be reached.
        """
        ...

    def credits(self) -> dict[str, str]:
        """Source name of a record -> one line naming author, licence and origin; names that records bring themselves are not in it."""
        ...

    def version(self) -> str:
        """What all shards depend on besides their files: settings, code, package versions."""
        ...
