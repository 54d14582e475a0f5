"""What sources yield: captioned images, records that cannot be read, and the shards in which both are found."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from infra.globs import LINK_OUTSIDE

UNKNOWN = "unknown"
"""``Pair.license`` of records that name none."""


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
    """What is kept or left out together by ``data.share``; and, where it is ``given``, the key of the split: pairs of one group never lie in
    different splits, unless they bring their own."""
    split: str = ""
    """'train' or 'validation' where the source brings its own, else empty."""
    given: bool = field(default=True, compare=False)
    """Whether the record says its group. Others are split by the bytes of their image, whatever form they came in."""


@dataclass(frozen=True)
class Unreadable:
    """One record that cannot be read. It is counted under its reason, and the rest of its shard goes on."""

    id: str
    reason: str
    """One of ``data_pipeline.sources.rows_to_pairs.REASONS``."""
    why: str = ""
    """What would make it readable, where that is a setting."""


@dataclass(frozen=True)
class NotRead:
    """Members of a shard that belong to no record, by suffix. They are counted, so that nothing in a shard vanishes silently."""

    suffix: str
    count: int = 1


Found = Pair | Unreadable | NotRead


_SUFFIX = re.compile(r"(\.[a-z0-9_]{1,10})?\.[a-z0-9_]{1,10}$")
NO_SUFFIX = "(no suffix)"
OUTSIDE = "(link to a folder outside)"


def suffix_of(name: str) -> str:
    """What a file that is not read is counted under: '.cls', '.csv.gz', '(no suffix)'."""
    last = name.lower().rpartition("/")[2]
    found = _SUFFIX.search(last)
    if found is None or not last[: found.start()]:
        return NO_SUFFIX
    return found[0] if found[0].endswith((".gz", ".bz2", ".xz", ".zst")) else f".{last.rpartition('.')[2]}"


@dataclass
class Census:
    """Counts every file of a source as read, as a picture that rows may name, or as not read. Complete once all shards are listed."""

    read: int = 0
    """Files whose content is read: images and their captions, tables, tars."""
    pictures: int = 0
    """Image files beside tables, which rows name or do not."""
    not_read: Counter[str] = field(default_factory=Counter)
    """Suffix -> files that are of no kind that is read here."""

    @property
    def listed(self) -> int:
        """All files."""
        return self.read + self.pictures + self.not_read.total()

    def pass_over(self, name: str, version: str = "") -> None:
        """Count a file that is not read."""
        self.not_read[OUTSIDE if version == LINK_OUTSIDE else suffix_of(name)] += 1

    def to_json(self) -> dict[str, Any]:
        return {"listed": self.listed, "read": self.read, "pictures": self.pictures, "not_read": dict(self.not_read)}


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
    splits: frozenset[str] = frozenset({""})
    """The splits that its names say, '' where they say none. What its records say themselves is not known before they are read."""
    files: tuple[str, ...] = ()
    """Files in which its records lie, relative to the source's base; none where they lie in no files."""
    sizes: str = ""
    """What ``version`` is without times and ETags: changes with the names and the sizes of its files. Empty: its version alone tells contents apart."""
    bytes: int = 0
    """About how many bytes of these files are read for it; images that rows name are not counted."""
    names_images: bool = False
    """Whether its rows name files of images, which are not among ``files``: ``Source.images`` says which."""


class Source(Protocol):
    """A list of shards that is cheap to make, and a way to read one of them, in any process."""

    name: str
    """``Pair.source`` of records that bring none."""
    census: Census
    """Of the listing that ``shards()`` made last."""

    def url(self, name: str) -> str:
        """Where one of the files of a shard lies."""
        ...

    def shards(self) -> Iterator[InputShard]:
        """The shards in a stable order. Files are listed, records are not read.

        Raises:
            DataError: the source is missing or empty.
        """
        ...

    def read(self, shard: InputShard, wanted: Callable[[str], bool]) -> Iterator[Found]:
        """The records of a shard in a stable order, and what lies among them that belongs to no record.

        Args:
            shard: one of ``shards()``.
            wanted: asked once for the group of each record, before its image is fetched or rendered where that can be avoided; others are left out.

        Raises:
            DataError: the shard as a whole is broken, or cannot be reached.
        """
        ...

    def images(self, shard: InputShard, wanted: Callable[[str], bool]) -> Iterator[str]:
        """The URLs of the image files that the rows of a shard name, of wanted groups and in order; none are opened.

        Raises:
            DataError: as of ``read``.
        """
        ...

    def credits(self) -> dict[str, str]:
        """Source name of a record -> one line naming author, licence and origin; names that records bring themselves are not in it."""
        ...

    def version(self) -> str:
        """What all shards depend on besides their files: settings, code, package versions."""
        ...
