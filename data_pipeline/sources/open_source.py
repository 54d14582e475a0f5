"""From an entry of ``data.sources`` to the reader of what it names."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.sources.kinds import BY_NAME, EMOJI, FOLDER, KINDS, WEBDATASET, Kind
from data_pipeline.sources.pairs import Source
from data_pipeline.sources.rows_to_pairs import IMAGE_SUFFIXES
from infra import storage
from infra.errors import DataError

LOOK = 10_000
"""Names among which captions beside images are looked for, and several kinds of files are told apart. Behind more images than that, any other kind
of file decides."""


def open_source(config: SourceConfig, data: DataConfig) -> Source:
    """The reader of one entry of ``data.sources``; its kind is told from file names unless ``kind`` gives it.

    Raises:
        DataError: there is nothing at its URL, or nothing that can be read.
    """
    return BY_NAME[config.kind or find_kind(config.url)].opener(config, data)


def find_kind(url: str) -> str:
    """The kind of a source, by the names of the files that a URL names.

    Tars come first: the .parquet, .json and .jsonl files beside them describe them. Then images with captions of the same name, beside which
    img2dataset leaves .parquet files too. Then the other kinds in the order of ``KINDS``.

    Raises:
        DataError: nothing is there, or nothing that can be read.
    """
    if url == "emoji":
        return EMOJI.name
    for kind in KINDS:
        if kind.shows(url):
            return kind.name
    infos = storage.glob(url, _links(url))[1]
    names = (info.name for info in infos)
    first = list(islice(names, LOOK))
    found = _kind_of(first)
    if found is FOLDER and not _captioned(first):  # images alone, so far: what says something about them may come behind them
        found = next((kind for name in names for kind in KINDS if kind.shows(name) and kind is not FOLDER), FOLDER)
    if found is not None:
        return found.name
    what = f"none of its files, such as {first[0]}, is data" if first else "no such folder or file, or it is empty"
    raise DataError(
        f"{url}: {what}; data.sources accepts 'emoji', and folders or patterns of {', of '.join(kind.holds for kind in KINDS if kind is not EMOJI)}."
    )


def _links(url: str) -> tuple[str, ...]:
    """The folder itself: a link that leads out of it shows no kind."""
    return () if storage.is_remote(url) else (str(storage.local_path(url).resolve()),)


def _kind_of(names: list[str]) -> Kind | None:
    if not any(WEBDATASET.shows(name) for name in names) and _captioned(names):
        return FOLDER
    return next((kind for kind in KINDS for name in names if kind.shows(name)), None)


def _captioned(names: list[str]) -> bool:
    """Whether an image has a file of the same name beside it."""
    texts = {name.rpartition(".")[0] for name in names if name.lower().endswith((".txt", ".json"))}
    return any(stem in texts for stem in _stems(names))


def _stems(names: list[str]) -> Iterator[str]:
    return (name.rpartition(".")[0] for name in names if name.lower().endswith(IMAGE_SUFFIXES))
