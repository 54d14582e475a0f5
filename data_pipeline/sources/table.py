"""Tables of image paths and captions: .jsonl, .csv and .tsv files. An input shard is a byte range of a file, cut so that no record is divided.

Consecutive rows that name the same image are captions of that image: five such rows become one pair. A range begins with the first run of such rows that
starts after its lower bound, so every range can be read without the one before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, BinaryIO

from data_pipeline.config import SourceConfig
from data_pipeline.sources import table_copies
from data_pipeline.sources.columns import ABOUT, CAPTION_NAMES, IMAGE_NAMES, caption_values, find_captions, find_image, refuse_repeated
from data_pipeline.sources.csv_rows import BOM, Cells, Header, Shape, as_text, csv_rows
from data_pipeline.sources.origin import Origin
from data_pipeline.sources.pairs import Census, Found, InputShard, Unreadable
from data_pipeline.sources.rows_to_pairs import (
    BAD_ROW,
    IMAGE_SUFFIXES,
    LARGE_TEXT,
    MANY_CAPTIONS,
    MAX_TEXT_BYTES,
    BadRecord,
    Draft,
    agreed,
    clean,
    distinct,
    named_by,
    parse_object,
    split_of_name,
    text_in,
    with_images,
)
from data_pipeline.sources.tar_metadata import lines_of
from infra import storage
from infra.errors import DataError, UnchangingError, UnreachableError

PLAIN = (".jsonl", ".ndjson", ".csv", ".tsv")
SUFFIXES = (*PLAIN, *(f"{suffix}.gz" for suffix in PLAIN))
NAMES = ("captions.txt",)
"""Tables that are recognised by their whole name: Flickr8k's, which is a CSV file."""
FOLDERS = ("", "images", "Images", "image", "imgs", "img", "pictures", "photos", "flickr30k_images", "flickr30k-images", "Flicker8k_Dataset")
"""Folders beside a table in which its images may be. The first one that holds an image of one of the first rows is used for all rows."""
BYTES_PER_RECORD = 256
"""Assumed size of a row, by which ranges get about the desired number of records."""
IDS = ("id", "uid", "key")
"""Columns of a row's own id."""
MAX_RUN = 64
"""Most consecutive rows of one image; further ones are counted as unreadable."""

Row = dict[str, Any]
_DELIMITERS = ",;|\t"
_SHOWN = 40  # most cells of a row, and most characters of a cell, in a message
_LOOKED_AT = 4  # how many rows' images are searched for in FOLDERS


@dataclass(frozen=True)
class Record:
    """One row: its byte range, and its values by column, or why it cannot be read."""

    start: int
    end: int
    row: Row
    problem: str = ""


