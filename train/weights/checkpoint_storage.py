"""Storage backend of torch.distributed.checkpoint: raw files and a JSON index through infra.storage, local or s3. No pickle."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future as Job
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from infra import node_folder, storage, streamed_upload, strict_json
from infra.digests import digest
from infra.errors import CheckpointError, DataError, UnreachableError
from infra.stored import Count, Sha256, Stored, check

INDEX = "index.json"
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
class _Place:
    """Where a stored piece lies."""

    file: str
    start: int
    bytes: int
    sha256: str
    dtype: torch.dtype

    @property
    def end(self) -> int:
        return self.start + self.bytes


_Wanted = tuple[_Place, list[ReadItem]]
"""A stored piece, and which parts of it are read."""


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().view(-1)
    return memoryview(flat.view(torch.uint8).numpy())


class Chunk(Stored):
    """Where a piece of a tensor lies. The pattern allows only files of ranks, directly in the checkpoint's folder."""

    file: Annotated[str, Field(pattern=r"^rank-[0-9]{1,9}\.bin$")]
    start: Count
    bytes: Annotated[int, Field(ge=0, le=PIECE_BYTES)]
    sha256: Sha256
    offset: Count
    length: Count


class StoredTensor(Stored):
    """The entry of a tensor in index.json."""

    dtype: Literal["float32", "float16", "bfloat16", "float64", "int16", "int32", "int64", "int8", "uint8", "bool"]
    size: Count
    chunks: list[Chunk]

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if sum(chunk.length for chunk in self.chunks) != self.size:
            raise ValueError(f"its pieces do not make up its {self.size} elements")
        width = getattr(torch, self.dtype).itemsize
        if any(chunk.bytes != chunk.length * width for chunk in self.chunks):
            raise ValueError("a piece has other bytes than its elements take")
        return self


class Index(Stored):
    """index.json."""

    tensors: dict[str, StoredTensor]


