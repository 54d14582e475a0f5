"""Writes the parts of a shard set. A part is made in a temporary folder and then copied to its place, the marker last."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from data_pipeline.shards import links
from data_pipeline.shards.part_files import INDEX, U64
from data_pipeline.shards.shard_set import CAPTIONS, DONE, FURTHER, IDS, PRINTS, ImageRecord, Record, part_name
from infra import scratch, storage
from infra.digests import id_hash
from infra.files import write_errors

if TYPE_CHECKING:
    from data_pipeline.shards.mosaic import MDSWriter  # imports torch, so it is imported only where shards are written

_HASH = "xxh64"  # the hash that StreamingDataset verifies on download; manifests hold SHA-256


class PartWriter:
    """Writes one part: shards and side files in a temporary folder, then everything to its place, the marker last.

    Equal records give equal bytes, so two processes may write the same part at the same time. A part may have no records.
    """

    def __init__(self, set_url: str, inputs_hash: str, shard_bytes: int = 1 << 26) -> None:
        """
        Args:
            set_url: place of the shard set.
            inputs_hash: digest of everything that the part is made from; it names the part.
            shard_bytes: size limit of one shard file in bytes.
        """
        self.place = storage.join(set_url, part_name(inputs_hash))
        self._inputs, self._shard_bytes = inputs_hash, shard_bytes
        self._folder = scratch.Folder("part-")
        self._mds: MDSWriter | None = None
        self._ids: list[int] = []
        self._further: list[tuple[int, int]] = []
        self._prints: list[tuple[int, int, int]] = []
        self._captions: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._folder.close()

    def add(self, record: Record) -> None:
        """Append a record; all records of a part must have the same schema.

        Raises:
            NoRoomError: the temporary folder is full.
        """
        columns = record.columns()
        if self._mds is None:
            from data_pipeline.shards.mosaic import MDSWriter

            self._mds = MDSWriter(out=self._folder.name, columns=columns, hashes=[_HASH], size_limit=self._shard_bytes)
            self._mds.executor = _Inline()
        with write_errors(Path(self._folder.name)):
            self._mds.write({name: getattr(record, name) for name in columns})
        self._ids.append(id_hash(record.id))
        self._further += [(self._ids[-1], further) for further in record.further]
        if isinstance(record, ImageRecord):
            self._prints.append((*record.prints, id_hash(record.group)))
            self._captions.append(json.dumps(record.captions, ensure_ascii=True))

    def finish(self, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Finish the last shard and the side files, upload everything, and mark the part as done.

        Args:
            extra: JSON-able facts to keep in the marker (counts, reasons).

        Returns:
            The marker: inputs, count, files (name, bytes, sha256), shards (as in index.json), extra.

        Raises:
            NoRoomError: the temporary folder is full.
            DataError: the part's place is a link that leads out of the set.
        """
        folder = Path(self._folder.name)
        links.check(storage.join(self.place, DONE))
        with write_errors(folder):
            marker = self._close(folder, dict(extra or {}))
        storage.upload_folder(folder, self.place, last=[DONE])
        return marker

    def _close(self, folder: Path, extra: dict[str, Any]) -> dict[str, Any]:
        if self._mds is None:
            (folder / INDEX).write_text(json.dumps({"shards": [], "version": 2}, sort_keys=True))
        else:
            self._mds.finish()
        (folder / IDS).write_bytes(np.array(self._ids, U64).tobytes())
        if self._further:
            (folder / FURTHER).write_bytes(np.array(self._further, U64).tobytes())
        if self._prints:
            (folder / PRINTS).write_bytes(np.array(self._prints, U64).tobytes())
            # mtime=0 and no file name in the gzip header, so that equal captions give equal bytes.
            (folder / CAPTIONS).write_bytes(gzip.compress("".join(f"{line}\n" for line in self._captions).encode(), 6, mtime=0))
        files = [{"name": name, **_fingerprint(folder / name)} for name in storage.list_files(str(folder))]
        shards = json.loads((folder / INDEX).read_text())["shards"]
        marker = {"inputs": self._inputs, "count": len(self._ids), "files": files, "shards": shards, "extra": extra}
        (folder / DONE).write_text(json.dumps(marker, indent=2, sort_keys=True) + "\n")
        return marker


class _Inline(ThreadPoolExecutor):
    """Runs submitted functions immediately. MDSWriter uses threads only for uploads, which we do ourselves, and sleeps a second while one has not started."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def write_part(
    set_url: str, inputs_hash: str, records: Iterable[Record], shard_bytes: int = 1 << 26, extra: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write one part of the given records; see ``PartWriter``. Returns the marker."""
    with PartWriter(set_url, inputs_hash, shard_bytes) as writer:
        for record in records:
            writer.add(record)
        return writer.finish(extra)


def _fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": storage.sha256_file(path)}