class TableSource:
    """The tables of a folder, or those that match a pattern. Paths of images are relative to their table, absolute, or remote URLs."""

    def __init__(self, config: SourceConfig, records_per_part: int) -> None:
        self.name = config.url
        self.origin = Origin(config)
        self.step = records_per_part * BYTES_PER_RECORD
        self.census = Census()

    def shards(self) -> Iterator[InputShard]:
        """Byte ranges. Each table is read once, to find out whether the rows of each image are consecutive (``table_copies``), and, in CSV files, where records
        begin, because quoted cells may contain newlines.

        Raises:
            DataError: there is no table.
        """
        self.census = census = Census()
        tables = []
        for info in self.origin.files(census):
            if is_table(info.name):
                tables.append(info)
                census.read += 1
            elif info.name.lower().endswith(IMAGE_SUFFIXES):
                census.pictures += 1
            else:
                census.pass_over(info.name)
        if not tables:
            raise DataError(f"{self.name}: no {', '.join(PLAIN)} file there; data.sources accepts a folder of them, one of them, or a pattern.")
        for info in sorted(tables, key=lambda info: info.name):
            splits = frozenset({split_of_name(info.name)})
            try:
                table = self.table(info.name, info.version)
            except UnreachableError:
                raise
            except DataError:  # reading this shard will report the error, and other tables are not affected
                yield InputShard(f"{info.name}@0", info.version, span=(0, info.size))
                continue
            size = storage.size(table.url) if table.is_copy else info.size
            bounds = table.boundaries(self.step) if table.is_csv and size > self.step else list(range(0, size, self.step))
            for start, end in zip(bounds, [*bounds[1:], size], strict=False):
                name = f"{info.name}@{start}"
                about = (name, info.version, (), (start, end), splits, (info.name,), str(info.size), end - start)
                yield InputShard(*about, names_images=True, joins=table.joins)

    def read(self, shard: InputShard, wanted: Callable[[str], bool]) -> Iterator[Found]:
        """The runs of rows that begin in a byte range; a run is one record.

        Raises:
            DataError: its columns of images and captions cannot be told, or a file cannot be read for a reason that may pass.
        """
        return with_images(self._drafts(shard, wanted))

    def images(self, shard: InputShard, wanted: Callable[[str], bool]) -> Iterator[str]:
        """As of Source."""
        return named_by(self._drafts(shard, wanted))

    def _drafts(self, shard: InputShard, wanted: Callable[[str], bool]) -> Iterator[Draft | Unreadable]:
        table = self.table(shard.name.rpartition("@")[0], shard.version)
        if table.has_columns and table.header.columns:
            self.origin.took("column", table.header.image, table.header.captions)
        return (found for found in table.drafts(*shard.span) if isinstance(found, Unreadable) or wanted(found.pair.group))

    def table(self, name: str, version: str) -> Table:
        """A table, or its sorted copy if the rows of an image are not consecutive.

        Raises:
            DataError: it leads outside the source, cannot be read, or its columns of images and captions are unknown.
        """
        table = Table(self.origin, name)
        path, joins = table_copies.ordered(table, version)
        if not path:
            table.joins = joins
            return table
        copy = Table(self.origin, name, path)
        copy.joins = joins
        if copy.has_columns:
            copy.lay_out(*table_copies.layout(path))
        return copy

    def credits(self) -> dict[str, str]:
        return self.origin.credits()

    def url(self, name: str) -> str:
        return self.origin.part(name)

    def version(self) -> str:
        return self.origin.version("table/4")


def is_table(name: str) -> bool:
    """Whether a file is a table, judged by its name."""
    return name.lower().endswith(SUFFIXES) or name.rpartition("/")[2] in NAMES


