"""From an entry of ``data.sources`` to the reader of what it names."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.sources.folder import FolderSource
from data_pipeline.sources.pairs import Source
from data_pipeline.sources.rows_to_pairs import IMAGE_SUFFIXES
from data_pipeline.sources.table import SUFFIXES, TableSource
from data_pipeline.sources.webdataset import WebDatasetSource
from infra import storage
from infra.errors import DataError

LOOK = 10_000
"""Names that are looked at to tell what a folder holds; a folder with several kinds of files is told apart by ``kind``."""


def open_source(config: SourceConfig, data: DataConfig) -> Source:
    """The reader of one entry of ``data.sources``; what kind it is is found by names unless ``kind`` says it.

    Raises:
        DataError: there is nothing at its URL, or nothing that can be read.
    """
    return _OPENERS[config.kind or find_kind(config.url)](config, data)


def find_kind(url: str) -> str:
    """The kind of a source, by the names of the first files that a URL names.

    Tars come first: the .parquet, .json and .jsonl files beside them describe them. Then images with captions of the same name, beside which
    img2dataset leaves .parquet files too. Then Parquet files, then tables.

    Raises:
        DataError: nothing is there, or nothing that can be read.
    """
    if url == "emoji":
        return "emoji"
    for suffixes, kind in _BY_SUFFIX:
        if url.lower().endswith(suffixes):
            return kind
    names = [info.name for info in islice(storage.glob(url)[1], LOOK)]
    lower = [name.lower() for name in names]
    if not any(name.endswith(".tar") for name in lower):
        texts = {name.rpartition(".")[0] for name in names if name.endswith((".txt", ".json"))}
        if any(name.lower().endswith(IMAGE_SUFFIXES) and name.rpartition(".")[0] in texts for name in names):
            return "folder"
    for suffixes, kind in _BY_SUFFIX:
        if any(name.endswith(suffixes) for name in lower):
            return kind
    what = f"none of its files, such as {names[0]}, is data" if names else "no such folder or file, or it is empty"
    raise DataError(
        f"{url}: {what}; data.sources accepts 'emoji', and folders or patterns of images with same-named .txt or .json files, of tables "
        f"({', '.join(SUFFIXES)}), of .parquet files, or of WebDataset .tar files."
    )


def _emoji(config: SourceConfig, data: DataConfig) -> Source:
    from data_pipeline.sources.drawings import EmojiSource  # its packages are needed by this source only

    return EmojiSource(data.render_size, data.records_per_part, config.split)


def _parquet(config: SourceConfig, data: DataConfig) -> Source:
    from data_pipeline.sources.parquet import ParquetSource  # pyarrow takes a second to import

    return ParquetSource(config, data.records_per_part)


_BY_SUFFIX: tuple[tuple[tuple[str, ...], str], ...] = (
    ((".tar",), "webdataset"),
    ((".parquet",), "parquet"),
    (SUFFIXES, "table"),
    (IMAGE_SUFFIXES, "folder"),
)
_OPENERS: dict[str, Callable[[SourceConfig, DataConfig], Source]] = {
    "emoji": _emoji,
    "folder": lambda config, data: FolderSource(config, data.records_per_part),
    "table": lambda config, data: TableSource(config, data.records_per_part),
    "parquet": _parquet,
    "webdataset": lambda config, data: WebDatasetSource(config),
}
