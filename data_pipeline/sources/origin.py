"""What all records of a source have in common: the folder of their names, the places that their paths may lead to, and defaults for what a record does not
say."""

from __future__ import annotations

import logging
import os
import posixpath
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property, lru_cache
from typing import Any

from data_pipeline.config import SourceConfig
from data_pipeline.sources.columns import caption_values, find_captions
from data_pipeline.sources.pairs import UNKNOWN, Census, Pair
from data_pipeline.sources.rows_to_pairs import BAD_PATH, MISSING_IMAGE, OUTSIDE, PASSWORD, WEB_ADDRESS, BadRecord, clean, split_word, text_in
from infra import globs, shown, storage
from infra.errors import DataError
from infra.storage import FileInfo

log = logging.getLogger(__name__)

_MAX_KEY_BYTES = 1024  # S3's limit on the length of an object's name
_MAX_NAME = 64  # longest name of a source or licence; they are counted and listed, so longer texts are not taken as names
_FOLDERS = 4096  # how many folders' real paths are cached


class Origin:
    """What all records of one entry of ``data.sources`` have in common."""

    def __init__(self, config: SourceConfig) -> None:
        self.config = config
        self._said: set[str] = set()
        self.columns: dict[tuple[str, str, tuple[str, ...]], None] = {}
        """What this process has used as images and captions: 'column', 'key' or 'member', the one of the image, and those of the captions."""
        self._real = lru_cache(_FOLDERS)(os.path.realpath)

    @cached_property
    def base(self) -> str:
        """The folder to which names are relative."""
        return storage.glob(self.config.url)[0]

    @cached_property
    def roots(self) -> tuple[str, ...]:
        """Where files may be: real paths and normalised remote prefixes of the base, of the source's URL, and of its ``roots``."""
        named = () if globs.is_pattern(self.config.url) else (self.config.url,)
        return tuple(dict.fromkeys(self.real(url) for url in (self.base, *named, *self.config.roots)))

    def files(self, census: Census) -> Iterator[FileInfo]:
        """The files that the source names, in a stable order; ``census`` counts folders that are not entered."""
        for info in storage.glob(self.config.url, self.links)[1]:
            if info.version in globs.NOT_FILES:
                census.pass_over(info.name, info.version)
            else:
                yield info

    @property
    def links(self) -> tuple[str, ...]:
        """The local ones of ``roots``, to which links to folders may lead."""
        return tuple(root for root in self.roots if not storage.is_remote(root))

    def took(self, what: str, image: str, captions: Iterable[str]) -> None:
        """Note where images and captions were found; ``--dry-run`` reports it."""
        self.columns[what, image, tuple(captions)] = None

    def url(self, name: str) -> str:
        return storage.join(self.base, name)

    def real(self, url: str) -> str:
        """A URL with links and '..' resolved."""
        if storage.is_remote(url):
            scheme, _, place = url.partition("://")
            return f"{scheme}://{posixpath.normpath(place)}"
        folder, name = os.path.split(storage.local_path(url))
        path = os.path.join(self._real(folder), name)
        return os.path.realpath(path) if name in ("", ".", "..") or os.path.islink(path) else path

    def inside(self, url: str) -> str:
        """The URL unchanged, if it may be read.

        Raises:
            BadRecord: it lies, or leads by a link, outside the source and its ``roots``.
        """
        found = self.real(url)
        if globs.is_below(found, self.roots):
            return url
        allowed = f"roots = [{_quoted(found.rpartition('/')[0] or '/')}]"
        why = f"{self.config.url}: {_quoted(found)} lies outside of the source; to read it, add {allowed} to the source in data.sources"
        self._say("outside", why)
        raise BadRecord(OUTSIDE, f"add {allowed} to the source in data.sources to read it")

    def part(self, name: str) -> str:
        """The URL of one of the source's own files.

        Raises:
            DataError: it is a link that leads outside the source.
        """
        try:
            return self.inside(self.url(name))
        except BadRecord as bad:
            raise DataError(f"{self.url(name)}: a link that leads outside of the source; {bad.why}.") from None

    def id(self, place: str) -> str:
        """The id of a record without an id of its own: the source's name, if it has one, and the record's place relative to the source. It does not change when
        the source is moved."""
        place = encodable(place)
        return f"{self.config.name}:{place}" if self.config.name else place

    def pair(self, place: str, row: Mapping[str, Any], captions: tuple[str, ...], split: str, group: str = "") -> Pair:
        """A pair without its image.

        Args:
            place: where the record is, as file/entry relative to the base; its id and group, unless the row has better ones.
            row: what the record says about itself: id, group, sha256, md5, url, source, license, split.
            captions: from distinct().
            split: the split according to the file's name, for records that name none.
            group: the group of records that name none.
        """
        place = encodable(place)
        own = text_in(row, "id", "uid")
        # An id that is a number is unique within its file at best.
        local = f"{place.rpartition('/')[0]}/{own}".lstrip("/") if own.isdigit() else place
        source = text_in(row, "source")
        license = text_in(row, "license", "licence", "LICENSE").strip("?")
        given = text_in(row, "group")
        said = "" if self.config.split == "hash" else self.config.split or split_word(text_in(row, "split")) or split
        return Pair(
            id=own if own and not own.isdigit() else self.id(local),
            captions=captions,
            image=b"",
            source=source if source and len(source) <= _MAX_NAME and "://" not in source else self.config.url,
            license=license[:_MAX_NAME] or self.config.license or UNKNOWN,
            group=given or text_in(row, "sha256", "md5", "url") or group or ("" if own.isdigit() else own) or place,
            split=said,
            given=bool(given),
        )

    def captions(self, row: Mapping[str, Any]) -> list[str]:
        """The captions in the caption columns of a row."""
        return [caption for name in find_captions(row, self.config) for caption in caption_values(row[name])]

    def image_url(self, path: str, folder: str) -> str:
        """The URL of an image that a row names, relative to ``folder`` unless it is absolute.

        Raises:
            BadRecord: it is a web address (a hint is logged once), holds a password, is not a valid path, or outside the source.
        """
        path = clean(path)
        scheme, separator, _ = path.partition("://")
        if separator and scheme.lower() in ("http", "https", "ftp"):
            self._say(
                "web",
                f"{self.config.url}: images are addresses on the web, which are not fetched; run img2dataset on it, and name its output folder.",
            )
            raise BadRecord(WEB_ADDRESS)
        if not path:
            raise BadRecord(MISSING_IMAGE)
        if shown.holds_password(path):
            raise BadRecord(PASSWORD)
        if (separator and scheme not in ("s3", "file")) or len(path.encode()) > _MAX_KEY_BYTES or any(character < " " for character in path):
            raise BadRecord(BAD_PATH)
        url = path if separator or path.startswith("/") else storage.join(folder, path)
        try:
            found = self.inside(url)
        except ValueError:  # not a valid path for the operating system, or (ConfigError) no valid URL
            raise BadRecord(BAD_PATH) from None
        return self.real(found) if storage.is_remote(found) else found

    def credits(self) -> dict[str, str]:
        """See Source."""
        terms = f"licence {self.config.license}" if self.config.license else "the licence of each record is what it says itself, else not recorded"
        return {self.config.url: f"Images and captions from {self.config.url}; {terms}."}

    def version(self, reader: str) -> str:
        """See Source. Contains the whole entry except the weight, which changes no record, and the URL, which may change."""
        return f"{reader} {self.config.model_dump_json(exclude={'weight', 'url'} | self.config.at_default())}"

    def _say(self, key: str, message: str) -> None:
        if key not in self._said:
            self._said.add(key)
            log.warning("%s", message)


def encodable(name: str) -> str:
    """A name as text that can be written: names of local files may contain any bytes."""
    return name if name.isascii() else name.encode("utf-8", "backslashreplace").decode()


def _quoted(text: str) -> str:
    shown = text if len(text) <= 300 else f"{text[:300]}..."
    return '"' + shown.encode("unicode_escape").decode().replace('"', '\\"') + '"'
