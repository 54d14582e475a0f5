"""Storage backend of torch.distributed.checkpoint: raw files and a JSON index in parts through infra.storage, local or s3. No pickle.

Each rank goes through it by itself (``no_dist``); what ranks must know of each other they tell in ``train/weights/agreement.py``.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, cast

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from infra import kept_within, node_folder, storage, streamed_upload, strict_json
from infra.digests import digest
from infra.errors import CheckpointError, DataError, UnreachableError
from infra.overlapped import overlapped
from train.weights.checkpoint_index import INDEX, Catalogue, Piece, Place, Wanted, catalogue, data_name, index_of, part_name, part_of

PIECE_BYTES = 4 << 20
"""Larger fragments are stored in pieces of this many bytes, each with its hash. A run that divides tensors differently then reads and checks only the pieces
that it needs, not whole fragments."""
READ_BYTES = 32 << 20
"""Pieces that lie near each other are read by one request of at most this many bytes; a longer piece is read by several."""
GAP_BYTES = 1 << 20
"""Two pieces with at most this many unneeded bytes between them are read together: that is cheaper than a second request."""
READERS = 4
"""Number of simultaneous requests."""
_TRIES = 2


@dataclass(frozen=True)
class _Wanted:
    """A stored piece, and what is read of it."""

    place: Place
    offset: int
    item: ReadItem


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().view(-1)
    return memoryview(flat.view(torch.uint8).numpy())


class Writer(StorageWriter):
    """A rank's file, and its part of the index once the file is there."""

    def __init__(self, url: str, rank: int) -> None:
        super().__init__()
        self.url, self.rank = url, rank
        self.part: tuple[int, bytes] | None = None
        """Bytes and SHA-256 of the part, once it is written; None for a rank without tensors."""
        self._tensors: dict[str, dict[str, Any]] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing to do: the URL is fixed at construction."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to prepare: folders are created when files are written."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Keep the plan."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Keep the plan of this rank, the only one it knows of."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's tensors one after another, in pieces with a SHA-256 each. A rank that has none, such as a replica on another node, writes no file."""
        if not plan.items:
            return _done([])
        target = storage.join(self.url, data_name(self.rank))
        if storage.is_remote(self.url):
            sizes = (item.tensor_data for item in plan.items)
            size = sum(data.chunk.sizes[0] * data.properties.dtype.itemsize for data in sizes if data is not None)
            streamed_upload.upload(self._pieces(plan, planner), size, target)
            return _done([])
        path = storage.local_path(target).with_suffix(".part")
        kept_within.check(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for data in self._pieces(plan, planner):
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        path.replace(storage.local_path(target))
        return _done([])

    def _pieces(self, plan: SavePlan, planner: SavePlanner) -> Iterator[memoryview]:
        """The bytes of a plan's items in order; where they lie and their hashes are noted."""
        position = 0
        for item in plan.items:
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, torch.Tensor) and item.tensor_data is not None  # FragmentSaver refused anything else
            chunk = item.tensor_data.chunk
            noted: dict[str, Any] = {"start": position, "offset": chunk.offsets[0], "length": chunk.sizes[0], "sha256": []}
            self._tensors[item.index.fqn] = noted
            for piece in tensor.split(PIECE_BYTES // tensor.itemsize):
                data = _bytes_of(piece)
                noted["sha256"].append(hashlib.sha256(data).hexdigest())
                position += len(data)
                yield data

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write this rank's part of the index."""
        if self._tensors:
            data = part_of(self.rank, PIECE_BYTES, self._tensors)
            storage.write_bytes(storage.join(self.url, part_name(self.rank)), data)
            self.part = len(data), hashlib.sha256(data).digest()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Accept any URL."""
        return True


def write_index(url: str, tensors: dict[str, Any], parts: list[tuple[int, bytes] | None]) -> str:
    """Write the index, once all parts are there, and return its digest; see ``index_of``."""
    index = index_of(tensors, parts)
    storage.write_json(storage.join(url, INDEX), index)
    return digest(index)


class Reader(StorageReader):
    """Reads the pieces of a checkpoint that are needed, and refuses those whose hash differs."""

    def __init__(self, url: str, index_digest: str) -> None:
        """
        Args:
            index_digest: the digest that index.json must have.
        """
        super().__init__()
        self.url, self.index_digest = url, index_digest
        self._catalogue: Catalogue | None = None
        self._metadata: Metadata | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """The URL is fixed at construction."""

    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        """Dtypes and sizes from index.json, which is read once: torch swallows what goes wrong in here, so ``checkpoint.load`` reads first."""
        if self._metadata is not None:
            return self._metadata
        place = storage.join(self.url, INDEX)
        for read in (node_folder.read_once, storage.read_at_most):  # the node's copy may be of a damaged one that this attempt has written anew
            index = storage.parse_json(place, read(place, strict_json.MAX_BYTES))
            if digest(index) == self.index_digest:
                break
        else:
            raise CheckpointError(f"{place}: damaged: its hash is not the one in meta.json.")
        self._catalogue = catalogue(self.url, index)
        entries = {
            name: TensorStorageMetadata(properties=TensorProperties(dtype=kind.dtype), size=torch.Size([kind.size]), chunks=[])
            for name, kind in self._catalogue.kinds.items()
        }
        self._metadata = Metadata(state_dict_metadata=entries)
        return self._metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to prepare: each rank has read the index by itself."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Leave the plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Leave the plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy what the plan asks for into the target tensors. Each stored piece that holds some of it is read and checked once.

        Raises:
            CheckpointError: a file is missing or too short, or the hash of a piece differs.
            UnreachableError: the storage does not answer.
        """
        # Buffers are used again: of a gigabyte, new ones would cost as much time for their pages as the hashes. One is being copied from while all others are filled.
        free: SimpleQueue[torch.Tensor] = SimpleQueue()
        for _ in range(READERS + 1):
            free.put(torch.empty(0, dtype=torch.uint8))
        for run, data in overlapped(lambda run: self._fetch(run, free.get()), self._runs(plan.items), READERS):
            for each in run:
                begin = each.place.start - run[0].place.start
                stored = data[begin : begin + each.place.bytes]
                if begin % each.place.dtype.itemsize:
                    stored = stored.clone()  # elements must be aligned, whatever lies before them in the file
                self._copy(stored.view(each.place.dtype), each, planner)
            free.put(data)
        return _done(None)

    def _copy(self, stored: torch.Tensor, each: _Wanted, planner: LoadPlanner) -> None:
        """Put the elements of a piece that are wanted where they belong."""
        target = planner.resolve_tensor(each.item).detach()
        first = each.item.storage_offsets[0]
        start, end = max(first, each.offset), min(first + each.item.lengths[0], each.offset + len(stored))
        target[start - first : end - first].copy_(stored[start - each.offset : end - each.offset])

    def _runs(self, items: list[ReadItem]) -> Iterator[list[_Wanted]]:
        """What is to be read, file by file, in groups that one request reads."""
        assert self._catalogue is not None
        wanted = [Wanted(item.storage_index.fqn, item.storage_offsets[0], item.storage_offsets[0] + item.lengths[0]) for item in items]
        for pieces in self._catalogue.files(wanted):
            yield from _neighbours(sorted(pieces, key=lambda piece: piece.place.start), items)

    def _fetch(self, run: list[_Wanted], buffer: torch.Tensor) -> torch.Tensor:
        """The bytes of neighbours in a file, whose hashes are right, in ``buffer`` or in a larger one. Read again before they are called damaged: S3 checks no
        ranges on their way."""
        places = [each.place for each in run]
        url, start, size = storage.join(self.url, places[0].file), places[0].start, places[-1].end - places[0].start
        if len(buffer) < size:
            buffer = torch.empty(size, dtype=torch.uint8)
        data = memoryview(buffer.numpy())[:size]
        for _ in range(_TRIES):
            try:
                for done in range(0, size, READ_BYTES):
                    fill(url, start + done, data[done : done + READ_BYTES])
            except UnreachableError:
                raise
            except DataError as error:
                raise CheckpointError(f"damaged: {error}") from error
            odd = [place for place in places if hashlib.sha256(data[place.start - start : place.end - start]).hexdigest() != place.sha256]
            if not odd:
                return buffer
        raise CheckpointError(f"{url}: damaged: the hash of bytes {odd[0].start} to {odd[0].end} differs, also when they are read again.")

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any URL will do."""
        return True


def fill(url: str, start: int, target: memoryview) -> None:
    """Read bytes of a file or object, from ``start`` on, until ``target`` is full; a local file without a copy between.

    Raises:
        DataError: as storage.read_range.
    """
    if storage.is_remote(url):
        target[:] = storage.read_range(url, start, len(target))
        return
    with storage.open_stream(url, start) as file:
        read = cast(io.BufferedIOBase, file).readinto(target)
    if read != len(target):
        raise DataError(f"{url}: ends after {start + read} bytes, {start + len(target)} were expected; run the stage that wrote it again.")


def _neighbours(pieces: list[Piece], items: list[ReadItem]) -> Iterator[list[_Wanted]]:
    """Pieces of a file in the order of their positions, in groups that one request reads; longer ones than READ_BYTES stand alone."""
    run: list[_Wanted] = []
    for piece in pieces:
        place = piece.place
        if run and (place.start > run[-1].place.end + GAP_BYTES or place.end > run[0].place.start + READ_BYTES):
            yield run
            run = []
        run.append(_Wanted(place, piece.offset, items[piece.wanted]))
    if run:
        yield run