class Table:
    """One table, or its copy on this machine."""

    def __init__(self, origin: Origin, name: str, copy: str = "") -> None:
        self.origin, self.name = origin, name
        self.is_copy = bool(copy)
        self.joins = False
        """Whether rows that follow another one of their image bring ids of their own."""
        self.url = copy or origin.part(name)
        self.shown = origin.url(name)
        """What messages call it."""
        plain = name.lower().removesuffix(".gz")
        self.is_csv = plain.endswith((".csv", ".txt"))
        self.has_columns = self.is_csv or plain.endswith(".tsv")
        self._shape: Shape | None = None

    def lay_out(self, header: Header, delimiter: str) -> None:
        """Take the columns that the original has: a copy has its rows in another order, and its first one may look like something else."""
        self.header, self.delimiter = header, delimiter
        self._shape = Shape(len(header.columns), header.columns.index(header.image)) if header.image else None

    @property
    def is_zipped(self) -> bool:
        return not self.is_copy and self.name.lower().endswith(".gz")

    @cached_property
    def delimiter(self) -> str:
        """The delimiter of a CSV file: a comma, unless the first row has known column names when it is split at another delimiter."""
        with storage.open_stream(self.url) as stream:
            first = next(lines_of(stream, 0, MAX_TEXT_BYTES), (0, b""))[1] or b""
        text = as_text(first, 0)
        for delimiter in _DELIMITERS:
            cells = [clean(cell).strip('"') for cell in text.split(delimiter)]
            if find_image(cells, self.origin.config) and find_captions(cells, self.origin.config):
                return delimiter
        return ","

    @cached_property
    def folder(self) -> str:
        """The folder to which the paths of images are relative: that of the table, or one of FOLDERS in it."""
        own = self.origin.url(self.name).rpartition("/")[0]
        paths = []
        for record in self._records(0):
            if path := self._image(record):
                paths.append(path)
            if len(paths) == _LOOKED_AT:
                break
        for folder in (storage.join(own, name) for name in FOLDERS):
            for path in paths:
                try:
                    if storage.exists(self.origin.image_url(path, folder)):
                        return folder
                except (BadRecord, OSError):
                    continue
        return own

    @cached_property
    def header(self) -> Header:
        """The first row that can be read, if it contains usual or configured names of columns. Otherwise columns are numbered, and the first row must show which of them holds
        images.

        Raises:
            DataError: the columns of images and captions cannot be recognised in either way.
        """
        config = self.origin.config
        with storage.open_stream(self.url) as stream:
            rows = ((end, cells) for _, end, cells, problem in self._cells(stream, 0) if not problem)
            start, first = next(rows, (0, []))
            _, second = next(rows, (0, []))
        if not first:
            return Header((), "", (), 0)  # an empty table
        cells = tuple(clean(cell) for cell in first)
        image, captions = find_image(cells, config), find_captions(cells, config)
        if image and captions:
            refuse_repeated(self.shown, cells, (image, *captions, *ABOUT))
            self._shape = Shape(len(cells), cells.index(image))
            return Header(cells, image, captions, start)
        numbers = tuple(map(str, range(len(cells))))
        paths = [number for number, cell in zip(numbers, cells, strict=True) if cell.lower().endswith(IMAGE_SUFFIXES) or "://" in cell]
        image = config.image if config.image in numbers else paths[0] if len(paths) == 1 and not config.image else ""
        others = tuple(number for number in numbers if number != image)
        captions = find_captions(numbers, config) or (others if len(others) == 1 and not config.captions else ())
        if not image or not captions:
            raise UnchangingError(
                f"{self.shown}: its first row, {_shown(cells)}, names no column of {'captions' if image else 'images'} that is known; its second row: "
                f"{_shown(second)}. Name both in data.sources as image and captions, columns of a header, or numbers from 0 without one: "
                f'data.sources=[{{url="{self.origin.config.url}", image="{_nth(cells, 0)}", captions=["{_nth(cells, 1)}"]}}]. Usual names are found: '
                f"{', '.join(IMAGE_NAMES[:4])} ..., {', '.join(CAPTION_NAMES)} ... (docs/data.md)."
            )
        self._shape = Shape(len(numbers), int(image))
        return Header(numbers, image, captions, 0)

    def boundaries(self, step: int) -> list[int]:
        """The starts of records at which ranges begin: the first at or after each multiple of ``step``. This reads the whole file."""
        found = [0]
        with suppress(DataError):  # an unknown header is reported when the shard is read
            _ = self.header
        with storage.open_stream(self.url) as stream:
            for start, _, _, _ in self._cells(stream, 0):
                if start >= (found[-1] // step + 1) * step:
                    found.append(start)
        return found

    def drafts(self, start: int, end: int) -> Iterator[Draft | Unreadable]:
        """The runs of rows that belong to a byte range.

        The run that contains the first row of a range belongs to the range before it (except in the first range), because it may have begun there. So a range
        ends with the run of the next range's first row.
        """
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
                yield Unreadable(self.origin.id(self._place(record)), MANY_CAPTIONS)
        if run:
            yield self._draft(run)

    def _records(self, at: int) -> Iterator[Record]:
        """The records from the first one that starts at byte ``at`` or later. In CSV files a record must start at ``at``."""
        back = 1 if at and not self.is_csv else 0
        if self.has_columns:
            _ = self.header  # sets self._shape, by which rows that a stray quote has swallowed are recognised
        with storage.open_stream(self.url, at - back) as stream:
            if not self.has_columns:
                found = self._objects(stream, at - back)
            else:
                found = (self._named(*cells) for cells in self._cells(stream, at - back) if cells[0] >= self.header.start or cells[3])
            if back:
                found = (record for record in found if record.start >= at)
            yield from found

    def _objects(self, stream: BinaryIO, at: int) -> Iterator[Record]:
        for start, line in lines_of(stream, at, MAX_TEXT_BYTES):
            try:
                if line is None:
                    raise BadRecord(LARGE_TEXT)
                if line.strip(b" \t\r\n\xef\xbb\xbf"):
                    yield Record(start, start + len(line), parse_object(line.removeprefix(BOM) if start == 0 else line))
            except BadRecord as bad:
                yield Record(start, start, {}, bad.reason)

    def rows(self) -> Iterator[tuple[Record, str]]:
        """All records, each with the image that it names ('' if it names none)."""
        return ((record, self._image(record)) for record in self._records(0))

    def _named(self, start: int, end: int, cells: list[str], problem: str) -> Record:
        if not problem and len(cells) != len(self.header.columns):
            problem = BAD_ROW
        return Record(start, end, {} if problem else dict(zip(self.header.columns, cells, strict=True)), problem)

    def _cells(self, stream: BinaryIO, at: int) -> Iterator[Cells]:
        """(start, end, cells, problem) of each row that is not blank."""
        if self.is_csv:
            yield from csv_rows(stream, at, MAX_TEXT_BYTES, self.delimiter, self._shape)
            return
        for start, line in lines_of(stream, at, MAX_TEXT_BYTES):
            text = as_text(line or b"", start).rstrip("\r\n")
            if line is None or text.strip():
                yield start, start + len(line or b""), [_unquoted(cell) for cell in text.split("\t")], "" if line is not None else LARGE_TEXT

    def _image(self, record: Record) -> str:
        name = self.header.image if self.has_columns else find_image(record.row, self.origin.config)
        return text_in(record.row, name)

    def has_id(self, record: Record) -> bool:
        """Whether a row brings an id of its own."""
        return bool(text_in(record.row, *IDS))

    def _place(self, record: Record) -> str:
        return f"{self.name}/{text_in(record.row, 'key') or f'@{record.start}'}"

    def _draft(self, run: list[Record]) -> Draft | Unreadable:
        first, place = run[0], self._place(run[0])
        try:
            if first.problem:
                raise BadRecord(first.problem)
            path = self._image(first)
            url = self.origin.image_url(path, self.folder)
            captions = distinct(caption for record in run for caption in self._captions(record.row))
            row = agreed([record.row for record in run], self.origin.config.split)
        except BadRecord as bad:
            return Unreadable(self.origin.id(place), bad.reason, bad.why)
        if not self.has_columns:
            self.origin.took("key", find_image(first.row, self.origin.config), find_captions(first.row, self.origin.config))
        pair = self.origin.pair(place, row, captions, split_of_name(self.name), f"image/{path}")
        others = [record for record in run[1:] if self.has_id(record)]
        return Draft(replace(pair, also=tuple(self.origin.pair(self._place(other), other.row, (), "").id for other in others)), url)

    def _captions(self, row: Row) -> list[str]:
        if not self.has_columns:
            return self.origin.captions(row)
        return [caption for name in self.header.captions for caption in caption_values(row[name])]


def _shown(cells: list[str] | tuple[str, ...]) -> str:
    words = [cell if len(cell) <= _SHOWN else f"{cell[:_SHOWN]}..." for cell in cells[:_SHOWN]]
    return ", ".join(words).encode("unicode_escape").decode() or "(none)"


def _nth(cells: tuple[str, ...], number: int) -> str:
    return cells[number][:_SHOWN] if number < len(cells) else str(number)


def _unquoted(cell: str) -> str:
    """A cell of a TSV file without quotes. TSV usually has none, but a cell that is quoted as in CSV is unquoted."""
    inner = cell[1:-1].replace('""', "")
    return cell[1:-1].replace('""', '"') if len(cell) > 1 and cell[0] == cell[-1] == '"' and '"' not in inner else cell
