"""A strict reader of CSV rows: if a quote is opened and not properly closed, only that line is lost, and reading resumes at the next line."""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from data_pipeline.sources.rows_to_pairs import BAD_ROW, IMAGE_SUFFIXES, LARGE_TEXT
from data_pipeline.sources.tar_metadata import lines_of

BOM = b"\xef\xbb\xbf"

Cells = tuple[int, int, list[str], str]
"""One row: its first byte, the byte after its last, its cells, and what is wrong with it ('' if nothing is)."""


@dataclass(frozen=True)
class Shape:
    """The shape of this file's rows, which tells a caption of several lines from rows that a stray quote has swallowed."""

    columns: int = 0
    """Number of cells of a row; 0: not known yet."""
    image: int = -1
    """Position of the cell that names the image."""


@dataclass(frozen=True)
class Header:
    """The columns of a CSV or TSV file, those of images and captions among them, and the byte where its first record starts."""

    columns: tuple[str, ...]
    image: str
    captions: tuple[str, ...]
    start: int


class _TooLong(Exception):
    """A row has more bytes than the limit."""


def csv_rows(stream: BinaryIO, at: int, limit: int, delimiter: str = ",", shape: Shape | None = None) -> Iterator[Cells]:
    """Each row that is not blank. The stream is positioned at byte ``at``, where a row starts."""
    shape = shape or Shape()
    source = lines_of(stream, at, limit)
    waiting: deque[tuple[int, bytes | None, int]] = deque()

    def line() -> tuple[int, bytes | None, int] | None:
        if waiting:
            return waiting.popleft()
        found = next(source, None)
        return None if found is None else (*found[:2], found[0] + len(found[1] or b""))

    while (first := line()) is not None:
        start, data, end = first
        if data is None:
            yield start, end, [], LARGE_TEXT
            continue
        taken: list[tuple[int, bytes | None, int]] = []

        def texts(data: bytes = data, start: int = start, taken: list[tuple[int, bytes | None, int]] = taken) -> Iterator[str]:
            yield as_text(data, start)
            size = len(data)
            while (further := line()) is not None:
                taken.append(further)
                size += len(further[1] or b"")
                if further[1] is None or size > limit:
                    raise _TooLong
                yield as_text(further[1], further[0])

        try:
            cells = next(csv.reader(texts(), delimiter=delimiter, strict=True), [])
            problem = (
                BAD_ROW
                if taken and _swallowed(cells, [as_text(data, start), *(as_text(more[1] or b"", 1) for more in taken)], delimiter, shape)
                else ""
            )
        except (csv.Error, _TooLong):  # a stray quote, or a cell that exceeds csv's limit
            cells, problem = [], BAD_ROW
        if problem:
            waiting.extendleft(reversed(taken))
            yield start, end, [], problem
        elif any(map(str.strip, cells)):
            yield start, taken[-1][2] if taken else end, cells, ""


def _swallowed(cells: list[str], lines: list[str], delimiter: str, shape: Shape) -> bool:
    """Whether a row of several lines comes from a stray quote: it has too few or too many cells, or one of its lines is a row by itself."""
    if not shape.columns:
        return False
    return len(cells) != shape.columns or any(_is_row(line, delimiter, shape) for line in lines[1:])


def _is_row(line: str, delimiter: str, shape: Shape) -> bool:
    try:
        cells = next(csv.reader([line], delimiter=delimiter), [])
    except csv.Error:
        return False
    if len(cells) != shape.columns or not 0 <= shape.image < len(cells):
        return False
    # The last line of a caption may be followed by the cell of its image; in a row by itself, the image comes before any quote.
    quoted = next((number for number, cell in enumerate(cells) if '"' in cell), len(cells))
    return shape.image < quoted and cells[shape.image].strip().lower().endswith(IMAGE_SUFFIXES)


def as_text(line: bytes, start: int) -> str:
    """A line of a table, which may begin with a byte order mark."""
    return (line.removeprefix(BOM) if start == 0 else line).decode("utf-8", errors="replace")
