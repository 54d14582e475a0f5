"""WebDataset tars, plain or gzipped, read as streams. Members that share their name up to the first dot make up one record; this fits img2dataset's output.

A name with further dots ('photo 1.2.jpg') is cut at the first dot that is followed by a known extension.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, BinaryIO

from data_pipeline.config import SourceConfig
from data_pipeline.sources import tar, tar_metadata
from data_pipeline.sources.columns import find_captions
from data_pipeline.sources.gzipped import unzipped
from data_pipeline.sources.origin import Origin
from data_pipeline.sources.pairs import Census, Found, InputShard, NotRead, Pair, Unreadable, suffix_of
from data_pipeline.sources.rows_to_pairs import (
    IMAGE_SUFFIXES,
    LARGE_IMAGE,
    LARGE_TEXT,
    MAX_IMAGE_BYTES,
    MAX_TEXT_BYTES,
    MISSING_IMAGE,
    NO_CAPTION,
    REPEATED_KEY,
    SECOND_IMAGE,
    BadRecord,
    agreed,
    clean,
    join_captions,
    parse_object,
    split_of_name,
    text_in,
)
from infra import globs, storage
from infra.errors import DataError

log = logging.getLogger(__name__)

SUFFIXES = (".tar", ".tar.gz", ".tgz")
PENDING_BYTES = 256 << 20
"""Most bytes of incomplete records, which wait for members further on in the tar; beyond that the oldest are given up."""


@dataclass
class Sample:
    """The members of one record that have been read so far."""

    plain: str = ""
    """The name up to its first dot. If that is not the record's key, the members may belong to the record with that key instead."""
    seen: set[str] = field(default_factory=set)
    """Extensions read since the key was last repeated."""
    image_name: str = ""
    image: bytes | None = None
    further: list[str] = field(default_factory=list)
    """Names of images that came after the first one."""
    texts: dict[str, bytes] = field(default_factory=dict)
    """Extension -> caption file."""
    metadata: bytes | None = None
    problem: str = ""
    bytes: int = 0

    def is_whole(self) -> bool:
        return bool(self.problem) or (self.image is not None and (bool(self.texts) or self.metadata is not None))


class WebDatasetSource:
    """The tars of a folder, or those that match a pattern; each is an input shard."""

    def __init__(self, config: SourceConfig) -> None:
        self.name = config.url
        self.origin = Origin(config)
        self.census = Census()
        self._metadata_in = cache(lambda folder: tar_metadata.find(folder, self.origin))

    def shards(self) -> Iterator[InputShard]:
        """The tars, sorted by name. The version of a tar covers the lines about it in metadata files.

        Raises:
            DataError: there is no tar.
        """
        self.census = census = Census()
        tars = []
        for info in self.origin.files(census):
            if info.name.lower().endswith(SUFFIXES):
                tars.append(info)
                census.read += 1
            elif tar_metadata.is_one(info.name):
                census.read += 1
            else:
                census.pass_over(info.name)
        if not tars:
            raise DataError(f"{self.name}: no .tar file there; data.sources accepts a folder of them, one of them, or a pattern such as data/*.tar.")
        self._name_strays({info.name for info in tars})
        for info in sorted(tars, key=lambda info: info.name):
            place = self._place(info.name)
            said = f" {place.digest.hexdigest()}" if place else ""
            splits = frozenset({split_of_name(info.name)})
            joins = place is not None and place.joins
            yield InputShard(
                info.name, info.version + said, splits=splits, files=(info.name,), sizes=f"{info.size}{said}", bytes=info.size, joins=joins
            )

    def read(self, shard: InputShard, wanted: Callable[[str], bool]) -> Iterator[Found]:
        """The records, in the order in which they become complete.

        Raises:
            DataError: the tar is missing, truncated or damaged.
        """
        place = self._place(shard.name)
        url = self.origin.part(shard.name)
        reader = _Reader(self.origin, shard.name, place, wanted)
        with storage.open_stream(url) as stream, unzipped(stream, url) as plain:
            yield from reader.records(plain, url)

    def images(self, shard: InputShard, wanted: Callable[[str], bool]) -> Iterator[str]:
        """None: images lie in the files of the shard."""
        return iter(())

    def credits(self) -> dict[str, str]:
        return self.origin.credits()

    def url(self, name: str) -> str:
        return self.origin.part(name)

    def version(self) -> str:
        return self.origin.version("webdataset/4")

    def _name_strays(self, tars: set[str]) -> None:
        """Say which lines of metadata are about tars that are not there; a pattern leaves tars out on purpose."""
        for folder in sorted({name.rpartition("/")[0] for name in tars}) if not globs.is_pattern(self.name) else ():
            about = self._metadata_in(self.origin.url(folder))
            lost = [place.lines for name, place in about.items() if f"{folder}/{name}".lstrip("/") not in tars]
            if lost:
                log.warning(
                    "%s: %d lines of its %s are about %d tars that are not there.",
                    self.origin.url(folder),
                    sum(lost),
                    tar_metadata.PATTERN,
                    len(lost),
                )

    def _place(self, name: str) -> tar_metadata.Place | None:
        folder, _, tar_name = name.rpartition("/")
        return self._metadata_in(self.origin.url(folder)).get(tar_name)


