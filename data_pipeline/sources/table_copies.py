"""Local copies of tables that cannot be read in place: compressed ones, and those in which the rows of an image are not consecutive.

A copy is made once for each version of a table on each machine, in a folder of the system's temporary folder. SQLite sorts the rows on disk, in bounded memory.
To find out whether rows are consecutive takes eight bytes of memory a row.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import sqlite3
import tempfile
from array import array
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from data_pipeline.sources.csv_rows import BOM, Header
from data_pipeline.sources.gzipped import unzipped
from infra import storage
from infra.files import write_errors

if TYPE_CHECKING:
    from data_pipeline.sources.table import Table

_VERSION = 3  # version of the sorted copies: raise it to have every table sorted again
_CACHE_KIB = 64 << 10  # SQLite's page cache


def ordered(table: Table, version: str) -> tuple[str, bool]:
    """Path of a plain copy of the table in which the rows of each image are consecutive, empty if the table itself is like that; and whether further rows of
    an image bring ids of their own.

    Args:
        table: the original table.
        version: version of its content.

    Raises:
        DataError: it cannot be read, or its columns of images and captions are unknown.
        NoRoomError: there is no room for the copy.
    """
    config = table.origin.config
    key = hashlib.blake2b(
        repr((_VERSION, table.url, version, config.image, config.captions)).encode("utf-8", "backslashreplace"), digest_size=16
    ).hexdigest()
    copy, fine, joining = folder() / key, folder() / f"{key}.ordered", folder() / f"{key}.joins"  # the last one is written first
    if fine.exists():
        return "", joining.exists()
    if copy.exists() and (_layout_of(copy).exists() or not table.has_columns):
        return str(copy), joining.exists()
    plain = _unzip(table, copy.with_suffix(f".{secrets.token_hex(4)}.plain")) if table.is_zipped else None
    try:
        looked_at = type(table)(table.origin, table.name, str(plain)) if plain else table
        together, joins = _look(looked_at)
        if joins:
            joining.touch()
        if together and plain is None:
            fine.touch()
            return "", joins
        if table.has_columns:
            _keep_layout(looked_at, _layout_of(copy))
        if together and plain is not None:
            plain.replace(copy)
        else:
            _sort(looked_at, copy)
        return str(copy), joins
    finally:
        if plain is not None:
            plain.unlink(missing_ok=True)


def layout(copy: str) -> tuple[Header, str]:
    """The columns and the delimiter of the table of which ``ordered`` has made a copy."""
    found = json.loads(_layout_of(Path(copy)).read_text())
    return Header(tuple(found["columns"]), found["image"], tuple(found["captions"]), found["start"]), found["delimiter"]


def _layout_of(copy: Path) -> Path:
    return copy.with_name(f"{copy.name}.columns")


def _keep_layout(table: Table, place: Path) -> None:
    header, unfinished = table.header, place.with_suffix(f".{secrets.token_hex(4)}.part")
    facts = {"columns": header.columns, "image": header.image, "captions": header.captions, "start": header.start, "delimiter": table.delimiter}
    with write_errors(place):
        unfinished.write_text(json.dumps(facts))
        unfinished.replace(place)


@cache
def folder() -> Path:
    """The folder of copies, to which nobody else can write."""
    place = Path(tempfile.gettempdir(), f"tables-{os.getuid()}")
    with write_errors(place):
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = place.lstat()
    if found.st_uid != os.getuid() or found.st_mode & 0o022 or place.is_symlink():  # somebody else has made a folder of that name
        return Path(tempfile.mkdtemp(prefix="tables-"))
    return place


def _unzip(table: Table, place: Path) -> Path:
    with storage.open_stream(table.url) as stream, unzipped(stream, table.url) as plain, write_errors(place), place.open("wb") as out:
        shutil.copyfileobj(plain, out, 1 << 20)
    return place


def _look(table: Table) -> tuple[bool, bool]:
    """Whether the rows of each image stand together; and whether several are about one image and rows bring ids."""
    seen, previous = array("Q"), ""
    with_ids = several = False
    for record, image in table.rows():
        if not image:
            continue  # an unreadable row does not separate the rows of an image
        with_ids = with_ids or table.has_id(record)
        several = several or image == previous
        if image != previous:
            seen.append(int.from_bytes(hashlib.blake2b(image.encode("utf-8", "backslashreplace"), digest_size=8).digest(), "little"))
        previous = image
    hashes = np.frombuffer(seen, np.uint64) if seen else np.empty(0, np.uint64)
    hashes = np.sort(hashes)
    together = not bool((hashes[1:] == hashes[:-1]).any())
    return together, with_ids and (several or not together)


def _sort(table: Table, copy: Path) -> None:
    """Write the rows sorted by image, those of one image in their original order."""
    words = secrets.token_hex(4)
    database, unfinished = copy.with_suffix(f".{words}.sqlite"), copy.with_suffix(f".{words}.part")
    try:
        with write_errors(copy), _full_disk(), closing(sqlite3.connect(database, isolation_level=None)) as connection:
            for pragma in ("journal_mode = OFF", "synchronous = OFF", "temp_store = FILE", f"cache_size = -{_CACHE_KIB}"):
                connection.execute(f"PRAGMA {pragma}")
            connection.execute("CREATE TABLE rows (image BLOB, number INTEGER PRIMARY KEY, data BLOB)")
            connection.execute("BEGIN")
            connection.executemany("INSERT INTO rows (image, data) VALUES (?, ?)", _raw(table))
            connection.execute("COMMIT")
            with unfinished.open("wb") as out:
                out.write(_head(table))
                for (data,) in connection.execute("SELECT data FROM rows ORDER BY image, number"):
                    out.write(data)
        unfinished.replace(copy)
    finally:
        database.unlink(missing_ok=True)
        unfinished.unlink(missing_ok=True)


@contextmanager
def _full_disk() -> Iterator[None]:
    """Turn SQLite's OperationalError into an OSError of a full disk: in a new folder that we own, it can have no other cause."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise OSError(errno.ENOSPC, f"SQLite: {error}") from error


def _head(table: Table) -> bytes:
    end = table.header.start if table.has_columns else 0
    return storage.read_range(table.url, 0, end) if end else b""


def _raw(table: Table) -> Iterator[tuple[bytes, bytes]]:
    """The image and the bytes of each row. An unreadable row is replaced by a short row that is unreadable, too, whatever follows it in the sorted file."""
    broken = b'"."."\n' if table.is_csv else b"." + b"\t" * len(table.header.columns) + b"\n" if table.has_columns else b"{\n"
    with storage.open_stream(table.url) as stream:
        at = 0
        for record, image in table.rows():
            if record.problem:
                if not table.has_columns or record.start >= table.header.start:  # else it stands above the header, and in the copy as well
                    yield b"", broken
                continue
            _skip(stream, record.start - at)
            data = stream.read(record.end - record.start)
            data, at = data.removeprefix(BOM) if record.start == 0 else data, record.end
            yield image.encode("utf-8", "backslashreplace"), data if data.endswith(b"\n") else data + b"\n"


def _skip(stream: BinaryIO, size: int) -> None:
    while size > 0:
        size -= len(stream.read(min(size, 1 << 20))) or size
