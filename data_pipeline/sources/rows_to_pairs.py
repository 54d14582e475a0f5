"""What the readers of folders, tables, Parquet and tars share: from a row of named values to a Pair, and images by path."""

from __future__ import annotations

import errno
import json
import logging
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

from data_pipeline.config import SourceConfig
from data_pipeline.sources.pairs import Pair, Unreadable
from infra import storage
from infra.errors import DataError, MissingError

T = TypeVar("T")
R = TypeVar("R")

log = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
MAX_IMAGE_BYTES = 128 << 20
"""Larger image files are not read."""
MAX_TEXT_BYTES = 16 << 20
"""Larger caption files, metadata and lines of tables are not read."""
FETCHES = 16
"""Images on S3 that are fetched at once."""

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
REPEATED_KEY = "repeated key"
MANY_CAPTIONS = "too many captions of one image"
REASONS = (
    *(MISSING_IMAGE, NO_CAPTION, BAD_JSON, BAD_ROW, BAD_TEXT, WEB_ADDRESS, BAD_PATH),
    *(UNOPENED_IMAGE, LARGE_IMAGE, LARGE_TEXT, REPEATED_KEY, MANY_CAPTIONS),
)

_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "test", "testing"), "validation"),  # never trained on
}
_CAPTION_NAMES = tuple(
    re.compile(rf"{name}(_?\d+)?", re.IGNORECASE) for name in ("captions?", "texts?|txt", "alt_?text|sentences?", "description|prompt")
)
_IMAGE_NAMES = (
    *("image", "img", "jpg", "jpeg", "png", "webp", "image_path", "img_path", "image_file", "file_name", "filename"),
    *("file", "filepath", "file_path", "path", "image_url", "url"),
)
_LOST_FOR_GOOD = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EACCES, errno.ELOOP, errno.EINVAL)
_MAX_KEY_BYTES = 1024  # of an object's name on S3
_MAX_NAME = 64  # of a source's name and a licence, which are counted and listed


class BadRecord(Exception):
    """One record cannot be read; ``reason`` is one of REASONS."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def clean(text: str) -> str:
    """Without spaces around it, and without lone surrogates, which JSON may spell and UTF-8 cannot."""
    text = text.strip()
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def caption_lines(data: bytes) -> list[str]:
    """The captions of a .txt file, one a line. Bytes that are not UTF-8 are replaced."""
    return data.decode("utf-8-sig", errors="replace").splitlines()


def caption_values(value: Any) -> list[str]:
    """The captions in a cell: a string, a list of strings, or a list written as JSON. Anything else holds none."""
    if isinstance(value, str):
        if value.startswith("[") and value.endswith("]"):
            try:
                listed = json.loads(value)
            except (ValueError, RecursionError):
                return [value]
            return caption_values(listed) or [value]
        return [value]
    return [item for item in value if isinstance(item, str)] if isinstance(value, (list, tuple)) else []


def distinct(captions: Iterable[str]) -> tuple[str, ...]:
    """Cleaned captions, each once, in order, without empty ones.

    Raises:
        BadRecord: none is left.
    """
    found = tuple(dict.fromkeys(filter(None, map(clean, captions))))
    if not found:
        raise BadRecord(NO_CAPTION)
    return found


def parse_object(data: bytes | str) -> dict[str, Any]:
    """A JSON object.

    Raises:
        BadRecord: it is something else, or nested too deeply.
    """
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        raise BadRecord(BAD_JSON) from None
    if not isinstance(found, dict):
        raise BadRecord(BAD_JSON)
    return found


def text_in(row: Mapping[str, Any], *names: str) -> str:
    """The first of the named values that is a string or an integer and not empty."""
    for name in names:
        value = row.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if isinstance(value, str) and (cleaned := clean(value)):
            return cleaned
    return ""


def split_of_name(name: str) -> str:
    """The split that a file's path names: 'train-00000.tar', 'val2017/00000.tar', but not 'trains.csv' or 'val-thorens/a.tar'; else empty."""
    folder, _, last = name.lower().rpartition("/")
    words = [re.split(r"[-_.\d]", last, maxsplit=1)[0], *(part.rstrip("0123456789") for part in reversed(folder.split("/")))]
    return next((_SPLITS[word] for word in words if word in _SPLITS), "")


def find_image(names: Iterable[str], config: SourceConfig) -> str:
    """The column of images: the one that is configured, else the first of the usual names; empty if there is none."""
    listed = list(names)
    if config.image:
        return config.image if config.image in listed else ""
    lower = {name.lower(): name for name in reversed(listed)}
    return next((lower[name] for name in _IMAGE_NAMES if name in lower), "")


def find_captions(names: Iterable[str], config: SourceConfig) -> tuple[str, ...]:
    """The columns of captions: those that are configured, else all of one usual name ('caption', or 'caption_0', 'caption_1' ...)."""
    listed = list(names)
    if config.captions:
        return tuple(name for name in config.captions if name in listed)
    for usual in _CAPTION_NAMES:
        found = tuple(name for name in listed if usual.fullmatch(name))
        if found:
            return found
    return ()


@dataclass(frozen=True)
class Draft:
    """A pair whose image is still to be read."""

    pair: Pair
    url: str


