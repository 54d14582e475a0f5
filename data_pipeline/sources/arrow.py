"""Arrow files in a folder written by ``save_to_disk`` of Hugging Face's datasets. Each file is an input shard; its batches are read one by one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pyarrow
import pyarrow.ipc

from data_pipeline.config import SourceConfig
from data_pipeline.sources import foreign_json
from data_pipeline.sources.arrow_bounds import check_bounds
from data_pipeline.sources.arrow_messages import check_messages
from data_pipeline.sources.arrow_rows import Rows, columns_of
from data_pipeline.sources.origin import Origin
from data_pipeline.sources.pairs import Census, Found, InputShard, Pair, Unreadable
from data_pipeline.sources.rows_to_pairs import FETCHES, Draft, named_by, split_of_name, with_images
from infra import storage
from infra.errors import DataError, UnchangingError, UnreachableError
from infra.storage import FileInfo

SUFFIXES = (".arrow", ".feather")
_DESCRIPTIONS = ("dataset_dict.json", "state.json", "dataset_info.json")
_SEEKABLE = b"ARROW1"
_END = b"\xff\xff\xff\xff\0\0\0\0"
_BATCH_ROWS = 32
"""How many rows with images are converted to Python objects at once. A whole record batch, as its writer made it (1,000 rows by default), is in memory too."""


class ArrowSource:
    """The .arrow files of a folder, or those that match a pattern."""

    def __init__(self, config: SourceConfig) -> None:
        self.name = config.url
        self.origin = Origin(config)
        self.census = Census()

    def shards(self) -> Iterator[InputShard]:
        """One input shard for each file, sorted by name.

        Raises:
            DataError: there is no Arrow file, or a folder stores a selection of rows instead of the rows themselves.
        """
        self.census = census = Census()
        files = []
        for info in self.origin.files(census):
            last = info.name.rpartition("/")[2]
            if last.lower().endswith(SUFFIXES):
                files.append(info)
                census.read += 1
            elif last in _DESCRIPTIONS:
                census.read += 1
                self._refuse_selection(info.name)
            else:
                census.pass_over(info.name)
        if not files:
            raise DataError(
                f"{self.name}: no .arrow file there; data.sources accepts a folder that save_to_disk wrote, or a pattern such as data/*.arrow."
            )
        files.sort(key=lambda info: info.name)
        with ThreadPoolExecutor(FETCHES if storage.is_remote(self.origin.base) else 1) as pool:
            for info, names in zip(files, pool.map(self._names_images, files), strict=True):
                splits = frozenset({split_of_name(info.name)})
                yield InputShard(info.name, info.version, (), (0, 0), splits, (info.name,), str(info.size), info.size, names)

    def read(self, shard: InputShard, wanted: Callable[[str], bool]) -> Iterator[Found]:
        """The rows of a file.

        Raises:
            DataError: it is not an Arrow file, is damaged, or has no columns of images and captions.
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
        return self.origin.version(f"arrow/2 pyarrow {pyarrow.__version__}")

    def _refuse_selection(self, name: str) -> None:
        """Refuse a folder with an index file that selects and orders the rows, which old versions of datasets wrote; it is not read here."""
        url = self.origin.part(name)
        if name.endswith("state.json"):
            state = foreign_json.read(url, "the description of a set by save_to_disk")
            if isinstance(state, dict) and state.get("_indices_data_files"):
                raise DataError(
                    f"{url}: the set is a selection of the rows of its .arrow files, which is not read; call flatten_indices() before save_to_disk."
                )

    def _names_images(self, info: FileInfo) -> bool:
        """Whether the images of a file are paths. Structs are taken for embedded images, for a look at each would read the file whole."""
        try:
            url = self.origin.part(info.name)
            with _open(url) as (schema, _):
                return columns_of(self.origin, schema, url).is_path
        except UnreachableError:
            raise
        except DataError:
            return False  # its reader says what is wrong

    def _drafts(self, shard: InputShard, wanted: Callable[[str], bool]) -> Iterator[Draft | Pair | Unreadable]:
        url = self.origin.part(shard.name)
        with _open(url, all_of_it=True) as (schema, batches):
            columns = columns_of(self.origin, schema, url)
            rows, first = Rows(self.origin, shard.name, columns, wanted), 0
            for batch in batches:
                kept = batch.select(list(dict.fromkeys([*columns.captions, *columns.about, columns.image])))
                for column in kept.columns:
                    check_bounds(column)
                pieces = (kept.slice(start, _BATCH_ROWS) for start in range(0, batch.num_rows, _BATCH_ROWS))
                yield from rows.found(pieces, first, with_image=True)
                first += batch.num_rows


@contextmanager
def _open(url: str, *, all_of_it: bool = False) -> Iterator[tuple[Any, Iterator[Any]]]:
    """The schema and the batches of an Arrow file, in the stream format or the file format.

    Args:
        all_of_it: the batches are read, too.

    Raises:
        DataError: it is missing, not an Arrow file, damaged, or unpacks to far more than it is; may also be raised while it is read.
    """
    size = storage.size(url)
    seekable = size > len(_SEEKABLE) and storage.read_range(url, 0, len(_SEEKABLE)) == _SEEKABLE
    if not seekable and (size < len(_END) or storage.read_range(url, size - len(_END), len(_END)) != _END):
        # pyarrow takes a stream that breaks off between two batches for a complete one.
        raise DataError(f"{url}: not an Arrow file, or truncated: the end marker of an Arrow stream is missing; fetch it again.")
    if all_of_it:
        with storage.open_seekable(url) as stream:
            try:
                check_messages(stream, size, seekable=seekable)
            except ValueError as error:
                raise UnchangingError(f"{url}: not an Arrow file, or damaged ({error}).") from None
    with storage.open_seekable(url) if seekable else storage.open_stream(url) as stream:
        try:
            if seekable:
                with pyarrow.ipc.open_file(stream) as file:
                    yield file.schema, (file.get_batch(number) for number in range(file.num_record_batches))
            else:
                with pyarrow.ipc.open_stream(stream) as batches:
                    yield batches.schema, iter(batches)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{url}: not an Arrow file, or damaged ({(str(error).splitlines() or [''])[0]}).") from error
