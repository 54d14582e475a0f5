"""Opens the entries of ``data.sources``, and recognises their kind."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.sources.kinds import BY_NAME, EMOJI, FOLDER, KINDS, WEBDATASET, Kind
from data_pipeline.sources.pairs import Source
from data_pipeline.sources.rows_to_pairs import IMAGE_SUFFIXES
from infra import globs, storage
from infra.errors import DataError

LOOK = 10_000
"""How many names of a listing are examined to recognise a kind. If all of these are images without captions, the first file of another kind after them
decides."""


def open_source(config: SourceConfig, data: DataConfig) -> Source:
    """The reader of an entry of ``data.sources``. Its kind is recognised from file names unless ``kind`` is set.

    Raises:
        DataError: there is nothing at its URL, or nothing of a known kind.
    """
    return BY_NAME[config.kind or find_kind(config.url, config.roots)].opener(config, data)


def find_kind(url: str, roots: tuple[str, ...] = ()) -> str:
    """The kind of a source, recognised from the names of its files.

    Tars come first, because .parquet, .json and .jsonl files beside them only describe them. Then images with captions of the same name, beside which
    img2dataset also leaves .parquet files. Then the other kinds, in the order of ``KINDS``.

    Raises:
        DataError: there is nothing at the URL, or nothing of a known kind.
    """
    if url == "emoji":
        return EMOJI.name
    for kind in KINDS:
        if kind.shows(url):
            return kind.name
    infos = storage.glob(url, _links(url, roots))[1]
    names = (info.name for info in infos if info.version not in globs.NOT_FILES)
    first = list(islice(names, LOOK))
    found = _kind_of(first)
    if found is FOLDER and not _captioned(first):  # only images so far: the file with their captions may come after them
        found = next((kind for name in names for kind in KINDS if kind.shows(name) and kind is not FOLDER), FOLDER)
    if found is not None:
        return found.name
    what = f"none of its files, such as {first[0]}, is data" if first else "no such folder or file, or it is empty"
    raise DataError(
        f"{url}: {what}; data.sources accepts 'emoji', and folders or patterns of {', of '.join(kind.holds for kind in KINDS if kind is not EMOJI)}."
    )


def _links(url: str, roots: tuple[str, ...]) -> tuple[str, ...]:
    """The folder itself and the source's ``roots``, so that links which lead elsewhere are not followed to recognise a kind."""
    places = (storage.glob(url)[0], *roots)
    return tuple(str(storage.local_path(place).resolve()) for place in places if not storage.is_remote(place))


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
