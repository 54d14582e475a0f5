"""Tables of image paths and captions: .jsonl, .csv and .tsv files. Byte ranges of a file are shards, and none holds half a record.

A record that names the same image as the one before it is a further caption of that image: the five rows of a picture are one pair. The first
such run of rows that begins after a boundary opens the next range, so every range can be read without the one before it.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, BinaryIO

from data_pipeline.config import SourceConfig
from data_pipeline.sources.pairs import InputShard, Pair, Unreadable
from data_pipeline.sources.rows_to_pairs import (
    BAD_ROW,
    IMAGE_SUFFIXES,
    LARGE_TEXT,
    MANY_CAPTIONS,
    MAX_TEXT_BYTES,
    BadRecord,
    Draft,
    Origin,
    caption_values,
    clean,
    distinct,
    find_captions,
    find_image,
    parse_object,
    split_of_name,
    text_in,
    with_images,
)
from data_pipeline.sources.tar_metadata import lines_of
from infra import storage
from infra.errors import DataError

SUFFIXES = (".jsonl", ".ndjson", ".csv", ".tsv")
BYTES_PER_RECORD = 256
"""A usual row: ranges hold about the aimed-at number of records."""
MAX_RUN = 64
"""Rows in sequence that name one image; further ones are counted as unreadable."""

Row = dict[str, Any]
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Record:
    """One row: the bytes it takes, and its values by column, or why it has none."""

    start: int
    end: int
    row: Row
    problem: str = ""


@dataclass(frozen=True)
class Header:
    """Columns of a CSV or TSV file, those of images and captions, and where its first record starts."""

    columns: tuple[str, ...]
    image: str
    captions: tuple[str, ...]
    start: int


class TableSource:
    """The tables of a folder, or those that a pattern names. Image paths are relative to their table, absolute, or s3:// URLs."""

    def __init__(self, config: SourceConfig, records_per_part: int) -> None:
        self.name = config.url
        self.origin = Origin(config)
        self.step = records_per_part * BYTES_PER_RECORD

    def shards(self) -> Iterator[InputShard]:
        """Byte ranges. Lines are found from any byte; CSV files larger than one range are read once, because a quoted cell may hold newlines.

        Raises:
            DataError: there is no table.
        """
        _, infos = storage.glob(self.name)
        tables = sorted((info for info in infos if info.name.lower().endswith(SUFFIXES)), key=lambda info: info.name)
        if not tables:
            raise DataError(f"{self.name}: no {', '.join(SUFFIXES)} file there; data.sources accepts a folder of them, one of them, or a pattern.")
        for info in tables:
            table = Table(self.origin, info.name)
            bounds = table.boundaries(self.step) if table.is_csv and info.size > self.step else list(range(0, info.size, self.step))
            for start, end in zip(bounds, [*bounds[1:], info.size], strict=False):
                yield InputShard(f"{info.name}@{start}", info.version, span=(start, end))

    def read(self, shard: InputShard, wanted: Callable[[str], bool]) -> Iterator[Pair | Unreadable]:
        """The runs of rows that begin in a byte range; a run is one record.

        Raises:
            DataError: its columns of images and captions cannot be told, or a file cannot be read for a reason that may pass.
        """
        table = Table(self.origin, shard.name.rpartition("@")[0])
        return with_images(found for found in table.drafts(*shard.span) if isinstance(found, Unreadable) or wanted(found.pair.group))

    def credits(self) -> dict[str, str]:
        return self.origin.credits()

    def version(self) -> str:
        return self.origin.version("table/1")


