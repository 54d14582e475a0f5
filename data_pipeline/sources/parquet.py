"""Parquet files with embedded images or with paths. Row groups are read in small batches, and only the columns that matter. The home of pyarrow."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pyarrow
import pyarrow.parquet

from data_pipeline.config import SourceConfig
from data_pipeline.sources.pairs import InputShard, Pair, Unreadable
from data_pipeline.sources.rows_to_pairs import (
    BAD_TEXT,
    FETCHES,
    LARGE_IMAGE,
    MAX_IMAGE_BYTES,
    MISSING_IMAGE,
    BadRecord,
    Draft,
    Origin,
    distinct,
    find_captions,
    find_image,
    split_of_name,
    text_in,
    with_images,
)
from infra import storage
from infra.errors import DataError, UnreachableError
from infra.storage import FileInfo

BATCH_ROWS = 32
"""Rows with embedded images that are in memory at once."""
BATCH_ROWS_WITHOUT_IMAGES = 1024
READ_BYTES = 1 << 20
"""Bytes of a column that are read at once from a local file."""
REMOTE_READ_BYTES = 8 << 20
"""The same from S3: each is a request."""
_ABOUT = ("id", "uid", "key", "group", "sha256", "md5", "url", "source", "license", "licence", "LICENSE", "split")

Row = dict[str, Any]


@dataclass(frozen=True)
class Columns:
    """What is read of a file."""

    image: str
    """Bytes, a path, or a struct of both (bytes, path), as Hugging Face's datasets writes it."""
    is_struct: bool
    is_path: bool
    captions: tuple[str, ...]
    about: tuple[str, ...]
    """Further columns, read as what a record says about itself."""


class ParquetSource:
    """The .parquet files of a folder, or those that a pattern names. A range of row groups is a shard."""

    def __init__(self, config: SourceConfig, records_per_part: int) -> None:
        self.name = config.url
        self.origin = Origin(config)
        self.records = records_per_part

    def shards(self) -> Iterator[InputShard]:
        """Ranges of row groups of about the aimed-at number of records; only the ends of the files are read. A file that is broken is one shard.

        Raises:
            DataError: there is no Parquet file.
        """
        base, infos = storage.glob(self.name)
        files = sorted((info for info in infos if info.name.lower().endswith(".parquet")), key=lambda info: info.name)
        if not files:
            raise DataError(
                f"{self.name}: no .parquet file there; data.sources accepts a folder of them, one of them, or a pattern such as data/*.parquet."
            )
        with ThreadPoolExecutor(FETCHES if storage.is_remote(base) else 1) as pool:
            for info, spans in zip(files, pool.map(self._spans, files), strict=True):
                for span in spans:
                    yield InputShard(f"{info.name}@{span[0]}", info.version, span=span)

    def read(self, shard: InputShard, wanted: Callable[[str], bool]) -> Iterator[Pair | Unreadable]:
        """The rows of some row groups. Row groups without a wanted record are passed over without reading their images.

        Raises:
            DataError: not a Parquet file, damaged, or without columns of images and captions.
        """
        return with_images(self._drafts(shard, wanted))

    def credits(self) -> dict[str, str]:
        return self.origin.credits()

    def version(self) -> str:
        return self.origin.version(f"parquet/1 pyarrow {pyarrow.__version__}")

    def _spans(self, info: FileInfo) -> list[tuple[int, int]]:
        try:
            with _open(self.origin.url(info.name)) as file:
                rows = [file.metadata.row_group(number).num_rows for number in range(file.metadata.num_row_groups)]
        except UnreachableError:
            raise  # its shards are not known, and guessed ones would be others than those of the next start
        except DataError:
            return [(0, 0)]  # its reader says what is wrong, and the others go on
        spans, first, count = [], 0, 0
        for number, size in enumerate(rows):
            if count and count + size > self.records:
                spans.append((first, number))
                first, count = number, 0
            count += size
        return [*spans, (first, len(rows))] if count else spans

    def _drafts(self, shard: InputShard, wanted: Callable[[str], bool]) -> Iterator[Draft | Pair | Unreadable]:
        name = shard.name.rpartition("@")[0]
        url = self.origin.url(name)
        with _open(url) as file:
            columns = self._columns(file.schema_arrow, url)
            sizes = [file.metadata.row_group(number).num_rows for number in range(file.metadata.num_row_groups)]
            if shard.span[1] > len(sizes):
                raise DataError(f"{url}: has {len(sizes)} row groups, {shard.span[1]} when it was listed; run again.")
            reader = _Rows(self.origin, name, columns, wanted)
            for group in range(*shard.span):
                first = sum(sizes[:group])
                bad = []
                for found in reader.found(file, group, first, with_image=columns.is_path):
                    if not isinstance(found, Unreadable):
                        yield from reader.found(file, group, first, with_image=True)
                        break
                    bad.append(found)
                else:
                    yield from bad

    def _columns(self, schema: Any, url: str) -> Columns:
        config, names = self.origin.config, list(schema.names)
        image, captions = find_image(names, config), find_captions(names, config)
        kind = schema.field(image).type if image else None
        if kind is None or not captions or ({"status", "url", "key"} <= set(names) and image == "url"):
            hint = "; it describes the tars or folders beside it: name those" if {"status", "url", "key"} <= set(names) else ""
            raise DataError(
                f"{url}: none of its columns, {', '.join(names)}, is known to hold {'captions' if image and not captions else 'images'}{hint}; "
                "columns are named in data.sources as image and captions."
            )
        is_struct = pyarrow.types.is_struct(kind) and {field.name for field in kind} >= {"bytes"}
        value = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        is_path = pyarrow.types.is_string(value) or pyarrow.types.is_large_string(value)
        is_bytes = pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)
        if not (is_struct or is_path or is_bytes):
            raise DataError(f"{url}: column '{image}' is of type {kind}; accepted are bytes, strings (paths) and structs of bytes and path.")
        return Columns(image, is_struct, is_path, captions, tuple(name for name in _ABOUT if name in names and name != image))


