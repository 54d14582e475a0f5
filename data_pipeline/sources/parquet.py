"""Parquet files with embedded images or with paths of images. Row groups are read in small batches, and only the needed columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pyarrow
import pyarrow.parquet

from data_pipeline.config import SourceConfig
from data_pipeline.sources.arrow_rows import Columns, Rows, columns_of
from data_pipeline.sources.origin import Origin
from data_pipeline.sources.pairs import Census, Found, InputShard, Pair, Unreadable
from data_pipeline.sources.parquet_pages import GuardedFile, WideError
from data_pipeline.sources.rows_to_pairs import FETCHES, IMAGE_SUFFIXES, Draft, named_by, split_of_name, with_images
from infra import storage
from infra.errors import DataError, UnreachableError
from infra.storage import FileInfo

SUFFIXES = (".parquet",)
BATCH_ROWS = 32
"""How many rows with embedded images are in memory at once."""
BATCH_ROWS_WITHOUT_IMAGES = 512
_AT_ONCE = 1 << 30
"""Bytes of a column's values that may be in memory at once, as far as its pages show. Where each row may have that many, rows are read one by one."""
READ_BYTES = 1 << 20
"""How many bytes of a column are read at once from a local file."""
REMOTE_READ_BYTES = 8 << 20
"""The same for a remote file, where each read is a request."""


class ParquetSource:
    """The .parquet files of a folder, or those that match a pattern. An input shard is a range of row groups."""

    def __init__(self, config: SourceConfig, records_per_part: int) -> None:
        self.name = config.url
        self.origin = Origin(config)
        self.records = records_per_part
        self.census = Census()

    def shards(self) -> Iterator[InputShard]:
        """Ranges of row groups with about the desired number of records. Only the ends of the files are read; a damaged file is one shard.

        Raises:
            DataError: there is no Parquet file.
        """
        self.census = census = Census()
        files, may_name = [], False
        for info in self.origin.files(census):
            if info.name.lower().endswith(SUFFIXES):
                files.append(info)
                census.read += 1
            elif info.name.lower().endswith(IMAGE_SUFFIXES):
                census.pictures += 1
            else:
                census.pass_over(info.name)
        if not files:
            raise DataError(
                f"{self.name}: no .parquet file there; data.sources accepts a folder of them, one of them, or a pattern such as data/*.parquet."
            )
        files.sort(key=lambda info: info.name)
        with ThreadPoolExecutor(FETCHES if storage.is_remote(self.origin.base) else 1) as pool:
            for info, (spans, may, does) in zip(files, pool.map(self._spans, files), strict=True):
                may_name = may_name or may
                splits = frozenset({split_of_name(info.name)})
                for span in spans:
                    read = info.size * (span[1] - span[0]) // max(1, spans[-1][1])
                    name = f"{info.name}@{span[0]}"
                    yield InputShard(name, info.version, (), span, splits, (info.name,), str(info.size), read, does)
        if census.pictures and not may_name:  # every image is embedded, so no row refers to the image files beside the tables
            census.pictures = 0
            for info in self.origin.files(Census()):
                if info.name.lower().endswith(IMAGE_SUFFIXES):
                    census.pass_over(info.name)

    def read(self, shard: InputShard, wanted: Callable[[str], bool]) -> Iterator[Found]:
        """The rows of some row groups. The images of row groups without a wanted record are not read.

        Raises:
            DataError: it is not a Parquet file, is damaged, or has no columns of images and captions.
        """
        return with_images(self._drafts(shard, wanted))

    def images(self, shard: InputShard, wanted: Callable[[str], bool]) -> Iterator[str]:
        """As of Source."""
        return named_by(self._drafts(shard, wanted))

    def credits(self) -> dict[str, str]:
        return self.origin.credits()

    def url(self, name: str) -> str:
        return self.origin.part(name)

    def version(self) -> str:
        return self.origin.version(f"parquet/3 pyarrow {pyarrow.__version__}")

    def _spans(self, info: FileInfo) -> tuple[list[tuple[int, int]], bool, bool]:
        """Ranges of row groups, whether rows may name files, and whether they do."""
        may, does = True, False  # the file cannot be read, so assume that its rows may name image files
        try:
            url = self.origin.part(info.name)
            with _open(url) as (file, _):
                columns = columns_of(self.origin, file.schema_arrow, url)
                may, does = columns.names_files, columns.is_path or (columns.is_struct and not _all_embedded(file.metadata, columns.image))
                rows = [file.metadata.row_group(number).num_rows for number in range(file.metadata.num_row_groups)]
        except UnreachableError:
            raise  # its shards are not known, and guessed ones would be others than those of the next start
        except DataError:
            return [(0, 0)], may, False  # its reader says what is wrong, and the others go on
        spans, first, count = [], 0, 0
        for number, size in enumerate(rows):
            if count and count + size > self.records:
                spans.append((first, number))
                first, count = number, 0
            count += size
        return ([*spans, (first, len(rows))] if count else spans), may, does

    def _drafts(self, shard: InputShard, wanted: Callable[[str], bool]) -> Iterator[Draft | Pair | Unreadable]:
        name = shard.name.rpartition("@")[0]
        url = self.origin.part(name)
        with _open(url) as (file, guard):
            columns = columns_of(self.origin, file.schema_arrow, url)
            sizes = [file.metadata.row_group(number).num_rows for number in range(file.metadata.num_row_groups)]
            if shard.span[1] > len(sizes):
                raise DataError(f"{url}: has {len(sizes)} row groups, {shard.span[1]} when it was listed; run again.")
            reader, lists = Rows(self.origin, name, columns, wanted), _lists(file, columns)
            # Values of lists stay in their dictionary: of the rows that name a long one a million times, none is copied.
            file = pyarrow.parquet.ParquetFile(guard, metadata=file.metadata, read_dictionary=lists, **_options(url)) if lists else file
            for group in range(*shard.span):
                first, bad = sum(sizes[:group]), []
                for found in reader.found(_batches(file, guard, group, columns, lists, columns.is_path), first, with_image=columns.is_path):
                    if not isinstance(found, Unreadable):
                        yield from reader.found(_batches(file, guard, group, columns, lists, True), first, with_image=True)
                        break
                    bad.append(found)
                else:
                    yield from bad