class Table:
    """One file."""

    def __init__(self, origin: Origin, name: str) -> None:
        self.origin, self.name = origin, name
        self.url = origin.url(name)
        self.is_csv = name.lower().endswith(".csv")
        self.has_columns = self.is_csv or name.lower().endswith(".tsv")

    @cached_property
    def header(self) -> Header:
        """The first row if it holds usual or configured names; else columns are numbers, and the first row must tell image from caption.

        Raises:
            DataError: neither.
        """
        config = self.origin.config
        with storage.open_stream(self.url) as stream:
            _, start, first, _ = next(self._cells(stream, 0), (0, 0, [], ""))
        cells = tuple(clean(cell) for cell in first)
        image, captions = find_image(cells, config), find_captions(cells, config)
        if image and captions:
            return Header(cells, image, captions, start)
        numbers = tuple(map(str, range(len(cells))))
        paths = [number for number, cell in zip(numbers, cells, strict=True) if cell.lower().endswith(IMAGE_SUFFIXES) or "://" in cell]
        image = config.image if config.image in numbers else paths[0] if len(paths) == 1 and not config.image else ""
        others = tuple(number for number in numbers if number != image)
        captions = find_captions(numbers, config) or (others if len(others) == 1 and not config.captions else ())
        if not image or not captions:
            raise DataError(
                f"{self.url}: its first row, {', '.join(cells)}, names no column of {'captions' if image else 'images'}; name both in "
                "data.sources as image and captions: columns of a header, or numbers from 0 without one."
            )
        return Header(numbers, image, captions, 0)

    def boundaries(self, step: int) -> list[int]:
        """Starts of records, the first at or after each multiple of ``step``; the whole file is read for it."""
        found = [0]
        with storage.open_stream(self.url) as stream:
            for start, _, _, _ in self._cells(stream, 0):
                if start >= (found[-1] // step + 1) * step:
                    found.append(start)
        return found

    def drafts(self, start: int, end: int) -> Iterator[Draft | Unreadable]:
        """The runs of rows that belong to a byte range: those that begin after the run of its first row, up to the run of the next range's
        first row, which is included. The first range has its first run too."""
        number, past, previous, run = -1, False, "", list[Record]()
        for record in self._records(start):
            image = self._image(record)
            if number < 0 or not image or image != previous:
                if past:
                    break
                if run:
                    yield self._draft(run)
                number, previous, run = number + 1, image, []
            past = past or record.start >= end
            if number == 0 and start > 0:
                continue
            if len(run) < MAX_RUN:
                run.append(record)
            else:
                yield Unreadable(self.origin.url(self._place(record)), MANY_CAPTIONS)
        if run:
            yield self._draft(run)

    def _records(self, at: int) -> Iterator[Record]:
        """Records from the first that starts at byte ``at`` or later; of CSV files, ``at`` is a start."""
        back = 1 if at and not self.is_csv else 0
        with storage.open_stream(self.url, at - back) as stream:
            if not self.has_columns:
                found = self._objects(stream, at - back)
            else:
                found = (self._named(*cells) for cells in self._cells(stream, at - back) if cells[0] >= self.header.start)
            if back:
                found = (record for record in found if record.start >= at)
            yield from found

    def _objects(self, stream: BinaryIO, at: int) -> Iterator[Record]:
        for start, line in lines_of(stream, at, MAX_TEXT_BYTES):
            try:
                if line is None:
                    raise BadRecord(LARGE_TEXT)
                if line.strip(b" \t\r\n\xef\xbb\xbf"):
                    yield Record(start, start + len(line), parse_object(line.removeprefix(_BOM) if start == 0 else line))
            except BadRecord as bad:
                yield Record(start, start, {}, bad.reason)

    def _named(self, start: int, end: int, cells: list[str], problem: str) -> Record:
        if not problem and len(cells) != len(self.header.columns):
            problem = BAD_ROW
        return Record(start, end, {} if problem else dict(zip(self.header.columns, cells, strict=True)), problem)

    def _cells(self, stream: BinaryIO, at: int) -> Iterator[tuple[int, int, list[str], str]]:
        """(start, end, cells, problem) of each row that is not blank."""
        if self.is_csv:
            yield from _csv_rows(stream, at)
            return
        for start, line in lines_of(stream, at, MAX_TEXT_BYTES):
            text = _text(line or b"", start).rstrip("\r\n")
            if line is None or text.strip():
                yield start, start + len(line or b""), [_unquoted(cell) for cell in text.split("\t")], "" if line is not None else LARGE_TEXT

    def _image(self, record: Record) -> str:
        name = self.header.image if self.has_columns else find_image(record.row, self.origin.config)
        return text_in(record.row, name)

    def _place(self, record: Record) -> str:
        return f"{self.name}/{text_in(record.row, 'key') or f'@{record.start}'}"

    def _draft(self, run: list[Record]) -> Draft | Unreadable:
        first, folder, place = run[0], self.url.rpartition("/")[0], self._place(run[0])
        try:
            if first.problem:
                raise BadRecord(first.problem)
            path = self._image(first)
            url = self.origin.image_url(path, folder)
            captions = distinct(caption for record in run for caption in self._captions(record.row))
        except BadRecord as bad:
            return Unreadable(self.origin.url(place), bad.reason)
        return Draft(self.origin.pair(place, first.row, captions, split_of_name(self.name), f"image/{path}"), url)

    def _captions(self, row: Row) -> list[str]:
        if not self.has_columns:
            return self.origin.captions(row)
        return [caption for name in self.header.captions for caption in caption_values(row[name])]


def _csv_rows(stream: BinaryIO, at: int) -> Iterator[tuple[int, int, list[str], str]]:
    """Rows as Python's csv reads them. It takes lines as it needs them, so a row ends where the last line it took ends."""
    end, too_long = at, False

    def lines() -> Iterator[str]:
        nonlocal end, too_long
        while line := stream.readline(MAX_TEXT_BYTES):
            text = _text(line, end)
            end, too_long = end + len(line), too_long or len(line) == MAX_TEXT_BYTES
            yield text

    rows = csv.reader(lines())
    while True:
        start, too_long = end, False
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error:  # a cell above csv's limit, or a lone carriage return; it starts afresh with the next line
            yield start, end, [], BAD_ROW
            continue
        if any(map(str.strip, cells)):
            yield start, end, cells, LARGE_TEXT if too_long else ""


def _text(line: bytes, start: int) -> str:
    return (line.removeprefix(_BOM) if start == 0 else line).decode("utf-8", errors="replace")


def _unquoted(cell: str) -> str:
    """TSV files have no quotes by custom; a cell that is quoted as in CSV is taken as such."""
    inner = cell[1:-1].replace('""', "")
    return cell[1:-1].replace('""', '"') if len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inner else cell
