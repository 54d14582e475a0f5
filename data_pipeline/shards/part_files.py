"""Reads the files of parts: each is verified against its hash in the manifest first, and decompression is bounded."""

from __future__ import annotations

import gzip
import hashlib
import io
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.shards import links
from data_pipeline.shards.rows import ShardRows, row_decoder
from data_pipeline.shards.schema import check_columns, read_part_index
from infra import node_folder, scratch, storage, strict_json
from infra.commands import launcher
from infra.errors import DataError

INDEX = "index.json"
U64 = np.dtype("<u8")
_SMALLEST_LIMIT = 1 << 20  # smaller files are read whole, so that damage is reported as a wrong hash and not as a wrong size
_LONGEST_LINE = 16 << 20  # bytes of a line, which holds the captions of one record


def unpack_captions(data: bytes, count: int, place: str) -> Iterator[list[str]]:
    """The captions in a captions file, record by record, so that a file which unpacks to gigabytes does not fill the memory.

    Args:
        data: content of the file.
        count: number of records of its part.
        place: its URL, for messages.

    Raises:
        DataError: it is not a captions file, or has another number of lines.
    """
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            for _ in range(count):
                captions = strict_json.loads(file.readline(_LONGEST_LINE).decode())
                if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
                    raise ValueError("a line is no list of texts")
                yield captions
            if file.read(1):
                raise ValueError(f"more lines than the {count} records of its part")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"{place}: is no gzipped file of JSON lines ({error}); run 'launcher.py validate' on the set.") from error


def sha256_of(part: Mapping[str, Any], name: str, url: str) -> str:
    """The hash of a part's file, according to the manifest of the set at ``url``.

    Raises:
        DataError: the part has no such file.
    """
    found = [str(file["sha256"]) for file in part["files"] if file["name"] == name]
    if not found:
        raise DataError(f"{url}: part {part['name']} has no file {name}, which the set was written with; run '{launcher('validate', url)}'.")
    return found[0]


def read_checked(url: str, sha256: str, most: int, *, once: bool = False) -> bytes:
    """A file of at most ``most`` bytes.

    Args:
        once: every rank needs it: those of a node fetch it once.

    Raises:
        DataError: it is missing or larger, or has another hash.
    """
    links.check(url)
    data = node_folder.read_once(url, most) if once else storage.read_at_most(url, most)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise _damaged(url)
    return data


def _damaged(url: str) -> DataError:
    folder = url.rpartition("/")[0]
    return DataError(f"{url}: damaged, its SHA-256 is not the one it was written with; delete {folder} and run the stage that wrote it again.")


def read_u64(url: str, sha256: str, count: int, *, once: bool = False) -> NDArray[np.uint64]:
    """``count`` numbers of 64 bits; ``once`` as of ``read_checked``.

    Raises:
        DataError: the file is missing or damaged, or holds another count of numbers.
    """
    data = read_checked(url, sha256, max(8 * count, _SMALLEST_LIMIT), once=once)
    if len(data) != 8 * count:
        raise DataError(f"{url}: {len(data)} bytes; the manifest counts {count} numbers of 8; run 'launcher.py validate' on the set.")
    return np.frombuffer(data, U64)


def read_row(url: str, entry: Mapping[str, Any], row: int) -> dict[str, Any]:
    """One row of a shard file, read without the rest of the file.

    Raises:
        DataError: the file is missing, truncated or damaged at this row.
    """
    links.check(url)
    begin, end = struct.unpack("<II", storage.read_range(url, 4 + 4 * row, 8))
    if not 0 < begin < end <= entry["raw_data"]["bytes"]:
        raise DataError(f"{url}: row {row} has the offsets {begin} and {end}: damaged; run 'launcher.py validate' on the set.")
    return dict(row_decoder(entry, url)(storage.read_range(url, begin, end - begin)))


def read_records(set_url: str, part: Mapping[str, Any], schema: str) -> Iterator[dict[str, Any]]:
    """All records of a part as dictionaries of columns, in order. A remote part is copied to this machine first.

    Args:
        set_url: place of the set.
        part: the part's entry in the manifest.
        schema: schema of the set.

    Raises:
        DataError: a file is missing or damaged, or holds other columns.
    """
    place = storage.join(set_url, part["name"])
    if not storage.is_remote(place):
        yield from _read_local(storage.local_path(place), part, place, schema)
        return
    with scratch.folder("part-") as folder:
        for file in part["files"]:
            if file["name"].endswith((".mds", INDEX)):
                storage.download_file(storage.join(place, file["name"]), Path(folder, file["name"]))
        yield from _read_local(Path(folder), part, place, schema)


def _read_local(folder: Path, part: Mapping[str, Any], place: str, schema: str) -> Iterator[dict[str, Any]]:
    for file in part["files"]:
        links.check(str(folder / file["name"]))
        if file["name"].endswith((".mds", INDEX)) and storage.sha256_file(folder / file["name"]) != file["sha256"]:
            raise _damaged(storage.join(place, file["name"]))
    hashed = {file["name"] for file in part["files"]}
    for entry in read_part_index(str(folder / INDEX)):
        name = entry["raw_data"]["basename"]
        if name not in hashed:
            raise DataError(
                f"{storage.join(place, name)}: no file of its part in the manifest, so nobody knows its hash; run 'launcher.py validate'."
            )
        check_columns(schema, entry, storage.join(place, name))
        rows = ShardRows(folder / name, entry, storage.join(place, name))
        try:
            yield from (dict(rows[number]) for number in range(len(rows)))
        finally:
            rows.close()
