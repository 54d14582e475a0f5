"""WebDataset tars, read as streams: members that share their name up to the first dot are one record. img2dataset's output is read as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, BinaryIO

from data_pipeline.config import SourceConfig
from data_pipeline.sources import tar, tar_metadata
from data_pipeline.sources.pairs import InputShard, Pair, Unreadable
from data_pipeline.sources.rows_to_pairs import (
    IMAGE_SUFFIXES,
    LARGE_IMAGE,
    LARGE_TEXT,
    MAX_IMAGE_BYTES,
    MAX_TEXT_BYTES,
    MISSING_IMAGE,
    NO_CAPTION,
    REPEATED_KEY,
    BadRecord,
    Origin,
    clean,
    join_captions,
    parse_object,
    split_of_name,
)
from infra import storage
from infra.errors import DataError

PENDING_BYTES = 256 << 20
"""Members that wait for others of their record further on in the tar; when they are more, the oldest are given up."""


@dataclass
class Sample:
    """The members of one record, as far as they have come."""

    image_name: str = ""
    image: bytes | None = None
    texts: dict[str, bytes] = field(default_factory=dict)
    """Extension -> caption file."""
    metadata: bytes | None = None
    problem: str = ""
    bytes: int = 0

    def is_whole(self) -> bool:
        return bool(self.problem) or (self.image is not None and (bool(self.texts) or self.metadata is not None))


class WebDatasetSource:
    """The .tar files of a folder, or those that a pattern names; each is a shard."""

    def __init__(self, config: SourceConfig) -> None:
        self.name = config.url
        self.origin = Origin(config)
        self._companions = cache(tar_metadata.find)

    def shards(self) -> Iterator[InputShard]:
        """Tars sorted by name. Their versions cover the lines about them in metadata files beside them.

        Raises:
            DataError: there is no tar.
        """
        _, infos = storage.glob(self.name)
        tars = sorted((info for info in infos if info.name.lower().endswith(".tar")), key=lambda info: info.name)
        if not tars:
            raise DataError(f"{self.name}: no .tar file there; data.sources accepts a folder of them, one of them, or a pattern such as data/*.tar.")
        for info in tars:
            place = self._place(info.name)
            yield InputShard(info.name, f"{info.version} {place.digest.hexdigest()}" if place else info.version)

    def read(self, shard: InputShard, wanted: Callable[[str], bool]) -> Iterator[Pair | Unreadable]:
        """Records in the order in which they are complete.

        Raises:
            DataError: the tar is missing, truncated or damaged.
        """
        place = self._place(shard.name)
        reader = _Reader(self.origin, shard.name, tar_metadata.rows(place) if place else {}, wanted)
        url = self.origin.url(shard.name)
        with storage.open_stream(url) as stream:
            yield from reader.records(stream, url)

    def credits(self) -> dict[str, str]:
        return self.origin.credits()

    def version(self) -> str:
        return self.origin.version("webdataset/1")

    def _place(self, name: str) -> tar_metadata.Place | None:
        folder, _, tar_name = name.rpartition("/")
        return self._companions(self.origin.url(folder)).get(tar_name)


class _Reader:
    """One pass over one tar."""

    def __init__(self, origin: Origin, shard: str, rows: dict[str, dict[str, Any]], wanted: Callable[[str], bool]) -> None:
        self.origin, self.shard, self.rows, self.wanted = origin, shard, rows, wanted
        self.split = split_of_name(shard)
        self.pending: dict[str, Sample] = {}
        self.pending_bytes = 0
        self.done: set[str] = set()
        self.given_up: set[str] = set()

    def records(self, stream: BinaryIO, url: str) -> Iterator[Pair | Unreadable]:
        current = ""
        for name, _, content in tar.members(stream, url, self._limit):
            key, extension = _key(name)
            if not extension or not self._is_read(extension):
                continue
            if key != current:
                yield from self._emit(current)
                yield from self._make_room()
                if key in self.done:
                    yield Unreadable(self._id(key), REPEATED_KEY)
                current = key
            if key not in self.done and key not in self.given_up:
                self._add(self.pending.setdefault(key, Sample()), name, extension, content)
        yield from self._emit(current)
        for key in list(self.pending):
            yield from self._emit(key, last=True)

    def _limit(self, name: str) -> int:
        extension = _key(name)[1]
        if not extension or not self._is_read(extension):
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
        return self.origin.url(f"{self.shard}/{clean(key)}")

    def _add(self, sample: Sample, name: str, extension: str, content: bytes | None) -> None:
        sample.bytes += len(content or b"")
        self.pending_bytes += len(content or b"")
        if content is None:
            sample.problem = LARGE_IMAGE if self._is_image(extension) else LARGE_TEXT
        elif self._is_image(extension):
            if sample.image is None:
                sample.image, sample.image_name = content, name
        elif self._is_caption(extension):
            sample.texts.setdefault(extension, content)
        else:
            sample.metadata = content

    def _emit(self, key: str, last: bool = False) -> Iterator[Pair | Unreadable]:
        """The record of a key if its members are complete; the last time, whatever they are."""
        sample = self.pending.get(key)
        if sample is None or not (last or sample.is_whole() or self._row(sample)):
            return
        try:
            found: Pair | Unreadable = self._pair(key, sample)
        except BadRecord as bad:
            if bad.reason == NO_CAPTION and not last:
                return  # a caption file may still come
            found = Unreadable(self._id(key), bad.reason)
        self._forget(key)
        self.done.add(key)
        if isinstance(found, Unreadable) or self.wanted(found.group):
            yield found

    def _make_room(self) -> Iterator[Unreadable]:
        while self.pending_bytes > PENDING_BYTES:
            key = next(iter(self.pending))
            self.given_up.add(key)
            yield Unreadable(self._id(key), MISSING_IMAGE if self.pending[key].image is None else NO_CAPTION)
            self._forget(key)

    def _forget(self, key: str) -> None:
        self.pending_bytes -= self.pending.pop(key).bytes

    def _row(self, sample: Sample) -> dict[str, Any]:
        name = sample.image_name.removeprefix("./")
        return self.rows.get(name) or self.rows.get(name.rpartition("/")[2]) or {}

    def _pair(self, key: str, sample: Sample) -> Pair:
        if sample.problem:
            raise BadRecord(sample.problem)
        if sample.image is None:
            raise BadRecord(MISSING_IMAGE)
        row = (parse_object(sample.metadata) if sample.metadata is not None else {}) | self._row(sample)
        captions = join_captions(self.origin.captions(row), sample.texts.values())
        pair = self.origin.pair(f"{self.shard}/{clean(key)}", row, captions, self.split)
        return replace(pair, image=sample.image)


def _key(name: str) -> tuple[str, str]:
    """Path up to the first dot of its last part, and what follows in lower case; nothing of a hidden file or folder."""
    name = name.removeprefix("./")
    folder, _, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    if not stem or any(part.startswith(".") and part != ".." for part in name.split("/")):
        return "", ""
    return f"{folder}/{stem}" if folder else stem, extension.lower()