class Origin:
    """What all records of one configured source share: where its names begin, and what stands for what a record does not say."""

    def __init__(self, config: SourceConfig) -> None:
        self.config = config
        self._hinted = False

    @cached_property
    def base(self) -> str:
        """The folder to which names are relative."""
        return storage.glob(self.config.url)[0]

    def url(self, name: str) -> str:
        return storage.join(self.base, name)

    def pair(self, place: str, row: Mapping[str, Any], captions: tuple[str, ...], split: str, group: str = "") -> Pair:
        """A pair without its image.

        Args:
            place: where the record lies, as file/entry relative to the base: its id and its group unless it brings better.
            row: what it says about itself: id, group, sha256, md5, url, source, license, split.
            captions: as of distinct().
            split: what the file's name says, for records that do not say.
            group: what it is grouped by if it says nothing about that.
        """
        own = text_in(row, "id", "uid")
        # A number is unique within its file at most.
        local = f"{place.rpartition('/')[0]}/{own}".lstrip("/") if own.isdigit() else place
        source = text_in(row, "source")
        license = text_in(row, "license", "licence", "LICENSE").strip("?")
        return Pair(
            id=own if own and not own.isdigit() else self.url(local),
            captions=captions,
            image=b"",
            source=source if source and len(source) <= _MAX_NAME and "://" not in source else self.config.url,
            license=license[:_MAX_NAME] or self.config.license or "unknown",
            group=text_in(row, "group", "sha256", "md5", "url") or group or ("" if own.isdigit() else own) or place,
            split=self.config.split or _SPLITS.get(text_in(row, "split").lower(), "") or split,
        )

    def captions(self, row: Mapping[str, Any]) -> list[str]:
        """What the caption columns of a row hold."""
        return [caption for name in find_captions(row, self.config) for caption in caption_values(row[name])]

    def image_url(self, path: str, folder: str) -> str:
        """The URL of an image that a row names, relative to ``folder`` unless it is absolute.

        Raises:
            BadRecord: it is an address on the web (a hint is logged once) or no possible path.
        """
        path = clean(path)
        scheme, separator, _ = path.partition("://")
        if separator and scheme.lower() in ("http", "https", "ftp"):
            if not self._hinted:
                log.warning(
                    "%s: images are addresses on the web, which are not fetched; run img2dataset on it, and name its output folder.", self.config.url
                )
            self._hinted = True
            raise BadRecord(WEB_ADDRESS)
        if not path:
            raise BadRecord(MISSING_IMAGE)
        if (separator and scheme not in ("s3", "file")) or len(path.encode()) > _MAX_KEY_BYTES or any(character < " " for character in path):
            raise BadRecord(BAD_PATH)
        return path if separator or path.startswith("/") else storage.join(folder, path)

    def credits(self) -> dict[str, str]:
        """As of Source."""
        terms = f"licence {self.config.license}" if self.config.license else "the licence of each record is what it says itself, else not recorded"
        return {self.config.url: f"Images and captions from {self.config.url}; {terms}."}

    def version(self, reader: str) -> str:
        """As of Source: everything that is configured but the weight, which changes no record."""
        return f"{reader} {self.config.model_dump_json(exclude={'weight'})}"


def read_limited(url: str, limit: int, missing: str, large: str) -> bytes:
    """A whole small file.

    Raises:
        BadRecord: it is missing (reason ``missing``), larger than ``limit`` (reason ``large``), or may not be opened.
        DataError: it cannot be read for a reason that may pass.
    """
    try:
        with storage.open_stream(url) as stream:
            data = stream.read(limit + 1)
    except MissingError:
        raise BadRecord(missing) from None
    except DataError as error:
        cause = error.__cause__
        if storage.is_remote(url) or (isinstance(cause, OSError) and cause.errno not in _LOST_FOR_GOOD):
            raise
        raise BadRecord(UNOPENED_IMAGE) from None
    if len(data) > limit:
        raise BadRecord(large)
    return data


def in_order(function: Callable[[T], R], items: Iterable[T], is_remote: Callable[[T], bool]) -> Iterator[R]:
    """``function`` of each item, in order; several at once ahead of the consumer where the item lies on S3."""
    waiting: deque[tuple[T, Future[R] | None]] = deque()
    pool = ThreadPoolExecutor(FETCHES)  # starts threads when there is work for them
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
    """Read the images of drafts, in order; an image that cannot be read makes its record Unreadable.

    Raises:
        DataError: one cannot be read for a reason that may pass.
    """

    def read(draft: Draft | Pair | Unreadable) -> Pair | Unreadable:
        if not isinstance(draft, Draft):
            return draft
        try:
            return replace(draft.pair, image=read_limited(draft.url, MAX_IMAGE_BYTES, MISSING_IMAGE, LARGE_IMAGE))
        except BadRecord as bad:
            return Unreadable(draft.pair.id, bad.reason)

    return in_order(read, drafts, lambda draft: isinstance(draft, Draft) and storage.is_remote(draft.url))


def join_captions(said: list[str], texts: Iterable[bytes]) -> tuple[str, ...]:
    """Captions of a metadata file, then those of caption files. A file that repeats one of the former is one caption, whatever lines it has.

    Raises:
        BadRecord: there is none.
    """
    known = {clean(caption) for caption in said}
    lines = []
    for data in texts:
        if clean(data.decode("utf-8-sig", errors="replace")) not in known:
            lines += caption_lines(data)
    return distinct([*said, *lines])
