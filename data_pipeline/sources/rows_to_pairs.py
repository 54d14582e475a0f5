"""Shared by the readers of folders, tables, Parquet files and tars: parts of the conversion from a row of named values to a Pair, and reading images by path."""

from __future__ import annotations

import errno
import json
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from data_pipeline.sources.pairs import Pair, Unreadable
from infra import storage, text
from infra.errors import DataError, MissingError

T = TypeVar("T")
R = TypeVar("R")

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff")
MAX_IMAGE_BYTES = 128 << 20
"""Larger image files are not read."""
MAX_TEXT_BYTES = 16 << 20
"""Larger caption files, metadata and lines of tables are not read."""
FETCHES = 16
"""How many remote images are fetched at once."""

MISSING_IMAGE = "missing image"
NO_CAPTION = "no caption"
BAD_JSON = "bad json"
BAD_ROW = "bad row"
BAD_TEXT = "not UTF-8"
WEB_ADDRESS = "image is a web address"
BAD_PATH = "bad image path"
UNOPENED_IMAGE = "image cannot be opened"
LARGE_IMAGE = "image file too large"
LARGE_TEXT = "text too long"
REPEATED_NAME = "json key twice"
NESTED_CAPTIONS = "captions in nested lists"
BAD_VALUE = "value that cannot be read"
PASSWORD = "image address with a password"
REPEATED_KEY = "repeated key"
NO_ID = "no image id"
REPEATED_ID = "image id twice"
ODD_CAPTION = "caption that is no text"
SECOND_IMAGE = "further image of a key"
DISAGREE = "rows of one image disagree"
MANY_CAPTIONS = "too many captions of one image"
OUTSIDE = "outside the source"
REASONS = (
    *(MISSING_IMAGE, NO_CAPTION, BAD_JSON, BAD_ROW, BAD_TEXT, WEB_ADDRESS, BAD_PATH),
    *(UNOPENED_IMAGE, LARGE_IMAGE, LARGE_TEXT, REPEATED_KEY, MANY_CAPTIONS, OUTSIDE),
    *(REPEATED_NAME, NESTED_CAPTIONS, BAD_VALUE, PASSWORD),
    *(NO_ID, REPEATED_ID, ODD_CAPTION, SECOND_IMAGE, DISAGREE),
)

_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(
        ("val", "valid", "validation", "dev", "test", "testing"), "validation"
    ),  # a test split must never be trained on, so it counts as validation
}
_LOST_FOR_GOOD = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EACCES, errno.ELOOP, errno.EINVAL)


class BadRecord(Exception):
    """A record cannot be read. ``reason`` is one of REASONS; ``why`` names the setting that would make it readable, if there is one."""

    def __init__(self, reason: str, why: str = "") -> None:
        super().__init__(reason)
        self.reason, self.why = reason, why


def clean(text: str) -> str:
    """Strip white space, and replace lone surrogates, which JSON can express but UTF-8 cannot."""
    text = text.strip()
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def caption_lines(data: bytes) -> list[str]:
    """The captions of a .txt file, one a line. Bytes that are not UTF-8 are replaced."""
    return text.lines(data.decode("utf-8-sig", errors="replace"))


def distinct(captions: Iterable[str]) -> tuple[str, ...]:
    """The distinct cleaned captions in order, without empty ones.

    Raises:
        BadRecord: none is left.
    """
    found = tuple(dict.fromkeys(filter(None, map(clean, captions))))
    if not found:
        raise BadRecord(NO_CAPTION)
    return found


