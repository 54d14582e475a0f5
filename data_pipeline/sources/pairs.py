"""The protocol of sources, and what they yield: captioned images, unreadable records, and the input shards that hold them."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from infra.globs import CLOSED_FOLDER, LINK_OUTSIDE, LISTED_FOLDER

UNKNOWN = "unknown"
"""``Pair.license`` of records that name none."""


@dataclass(frozen=True)
class Pair:
    """One captioned image before filters and splits."""

    id: str
    """Unique over all sources, and stable: the same record has the same id in every run."""
    captions: tuple[str, ...]
    """At least one caption, the most detailed first."""
    image: bytes
    """An encoded image file, read or rendered."""
    source: str
    """Name of the source, for example 'twemoji' or the URL of a folder."""
    license: str
    """SPDX identifier, or 'unknown'."""
    group: str
    """Pairs of one group are kept or left out together by ``data.share``. If the group is ``given`` it also decides the split: pairs of one group are then
    never in different splits, unless the records name their splits."""
    split: str = ""
    """'train' or 'validation' if the source names the split, else empty."""
    given: bool = field(default=True, compare=False)
    """Whether the record names its group. If not, its split is decided by the bytes of its image."""
    also: tuple[str, ...] = ()
    """Further ids, of rows that say captions of the same image: a take-down by one of them is one of the record."""


@dataclass(frozen=True)
class Unreadable:
    """A record that cannot be read. It is counted under its reason; the other records of its shard are not affected."""

    id: str
    reason: str
    """One of ``data_pipeline.sources.rows_to_pairs.REASONS``."""
    why: str = ""
    """The setting that would make it readable, if there is one."""


@dataclass(frozen=True)
class NotRead:
    """Members of a shard that belong to no record. They are counted by suffix, so that nothing in a shard is ignored silently."""

    suffix: str
    count: int = 1


Found = Pair | Unreadable | NotRead


_SUFFIX = re.compile(r"(\.[a-z0-9_]{1,10})?\.[a-z0-9_]{1,10}$")
NO_SUFFIX = "(no suffix)"
FURTHER = "further metadata"
"""Instead of the version of a .json file beside an image that has one already: 'a.json' and 'a.JSON'."""
_CLOSED = {
    LINK_OUTSIDE: "(link to a folder outside)",
    LISTED_FOLDER: "(link to a folder that is listed)",
    CLOSED_FOLDER: "(folder that cannot be opened)",
    FURTHER: "(further .json of an image)",
}
"""``FileInfo.version`` -> what is counted."""


def suffix_of(name: str) -> str:
    """The suffix under which a file that is not read is counted: '.cls', '.csv.gz', '(no suffix)'."""
    last = name.lower().rpartition("/")[2]
    found = _SUFFIX.search(last)
    if found is None or not last[: found.start()]:
        return NO_SUFFIX
    return found[0] if found[0].endswith((".gz", ".bz2", ".xz", ".zst")) else f".{last.rpartition('.')[2]}"


@dataclass
class Census:
    """Counts of a source's files: each is read, or is a picture that rows may name, or is not read. Complete once all shards are listed."""

    read: int = 0
    """Files whose content is read: images and their captions, tables, tars."""
    pictures: int = 0
    """Image files beside tables, whether rows name them or not."""
    not_read: Counter[str] = field(default_factory=Counter)
    """Suffix -> number of files that this kind of source does not read."""

    @property
    def listed(self) -> int:
        """Number of all files."""
        return self.read + self.pictures + self.not_read.total()

    def pass_over(self, name: str, version: str = "") -> None:
        """Count a file that is not read."""
        self.not_read[_CLOSED.get(version) or suffix_of(name)] += 1

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
    joins: bool = False
    """Whether several of its rows may say captions of one image and bring ids of their own (``Pair.also``)."""


class Source(Protocol):
    """A source of captioned images: it lists its input shards, which must be cheap, and reads any one of them, in any process.

    Listing and reading are deterministic: every process gets the same shards in the same order, and the same records from a shard whose version is unchanged.
    """

    name: str
    """``Pair.source`` of records that name none."""
    census: Census
    """Counts of the files in the last listing by ``shards()``."""

    def url(self, name: str) -> str:
        """URL of one of a shard's files."""
        ...

    def shards(self) -> Iterator[InputShard]:
        """The shards, in a stable order. Files are listed, but records are not read.

        Raises:
            DataError: the source is missing or empty.
        """
        ...

    def read(self, shard: InputShard, wanted: Callable[[str], bool]) -> Iterator[Found]:
        """The records of a shard in a stable order, and counts of what belongs to no record.

        Args:
            shard: one of ``shards()``.
            wanted: called exactly once with the group of each readable record, if possible before its image is fetched or rendered; if it returns False the record
                is left out.

        Raises:
            DataError: the shard as a whole is damaged, or cannot be read. A single unreadable record is yielded as Unreadable instead.
        """
        ...

    def images(self, shard: InputShard, wanted: Callable[[str], bool]) -> Iterator[str]:
        """The URLs of the image files that the rows of a shard name, of wanted groups and in order; none are opened.

        Raises:
            DataError: as of ``read``.
        """
        ...

    def credits(self) -> dict[str, str]:
        """``Pair.source`` -> a line that names author, licence and origin. Names that records themselves give as their source are not in it."""
        ...

    def version(self) -> str:
        """Everything that the records of all shards depend on besides their files: settings, version of the code, package versions."""
        ...
