"""What sources yield: captioned images, and the units of work that they come in."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Pair:
    """One captioned image before filters and splits."""

    id: str
    """Unique among all sources, and stable: the same drawing has the same id in every run."""
    captions: tuple[str, ...]
    """At least one, the fullest first."""
    image: bytes
    """An encoded image file, as found or rendered."""
    source: str
    """Name of the source, for example 'twemoji' or the URL of a folder."""
    license: str
    """SPDX identifier, or 'unknown'."""
    group: str
    """Key of the split: pairs of one group never lie in different splits."""
    split: str = ""
    """'train' or 'validation' where the source brings its own split; empty: by the hash of the group."""


@dataclass(frozen=True)
class Unreadable:
    """One record that cannot be read. It is counted under its reason, and the rest of its shard goes on."""

    id: str
    reason: str
    """Short and fixed: 'missing image', 'no caption', ..."""


@dataclass(frozen=True)
class InputShard:
    """One unit of work: a tar, a range of row groups of a Parquet file, a byte range of a table, a run of file names."""

    name: str
    """Stable within the source, and readable."""
    version: str
    """Changes whenever the shard's content may have."""
    keys: tuple[str, ...] = ()
    """Of sources that list names."""
    span: tuple[int, int] = (0, 0)
    """Bytes or row groups, of sources that cut files."""


class Source(Protocol):
    """A place of captioned images that can say what there is without reading it."""

    @property
    def name(self) -> str:
        """The source of records that bring none."""
        ...

    def shards(self) -> Iterator[InputShard]:
        """Units of work in a stable order. Files are listed, records are not.

        Raises:
            DataError: the source is missing or empty.
        """
        ...

    def read(self, shard: InputShard, wanted: Callable[[str], bool]) -> Iterator[Pair | Unreadable]:
        """Records of a shard in a stable order; those of groups that are not wanted are left out, and their images not read.

        Raises:
            DataError: the shard itself is broken; the file is named.
        """
        ...

    def version(self) -> str:
        """What all shards depend on besides themselves (package versions, render size): finished parts are done again when it changes."""
        ...

    def credits(self) -> dict[str, str]:
        """Source name of a record -> one line naming author, licence and origin."""
        ...