def parse_object(data: bytes | str) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        BadRecord: it is not a JSON object, is nested too deeply, or holds a key twice.
    """
    try:
        found = json.loads(data, object_pairs_hook=_distinct_keys)
    except (ValueError, RecursionError):
        raise BadRecord(BAD_JSON) from None
    if not isinstance(found, dict):
        raise BadRecord(BAD_JSON)
    return found


def _distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object's pairs; of a key that comes twice, Python's parser would keep the second value and lose the first."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise BadRecord(REPEATED_NAME)
    return found


def text_in(row: Mapping[str, Any], *names: str) -> str:
    """The first of the named values that is an integer or a string that is not empty, as text; else empty."""
    for name in names:
        value = row.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if isinstance(value, str) and (cleaned := clean(value)):
            return cleaned
    return ""


def agreed(rows: Sequence[Mapping[str, Any]], split: str) -> dict[str, Any]:
    """What the rows of one image say about it together: the first row, with what only later ones say of its group, licence and split.

    Args:
        rows: at least one.
        split: ``SourceConfig.split``; where it decides, what rows say of their split does not count.

    Raises:
        BadRecord: they contradict each other.
    """
    found = dict(rows[0])
    for names in (("group",), ("license", "licence", "LICENSE"), *(() if split else (("split",),))):
        said: dict[str, str] = {}
        for value in (text_in(row, *names) for row in rows):
            said.setdefault(split_word(value) if names == ("split",) else value.strip("?"), value)
        said.pop("", None)
        if len(said) > 1:
            raise BadRecord(DISAGREE, f"{names[0]}: {', '.join(said)}")
        found.update((names[0], value) for value in said.values())
    return found


def split_word(word: str) -> str:
    """The split that a word such as 'val' or 'training' stands for; else empty."""
    return _SPLITS.get(word.lower(), "")


def split_of_name(name: str) -> str:
    """The split according to a file's path, as in 'train-00000.tar' or 'val2017/00000.tar', but not in 'trains.csv' or 'val-thorens/a.tar'; else empty."""
    folder, _, last = name.lower().rpartition("/")
    words = [re.split(r"[-_.\d]", last, maxsplit=1)[0], *(part.rstrip("0123456789") for part in reversed(folder.split("/")))]
    return next((_SPLITS[word] for word in words if word in _SPLITS), "")


@dataclass(frozen=True)
class Draft:
    """A pair whose image has not been read yet, and the URL of the image."""

    pair: Pair
    url: str


def read_limited(url: str, limit: int, missing: str, large: str) -> bytes:
    """Read a small file whole.

    Raises:
        BadRecord: it is missing (reason ``missing``), larger than ``limit`` (reason ``large``), or can never be opened.
        DataError: it cannot be read for a reason that may pass.
    """
    try:
        with storage.open_stream(url) as stream:
            data = stream.read(limit + 1)
    except MissingError:
        raise BadRecord(missing) from None
    except DataError as error:
        if storage.is_remote(url) or not never_opens(error):
            raise
        raise BadRecord(UNOPENED_IMAGE) from None
    if len(data) > limit:
        raise BadRecord(large)
    return data


def never_opens(error: DataError) -> bool:
    """Whether a local file will not be opened the next time either: a link to itself, one without permission, a pipe."""
    cause = error.__cause__
    return not isinstance(cause, OSError) or cause.errno in _LOST_FOR_GOOD


def in_order(function: Callable[[T], R], items: Iterable[T], is_remote: Callable[[T], bool]) -> Iterator[R]:
    """``function`` of each item, in order. For remote items several calls run in parallel, ahead of the consumer."""
    waiting: deque[tuple[T, Future[R] | None]] = deque()
    pool = ThreadPoolExecutor(FETCHES)  # starts its threads only when there is work
    try:
        for item in items:
            waiting.append((item, pool.submit(function, item) if is_remote(item) else None))
            while waiting and (len(waiting) > 2 * FETCHES or waiting[0][1] is None):
                first, future = waiting.popleft()
                yield function(first) if future is None else future.result()
        for first, future in waiting:
            yield function(first) if future is None else future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def with_images(drafts: Iterable[Draft | Pair | Unreadable]) -> Iterator[Pair | Unreadable]:
    """Read the images of drafts, in order. A record whose image cannot be read becomes Unreadable.

    Raises:
        DataError: an image cannot be read for a reason that may pass.
    """

    def read(draft: Draft | Pair | Unreadable) -> Pair | Unreadable:
        if not isinstance(draft, Draft):
            return draft
        try:
            return replace(draft.pair, image=read_limited(draft.url, MAX_IMAGE_BYTES, MISSING_IMAGE, LARGE_IMAGE))
        except BadRecord as bad:
            return Unreadable(draft.pair.id, bad.reason, bad.why)

    return in_order(read, drafts, lambda draft: isinstance(draft, Draft) and storage.is_remote(draft.url))


def named_by(drafts: Iterable[Draft | Pair | Unreadable]) -> Iterator[str]:
    """The URLs of the images that are still to be read."""
    return (draft.url for draft in drafts if isinstance(draft, Draft))


def join_captions(said: list[str], texts: Iterable[bytes]) -> tuple[str, ...]:
    """The captions in metadata, followed by those in caption files. A caption file whose whole content repeats a caption of the metadata adds none.

    Raises:
        BadRecord: there is no caption.
    """
    known = {clean(caption) for caption in said}
    lines = []
    for data in texts:
        if clean(data.decode("utf-8-sig", errors="replace")) not in known:
            lines += caption_lines(data)
    return distinct([*said, *lines])
