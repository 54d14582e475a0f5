"""Metadata beside tars: ``metadata*.jsonl`` files, whose lines describe images by ``shard`` (name of a tar) and ``file_name`` (name of a member).

Each file is read once to find out where the lines about each tar are; after that only these lines are read. The lines of one tar are held in memory.
"""

from __future__ import annotations

import hashlib
import logging
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, BinaryIO

import numpy as np

from data_pipeline.sources.origin import Origin
from data_pipeline.sources.rows_to_pairs import MAX_TEXT_BYTES, BadRecord, never_opens, parse_object, text_in
from infra import globs, storage
from infra.digests import id_hash
from infra.errors import DataError, UnreachableError

log = logging.getLogger(__name__)

PATTERN = "metadata*.jsonl"
IDS = ("id", "uid")
"""Keys of a line's own id."""
_LINE = re.compile(rb"\r{64,65536}(?!\n)|[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")
"""A line with its end. Many empty lines in a row are one, which is as empty: a file may hold millions of them."""


@dataclass
class Place:
    """Where the lines about one tar are."""

    ranges: list[tuple[str, int, int]] = field(default_factory=list)
    """(URL of a file, first byte, byte after the last); ranges of consecutive lines are merged."""
    lines: int = 0
    joins: bool = False
    """Whether several lines are about one image, and lines bring ids."""
    digest: Any = field(default_factory=lambda: hashlib.blake2b(digest_size=8))
    """Digest of these lines, so that a tar's version changes with the lines about it and not with those about other tars."""


def lines_of(stream: BinaryIO, start: int = 0, limit: int = MAX_TEXT_BYTES) -> Iterator[tuple[int, bytes | None]]:
    r"""(first byte, line) for each line of a stream that is positioned at ``start``; the line is None if it is longer than ``limit``. Lines end at ``\n``,
    ``\r\n`` and ``\r``."""
    held, length = b"", 0
    for piece in _pieces(stream, limit):
        length += len(piece)
        held = held + piece if length <= limit else b""
        if piece.endswith((b"\n", b"\r")):
            yield start, held if length <= limit else None
            start, held, length = start + length, b"", 0
    if length:
        yield start, held if length < limit else None


def _pieces(stream: BinaryIO, limit: int) -> Iterator[bytes]:
    """Lines with their ends; of longer lines, pieces of at most about ``limit`` bytes."""
    further = b""
    while data := further + stream.readline(limit - len(further)):
        further = b""
        if data.endswith(b"\r") and (further := stream.read(1)) == b"\n":  # the second half of the line's end
            data, further = data + further, b""
        if data.find(b"\r", 0, -2 if data.endswith(b"\r\n") else -1) < 0:
            yield data
        else:
            yield from (match[0] for match in _LINE.finditer(data))


def is_one(name: str) -> bool:
    """Whether a file is such a metadata file, judged by its name."""
    return fnmatchcase(name.rpartition("/")[2], PATTERN)


def find(folder: str, origin: Origin) -> dict[str, Place]:
    """Name of a tar -> where its metadata are, from the metadata files directly in a folder. Lines without ``shard`` and ``file_name`` are ignored."""
    found: dict[str, Place] = {}
    images: dict[str, array[int]] = {}  # the images of each tar's lines, hashed
    with_ids = set[str]()
    base, infos = storage.glob(storage.join(globs.escape(folder), PATTERN))
    for info in infos:
        url, lost, stack = storage.join(base, info.name), 0, ExitStack()
        try:
            origin.inside(url)
            stream = stack.enter_context(storage.open_stream(url))
        except BadRecord:
            continue  # a link that leads outside, which the origin has reported
        except UnreachableError:
            raise
        except DataError as error:
            if not never_opens(error):
                raise
            log.warning("%s What it says of images in tars is not known.", error)
            continue
        with stack:
            for start, line in lines_of(stream):
                try:
                    row = parse_object(line or b"")
                except BadRecord:
                    row = {}
                shard = text_in(row, "shard")
                if not shard or not text_in(row, "file_name"):
                    lost += 1
                    continue
                place = found.setdefault(shard, Place())
                place.digest.update(line)
                place.lines += 1
                images.setdefault(shard, array("Q")).append(id_hash(_image_of(row)))
                if text_in(row, *IDS):
                    with_ids.add(shard)
                end = start + len(line or b"")
                if place.ranges and place.ranges[-1][0] == url and place.ranges[-1][2] == start:
                    place.ranges[-1] = (url, place.ranges[-1][1], end)
                else:
                    place.ranges.append((url, start, end))
        if lost:
            log.warning("%s: %d lines name no shard and file_name; they describe no image of a tar.", url, lost)
    for shard in with_ids:
        found[shard].joins = len(np.unique(np.frombuffer(images[shard], np.uint64))) < len(images[shard])
    return found


def _image_of(row: dict[str, Any]) -> str:
    """The image that a line is about."""
    return text_in(row, "file_name").removeprefix("./")


def rows(place: Place) -> dict[str, list[dict[str, Any]]]:
    """Name of an image in the tar -> its lines, with a group that decides its split.

    ``source`` and ``label`` together say what is shown, whatever the style: images with the same label share a group. A ``group`` in these lines is a kind of
    picture ('photo', 'people'), which would put thousands of images into the same split, so it is dropped.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for url, start, end in place.ranges:
        with storage.open_stream(url, start) as stream:
            for at, line in lines_of(stream, start):
                if at >= end:
                    break
                row = parse_object(line or b"")  # cannot fail: ``find`` has parsed the line
                row.pop("group", None)
                if text_in(row, "label"):
                    row["group"] = f"{text_in(row, 'source')}/{text_in(row, 'label').replace(' ', '_')}"
                found.setdefault(_image_of(row), []).append(row)
    return found


class Lines:
    """The lines about one tar, given to its members: by a member's path, or by its last part where only one image of the tar has that name."""

    def __init__(self, place: Place | None, images: Callable[[], Iterator[str]]) -> None:
        """
        Args:
            place: where the lines are; None: there are none.
            images: reads the names of the tar's images; called once at most, if a member in a folder may be meant by a line that names no folder.
        """
        self._rows = rows(place) if place else {}
        self._images, self._used = images, set[str]()

    @cached_property
    def _last_parts(self) -> Counter[str]:
        return Counter(name.rpartition("/")[2] for name in self._images())

    def of(self, member: str) -> list[dict[str, Any]]:
        """The lines about an image."""
        name = member.removeprefix("./")
        last = name.rpartition("/")[2]
        if name not in self._rows and last in self._rows and self._last_parts[last] == 1:
            name = last
        if name in self._rows:
            self._used.add(name)
        return self._rows.get(name, [])

    def left(self) -> int:
        """How many lines name none of the members that were asked for."""
        return sum(len(lines) for name, lines in self._rows.items() if name not in self._used)