class _Rows:
    """The records of row groups."""

    def __init__(self, origin: Origin, name: str, columns: Columns, wanted: Callable[[str], bool]) -> None:
        self.origin, self.name, self.columns, self.wanted = origin, name, columns, wanted
        self.split = split_of_name(name)
        self.folder = origin.url(name).rpartition("/")[0]

    def found(self, file: Any, group: int, first: int, *, with_image: bool) -> Iterator[Draft | Pair | Unreadable]:
        """Wanted records of one row group, whose first row is number ``first`` of the file; without images for a look at their groups."""
        columns = self.columns
        image = [columns.image] if with_image or columns.is_path else [f"{columns.image}.path"] if columns.is_struct else []
        names = list(dict.fromkeys([*columns.captions, *columns.about, *image]))
        rows = BATCH_ROWS if with_image and not columns.is_path else BATCH_ROWS_WITHOUT_IMAGES
        for batch in file.iter_batches(rows, row_groups=[group], columns=names, use_threads=False):
            for number, row in enumerate(_rows(batch), first):
                place = f"{self.name}/@{number}"
                try:
                    record = self._record(place, row, with_image)
                except BadRecord as bad:
                    yield Unreadable(self.origin.url(place), bad.reason)
                    continue
                if self.wanted((record.pair if isinstance(record, Draft) else record).group):
                    yield record
            first += batch.num_rows

    def _record(self, place: str, row: Row | None, with_image: bool) -> Draft | Pair:
        if row is None:
            raise BadRecord(BAD_TEXT)
        value, columns = row.get(self.columns.image), self.columns
        data = value if isinstance(value, bytes) else value.get("bytes") if isinstance(value, dict) else None
        path = value if isinstance(value, str) else value.get("path") if isinstance(value, dict) else None
        if with_image and data is None and not path:
            raise BadRecord(MISSING_IMAGE)
        key = text_in(row, "key")
        place = f"{self.name}/{key}" if key else place
        captions = distinct(self.origin.captions({name: row[name] for name in columns.captions}))
        pair = self.origin.pair(place, row, captions, self.split, f"image/{path}" if path and columns.is_path else "")
        if not with_image:
            return pair
        if data is None:
            return Draft(pair, self.origin.image_url(str(path), self.folder))
        if len(data) > MAX_IMAGE_BYTES:
            raise BadRecord(LARGE_IMAGE)
        return replace(pair, image=data)


def _rows(batch: Any) -> Iterator[Row | None]:
    """The rows of a batch; None for one whose strings are not UTF-8."""
    try:
        yield from batch.to_pylist()
        return
    except UnicodeDecodeError:
        pass  # raised before the first row is out
    for number in range(batch.num_rows):
        try:
            yield batch.slice(number, 1).to_pylist()[0]
        except UnicodeDecodeError:
            yield None


@contextmanager
def _open(url: str) -> Iterator[Any]:
    """A Parquet file, whose columns are read piece by piece.

    Raises:
        DataError: it is missing, not a Parquet file, or damaged (while it is read, too).
    """
    buffer = REMOTE_READ_BYTES if storage.is_remote(url) else READ_BYTES
    with storage.open_seekable(url) as stream:
        try:
            with pyarrow.parquet.ParquetFile(stream, buffer_size=buffer, pre_buffer=False) as file:
                yield file
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{url}: not a Parquet file, or damaged ({(str(error).splitlines() or [''])[0]}).") from error