def _all_embedded(metadata: Any, image: str) -> bool:
    """Whether every struct of a column holds the bytes of its image, as the file's own statistics say; where it has none, some may not."""
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        for column in map(row_group.column, range(row_group.num_columns)):
            if column.path_in_schema == f"{image}.bytes" and _may_be_empty(column.statistics):
                return False
    return True


def _may_be_empty(statistics: Any) -> bool:
    return statistics is None or statistics.null_count != 0 or (statistics.has_min_max and not statistics.min)


def _lists(file: Any, columns: Columns) -> list[str]:
    """The paths of those columns of captions that lie in lists."""
    found = map(file.schema.column, range(len(file.schema)))
    roots = tuple(f"{name}." for name in columns.captions)
    return [column.path for column in found if column.max_repetition_level and column.path.startswith(roots)]


def _options(url: str) -> dict[str, Any]:
    return {"buffer_size": REMOTE_READ_BYTES if storage.is_remote(url) else READ_BYTES, "pre_buffer": False}


def _batches(file: Any, guard: GuardedFile, group: int, columns: Columns, lists: list[str], with_image: bool) -> Iterator[Any]:
    """One row group, batch by batch; without images when only the groups of its records are needed."""
    rows, done = BATCH_ROWS if with_image and not columns.is_path else BATCH_ROWS_WITHOUT_IMAGES, 0
    while True:
        guard.watch(file.metadata.row_group(group), _AT_ONCE // rows if rows > 1 else 0, lists)
        at = 0
        try:
            for batch in file.iter_batches(rows, row_groups=[group], columns=columns.read(with_image), use_threads=False):
                if at + batch.num_rows > done:
                    yield batch.slice(max(0, done - at))
                at += batch.num_rows
                done = max(done, at)
            return
        except WideError as wide:
            rows = max(1, _AT_ONCE // wide.longest)  # fewer than before


@contextmanager
def _open(url: str) -> Iterator[tuple[Any, GuardedFile]]:
    """A Parquet file, whose columns are read piece by piece, and what checks the pages that are read.

    Raises:
        DataError: it is missing, not a Parquet file, or damaged; may also be raised while it is read.
    """
    with storage.open_seekable(url) as stream:
        try:
            guard = GuardedFile(stream, url)
            with pyarrow.parquet.ParquetFile(guard, **_options(url)) as file:
                yield file, guard
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{url}: not a Parquet file, or damaged ({(str(error).splitlines() or [''])[0]}).") from error
