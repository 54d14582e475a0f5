"""Folders of images with captions in .txt files of the same name (one caption a line) or .json files; local or remote."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

from data_pipeline.config import SourceConfig
from data_pipeline.sources.origin import Origin, encodable
from data_pipeline.sources.pairs import FURTHER, Census, Found, InputShard, Unreadable
from data_pipeline.sources.rows_to_pairs import (
    IMAGE_SUFFIXES,
    LARGE_TEXT,
    MAX_TEXT_BYTES,
    MISSING_IMAGE,
    BadRecord,
    Draft,
    clean,
    in_order,
    join_captions,
    parse_object,
    read_limited,
    split_of_name,
    with_images,
)
from infra import globs, storage
from infra.errors import DataError
from infra.storage import FileInfo

_TEXTS = (".txt", ".json")
_SPREAD = 4
"""A run holds between 1/4 and 4 times the desired number of records."""


@dataclass(frozen=True)
class Item:
    """An image, and the caption files with its name."""

    image: FileInfo
    texts: tuple[FileInfo, ...]

    @property
    def files(self) -> tuple[FileInfo, ...]:
        return (self.image, *self.texts)


class FolderSource:
    """Images below a folder, or those that match a pattern ('photos/*.jpg'), and their captions. An input shard is a run of consecutive names."""

    def __init__(self, config: SourceConfig, records_per_part: int) -> None:
        self.name = config.url
        self.origin = Origin(config)
        self.records = records_per_part
        self.census = Census()

    def shards(self) -> Iterator[InputShard]:
        """Runs of names, whose borders are decided by a hash of the name at the border: so a new image changes only the run in which it falls, and rarely a
        second one.

        Raises:
            DataError: the folder is missing, holds no image, or none with captions. Raised after the whole listing.
        """
        self.census = Census()
        run: list[Item] = []
        images = captioned = 0
        for item in self._items():
            images, captioned = images + 1, captioned + bool(item.texts)
            if len(run) >= _SPREAD * self.records or (len(run) * _SPREAD >= self.records and self._cuts(item.image.name)):
                yield _shard(run)
                run = []
            run.append(item)
        if not captioned:
            what = f"none of its {images} images has a same-named .txt or .json file" if images else "no such folder, or no image in it"
            raise DataError(
                f"{self.name}: {what}; expected for example apple.png ({', '.join(IMAGE_SUFFIXES)}) beside apple.txt, one caption a line, "
                "or beside apple.json with the key caption. data.sources accepts tables, Parquet files, tars and 'emoji' besides folders."
            )
        yield _shard(run)

    def read(self, shard: InputShard, wanted: Callable[[str], bool]) -> Iterator[Found]:
        """The records of a run of names; images are read after their captions, and only those of wanted groups.

        Raises:
            DataError: a file cannot be read for a reason that may pass.
        """
        is_remote = storage.is_remote(self.origin.base)
        items = _grouped((FileInfo(name, 0, "") for name in shard.keys), Census())
        drafts = in_order(self._draft, items, lambda item: is_remote)
        return with_images(draft for draft in drafts if isinstance(draft, Unreadable) or wanted(draft.pair.group))

    def images(self, shard: InputShard, wanted: Callable[[str], bool]) -> Iterator[str]:
        """None: images lie in the files of the shard."""
        return iter(())

    def credits(self) -> dict[str, str]:
        return self.origin.credits()

    def url(self, name: str) -> str:
        return self.origin.part(name)

    def version(self) -> str:
        return self.origin.version("folder/5")

    def _items(self) -> Iterator[Item]:
        """Images with their caption files, in the order of the listing."""
        last = self.name.rpartition("/")[2]
        if not last.lower().endswith(IMAGE_SUFFIXES):
            yield from _grouped(self.origin.files(self.census), self.census)
            return
        one = globs.is_pattern(last) and storage.exists(self.name)  # an image of that name, and no pattern
        folder, stem = self.name[: len(self.name) - len(last)], (globs.escape(last) if one else last).rpartition(".")[0]
        # A pattern such as *.jpg leaves the caption files out; other files in the folder are not counted as unread.
        files = storage.glob(f"{folder}{stem}.*", self.origin.links)[1]
        for item in _grouped(files, Census()):
            name = item.image.name.rpartition("/")[2]
            if name == last if one else globs.matches([name], [last]):
                self.census.read += len(item.files)
                yield item

    def _cuts(self, name: str) -> bool:
        return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "big") % self.records == 0

    def _draft(self, item: Item) -> Draft | Unreadable:
        name = item.image.name
        shown = encodable(name)
        try:
            url = self.origin.inside(self.origin.url(name))
            texts = [self._read(text.name) for text in item.texts if text.name.lower().endswith(".txt")]
            row = next((parse_object(self._read(text.name)) for text in item.texts if text.name.lower().endswith(".json")), {})
            captions = join_captions(self.origin.captions(row), texts)
        except BadRecord as bad:
            return Unreadable(self.origin.id(shown), bad.reason, bad.why)
        split = _split(shown)
        # The group does not contain the URL, so that records keep their split when the folder is moved.
        return Draft(self.origin.pair(shown, row, captions, split, f"folder/{shown.rpartition('.')[0]}"), url)

    def _read(self, name: str) -> bytes:
        return read_limited(self.origin.inside(self.origin.url(name)), MAX_TEXT_BYTES, MISSING_IMAGE, LARGE_TEXT)


def _shard(run: list[Item]) -> InputShard:
    files = [file for item in run for file in item.files]
    names = tuple(file.name for file in files)
    version, sizes = _digest([(file.name, file.version) for file in files]), _digest([(file.name, file.size) for file in files])
    ends = run[0].image.name, run[-1].image.name
    label = ends[0] if len(run) == 1 else "..".join(ends)
    splits = frozenset(_split(item.image.name) for item in run)
    read = sum(file.size for file in files)
    return InputShard(clean(label), version, keys=names, splits=splits, files=names, sizes=sizes, bytes=read)


def _digest(facts: list[tuple[str, str]] | list[tuple[str, int]]) -> str:
    return hashlib.blake2b(repr(facts).encode(), digest_size=16).hexdigest()


def _split(name: str) -> str:
    """The split that the name of a folder says; the name of the file itself is ignored, because a picture may be called test.jpg."""
    return split_of_name(f"{name.rpartition('/')[0]}/")


def _grouped(files: Iterator[FileInfo], census: Census) -> Iterator[Item]:
    """Images with the caption files of the same name, from a listing ordered by full name; ``census`` counts all files.

    In that order, files of one folder that share their name up to the first dot follow each other, interrupted only by the content of folders whose names begin
    in the same way. So at most one group is open for each folder above the current one.
    """
    opened: list[tuple[str, str, list[FileInfo]]] = []  # folder, name up to the first dot, files
    for file in chain(files, [None]):
        folder, _, last = file.name.rpartition("/") if file else ("", "", "")
        key = (folder, last.partition(".")[0])
        while opened and (file is None or not (opened[-1][:2] == key or _is_below(folder, opened[-1][0]))):
            yield from _matched(opened.pop()[2], census)
        if file is None:
            return
        if opened and opened[-1][:2] == key:
            opened[-1][2].append(file)
        else:
            opened.append((*key, [file]))


def _is_below(folder: str, other: str) -> bool:
    return folder != other and (not other or folder.startswith(f"{other}/"))


def _matched(files: list[FileInfo], census: Census) -> Iterator[Item]:
    texts: dict[str, list[FileInfo]] = {}
    for file in files:
        stem, _, suffix = file.name.rpartition(".")
        if f".{suffix.lower()}" in _TEXTS:
            texts.setdefault(stem, []).append(file)
    read, unused = set[str](), set[str]()
    for file in files:
        if file.name.lower().endswith(IMAGE_SUFFIXES) and file.version not in globs.NOT_FILES:
            # The order of captions: .txt before .json, and 'a.txt' before 'A.TXT'.
            beside = sorted(
                texts.get(file.name.rpartition(".")[0], ()),
                key=lambda text: (_TEXTS.index(text.name[text.name.rindex(".") :].lower()), text.name.swapcase()),
            )
            metadata = [text for text in beside if text.name.lower().endswith(".json")]
            item = Item(file, tuple(text for text in beside if text not in metadata[1:]))
            unused.update(text.name for text in metadata[1:])
            read |= {found.name for found in item.files}
            yield item
    census.read += len(read)
    for file in files:
        if file.name not in read:
            census.pass_over(file.name, FURTHER if file.name in unused else file.version)