class Writer(StorageWriter):
    """Writes one file for each rank; when all ranks have written, the coordinator writes index.json."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url
        self.digest = ""
        """Digest of the index, once the coordinator has written it."""
        self._offsets: dict[str, int] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing to do: the URL is fixed at construction."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to prepare: folders are created when files are written."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Cut large fragments into pieces of PIECE_BYTES."""
        items = []
        for item in plan.items:
            data = item.tensor_data
            assert data is not None
            offset, length, most = data.chunk.offsets[0], data.chunk.sizes[0], PIECE_BYTES // data.properties.dtype.itemsize
            self._offsets[item.index.fqn] = offset
            for start in range(offset, offset + length, most):
                chunk = ChunkStorageMetadata(offsets=torch.Size([start]), sizes=torch.Size([min(most, offset + length - start)]))
                items.append(replace(item, index=MetadataIndex(item.index.fqn, chunk.offsets), tensor_data=replace(data, chunk=chunk)))
        return replace(plan, items=items)

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Assign the name of its file to each rank."""
        return [SavePlan(plan.items, storage_data=f"rank-{rank}.bin", planner_data=plan.planner_data) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's pieces one after another, and hash each. A rank that has no pieces, such as a replica on another node, writes no file."""
        if not plan.items:
            return _done([])
        results: list[WriteResult] = []
        target = storage.join(self.url, plan.storage_data)
        if storage.is_remote(self.url):
            sizes = (item.tensor_data for item in plan.items)
            size = sum(data.chunk.sizes[0] * data.properties.dtype.itemsize for data in sizes if data is not None)
            streamed_upload.upload(self._pieces(plan, planner, results), size, target)
            return _done(results)
        path = storage.local_path(target).with_suffix(".part")
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            for data in self._pieces(plan, planner, results):
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        path.replace(storage.local_path(target))
        return _done(results)

    def _pieces(self, plan: SavePlan, planner: SavePlanner, results: list[WriteResult]) -> Iterator[memoryview]:
        """The bytes of a plan's items in order. The place and the hash of each item are appended to ``results``."""
        position = 0
        for item in plan.items:
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, torch.Tensor) and item.tensor_data is not None  # FragmentSaver refused anything else
            chunk = item.tensor_data.chunk
            data = _bytes_of(tensor.narrow(0, chunk.offsets[0] - self._offsets[item.index.fqn], chunk.sizes[0]))
            place = {"file": plan.storage_data, "start": position, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            results.append(WriteResult(index=item.index, size_in_bytes=len(data), storage_data=place))
            position += len(data)
            yield data

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index: for each tensor its dtype, size and chunks."""
        places = {(r.index.fqn, tuple(r.index.offset or ())): r.storage_data for rank in results for r in rank}
        tensors = {}
        for name, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata)
            chunks = [{"offset": c.offsets[0], "length": c.sizes[0]} | places[name, tuple(c.offsets)] for c in entry.chunks]
            tensors[name] = {"dtype": str(entry.properties.dtype).removeprefix("torch."), "size": entry.size[0], "chunks": chunks}
        index = {"tensors": tensors}
        storage.write_json(storage.join(self.url, INDEX), index)
        self.digest = digest(index)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Accept any URL."""
        return True


class Reader(StorageReader):
    """Reads the pieces of a checkpoint that are needed, and refuses those whose hash differs."""

    def __init__(self, url: str, index_digest: str) -> None:
        """
        Args:
            index_digest: the digest that index.json must have.
        """
        super().__init__()
        self.url, self.index_digest = url, index_digest
        self._places: dict[tuple[str, int], _Place] = {}
        self._metadata: Metadata | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """The URL is fixed at construction."""

    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        """The metadata for torch, from index.json, which is read once. ``checkpoint.load`` calls this before torch does, because torch hides the errors that
        this raises."""
        if self._metadata is not None:
            return self._metadata
        place = storage.join(self.url, INDEX)
        index = storage.parse_json(place, node_folder.read_once(place, strict_json.MAX_BYTES))
        if digest(index) != self.index_digest:
            raise CheckpointError(f"{storage.join(self.url, INDEX)}: damaged: its hash is not the one in meta.json.")
        check(index, Index, storage.join(self.url, INDEX))
        entries = {}
        for name, entry in index["tensors"].items():
            chunks, dtype = [], getattr(torch, entry["dtype"])
            for chunk in entry["chunks"]:
                self._places[name, chunk["offset"]] = _Place(chunk["file"], chunk["start"], chunk["bytes"], chunk["sha256"], dtype)
                chunks.append(ChunkStorageMetadata(offsets=torch.Size([chunk["offset"]]), sizes=torch.Size([chunk["length"]])))
            entries[name] = TensorStorageMetadata(properties=TensorProperties(dtype=dtype), size=torch.Size([entry["size"]]), chunks=chunks)
        self._metadata = Metadata(state_dict_metadata=entries)
        return self._metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Read index.json on the ranks that are not the coordinator: torch passes them the metadata, but they also need the places in the files."""
        if not self._places:
            self.read_metadata()

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
        wanted: dict[tuple[str, int], _Wanted] = {}
        for item in plan.items:
            place = self._place(item.storage_index)
            wanted.setdefault((place.file, place.start), (place, []))[1].append(item)
        for run, data in self._fetched(_runs([wanted[key] for key in sorted(wanted)])):
            for place, items in run:
                begin = place.start - run[0][0].start
                # Copied, so that its elements are aligned in memory, wherever the piece begins in the file.
                stored = torch.frombuffer(bytearray(data[begin : begin + place.bytes]), dtype=place.dtype)
                for item in items:
                    self._copy(stored, item, planner)
        return _done(None)

    def _copy(self, stored: torch.Tensor, item: ReadItem, planner: LoadPlanner) -> None:
        target = planner.resolve_tensor(item).detach()
        target.copy_(stored[item.storage_offsets[0] : item.storage_offsets[0] + item.lengths[0]])
        planner.commit_tensor(item, target)

    def _place(self, index: MetadataIndex) -> _Place:
        return self._places[index.fqn, index.offset[0] if index.offset is not None else 0]

    def _fetched(self, runs: Iterator[list[_Wanted]]) -> Iterator[tuple[list[_Wanted], memoryview]]:
        """Every run of neighbouring pieces with its bytes, in order. At most READERS runs are being read or held in memory."""
        waiting: deque[tuple[list[_Wanted], Job[memoryview]]] = deque()
        with ThreadPoolExecutor(READERS, "checkpoint-read") as pool:
            for run in runs:
                waiting.append((run, pool.submit(self._fetch, [place for place, _ in run])))
                if len(waiting) == READERS:
                    first, job = waiting.popleft()
                    yield first, job.result()
            for first, job in waiting:
                yield first, job.result()

    def _fetch(self, run: list[_Place]) -> memoryview:
        """The bytes of neighbouring pieces of a file, after their hashes were checked. If a hash differs, they are read once more: S3 has no checksum for a
        range, so the bytes may have been damaged in transit."""
        url, start, size = storage.join(self.url, run[0].file), run[0].start, run[-1].end - run[0].start
        data = memoryview(bytearray(size))
        for _ in range(_TRIES):
            try:
                for done in range(0, size, READ_BYTES):
                    data[done : done + READ_BYTES] = storage.read_range(url, start + done, min(READ_BYTES, size - done))
            except UnreachableError:
                raise
            except DataError as error:
                raise CheckpointError(f"damaged: {error}") from error
            odd = [place for place in run if hashlib.sha256(data[place.start - start : place.end - start]).hexdigest() != place.sha256]
            if not odd:
                return data
        raise CheckpointError(f"{url}: damaged: the hash of bytes {odd[0].start} to {odd[0].end} differs, also when they are read again.")

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any URL will do."""
        return True


def _runs(wanted: list[_Wanted]) -> Iterator[list[_Wanted]]:
    """Group the pieces, which are ordered by file and position, into runs that one request reads. A piece longer than READ_BYTES is a run by itself."""
    run: list[_Wanted] = []
    for each in wanted:
        if run:
            first, last, place = run[0][0], run[-1][0], each[0]
            if place.file != first.file or place.start > last.end + GAP_BYTES or place.end > first.start + READ_BYTES:
                yield run
                run = []
        run.append(each)
    if run:
        yield run