class _Reader:
    """One pass over one tar."""

    def __init__(self, origin: Origin, shard: str, place: tar_metadata.Place | None, wanted: Callable[[str], bool]) -> None:
        self.origin, self.shard, self.wanted = origin, shard, wanted
        self.lines = tar_metadata.Lines(place, self._images)
        self.split = split_of_name(shard)
        self.pending: dict[str, Sample] = {}
        self.pending_bytes = 0
        self.done: set[str] = set()
        self.given_up: set[str] = set()
        self.not_read = Counter[str]()

    def records(self, stream: BinaryIO, url: str) -> Iterator[Found]:
        current, repeated = "", set[str]()
        for name, _, content, kind in tar.members(stream, url, self._limit):
            key, extension = self._key(name)
            if kind or not extension:
                self.not_read[kind or suffix_of(name)] += 1
                continue
            if self._is_image(extension):
                self.lines.of(name)  # a line about it is about an image that is there, whatever comes of it
            if key != current:
                yield from self._emit(current)
                yield from self._make_room()
                current, repeated = key, set()
            closed = key in self.done or key in self.given_up
            seen = repeated if closed else self.pending.setdefault(key, Sample(_key(name)[0])).seen
            if extension in seen or (key in self.done and not seen):  # a second record with this key begins
                yield Unreadable(self._id(key), REPEATED_KEY)
                seen.clear()
                repeated = seen
            seen.add(extension)
            if closed or seen is repeated:
                continue
            if self._is_image(extension) and self.pending[key].image_name:
                self.pending[key].further.append(name)
            else:
                self._add(self.pending[key], name, extension, content)
        yield from self._emit(current)
        yield from self._end()

    def _end(self) -> Iterator[Found]:
        """Records that are incomplete at the end of the tar. Members with further dots in their names, whose first part is the key of another record, count as not
        read."""
        known = self.done | self.pending.keys()
        for key in list(self.pending):
            sample = self.pending[key]
            if sample.plain != key and sample.plain in known and (sample.image is None or not sample.texts):
                self._pass_over(key)
            else:
                yield from self._emit(key, last=True)
        if left := self.lines.left():
            self.not_read["(metadata line of no image)"] += left
        yield from (NotRead(suffix, count) for suffix, count in sorted(self.not_read.items()))

    def _images(self) -> Iterator[str]:
        """The names of the tar's images, by one more pass over it."""
        url = self.origin.part(self.shard)
        with storage.open_stream(url) as stream, unzipped(stream, url) as plain:
            yield from (name for name, _, _, kind in tar.members(plain, url, lambda _: -1) if not kind and self._is_image(self._key(name)[1]))

    def _pass_over(self, key: str) -> None:
        self.not_read.update(suffix_of(f"x.{extension}") for extension in self.pending[key].seen)
        self._forget(key)

    def _key(self, name: str) -> tuple[str, str]:
        """Key and extension of a member, cut at the first dot that is followed by a known extension; both empty if there is none."""
        extension = _key(name)[1]
        while extension and not self._is_read(extension):
            extension = extension.partition(".")[2]
        # Extensions are compared in lower case; the key keeps its case.
        return (name.removeprefix("./").rsplit(".", extension.count(".") + 1)[0], extension) if extension else ("", "")

    def _limit(self, name: str) -> int:
        extension = self._key(name)[1]
        if not extension:
            return -1
        return MAX_IMAGE_BYTES if self._is_image(extension) else MAX_TEXT_BYTES

    def _is_image(self, extension: str) -> bool:
        wanted = self.origin.config.image
        return extension == wanted.lower() if wanted else f".{extension}" in IMAGE_SUFFIXES

    def _is_caption(self, extension: str) -> bool:
        return extension in self.origin.config.captions or (extension == "txt" and not self.origin.config.captions)

    def _is_read(self, extension: str) -> bool:
        return extension == "json" or self._is_image(extension) or self._is_caption(extension)

    def _id(self, key: str) -> str:
        return self.origin.id(f"{self.shard}/{clean(key)}")

    def _add(self, sample: Sample, name: str, extension: str, content: bytes | None) -> None:
        sample.bytes += len(content or b"")
        self.pending_bytes += len(content or b"")
        if self._is_image(extension):
            sample.image_name = name
        if content is None:
            sample.problem = LARGE_IMAGE if self._is_image(extension) else LARGE_TEXT
        elif self._is_image(extension):
            sample.image = content
        elif self._is_caption(extension):
            sample.texts.setdefault(extension, content)
        else:
            sample.metadata = content

    def _emit(self, key: str, last: bool = False) -> Iterator[Found]:
        """The record of a key, if its members are complete; with ``last``, even if they are not."""
        sample = self.pending.get(key)
        if sample is None or not (last or sample.is_whole() or self._row(sample)):
            return
        try:
            found: Found = self._pair(key, sample)
        except BadRecord as bad:
            if bad.reason == NO_CAPTION and not last:
                return  # a caption file may still come
            found = Unreadable(self._id(key), bad.reason)
        self._forget(key)
        self.done.add(key)
        if not isinstance(found, Pair) or self.wanted(found.group):
            yield found
        yield from self._further(sample)

    def _make_room(self) -> Iterator[Unreadable]:
        while self.pending_bytes > PENDING_BYTES:
            key = next(iter(self.pending))
            self.given_up.add(key)
            if self.pending[key].plain != key and self.pending[key].plain in self.done:
                self._pass_over(key)
                continue
            yield Unreadable(self._id(key), MISSING_IMAGE if self.pending[key].image is None else NO_CAPTION)
            yield from self._further(self.pending[key])
            self._forget(key)

    def _further(self, sample: Sample) -> Iterator[Unreadable]:
        return (Unreadable(self._id(name), SECOND_IMAGE) for name in sample.further)

    def _forget(self, key: str) -> None:
        self.pending_bytes -= self.pending.pop(key).bytes

    def _row(self, sample: Sample) -> list[dict[str, Any]]:
        return self.lines.of(sample.image_name) if sample.image_name else []

    def _pair(self, key: str, sample: Sample) -> Pair:
        if sample.problem:
            raise BadRecord(sample.problem)
        if sample.image is None:
            raise BadRecord(MISSING_IMAGE)
        lines = self._row(sample)
        row = parse_object(sample.metadata) if sample.metadata is not None else {}
        if lines:
            row |= agreed(lines, self.origin.config.split)
        said = [caption for each in (row, *lines[1:]) for caption in self.origin.captions(each)]
        captions = join_captions(said, sample.texts.values())
        suffix = f".{_key(sample.image_name)[1].rpartition('.')[2]}"
        self.origin.took("member", suffix, [*(f".{name}" for name in sample.texts), *find_captions(row, self.origin.config)])
        place = f"{self.shard}/{clean(key)}"
        pair = self.origin.pair(place, row, captions, self.split)
        also = tuple(self.origin.pair(place, line, (), "").id for line in lines[1:] if text_in(line, *tar_metadata.IDS))
        return replace(pair, image=sample.image, also=also)


def _key(name: str) -> tuple[str, str]:
    """A member's path up to the first dot of its last part, and the rest in lower case; both empty for a hidden file or folder."""
    name = name.removeprefix("./")
    folder, _, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    if not stem or any(part.startswith(".") and part != ".." for part in name.split("/")):
        return "", ""
    return f"{folder}/{stem}" if folder else stem, extension.lower()
