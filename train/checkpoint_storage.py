"""Storage backend of torch.distributed.checkpoint: raw files and a JSON index through infra.storage, local or s3. No pickle."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from data_pipeline.shards import digest
from infra import files, storage
from infra.errors import CheckpointError

INDEX = "index.json"


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().view(-1)
    return memoryview(flat.view(torch.uint8).numpy())


class Writer(StorageWriter):
    """One file for each rank, and index.json by the coordinator once every rank has written."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self.url = url
        self.digest = ""
        """Of the index, once the coordinator has written it."""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """The URL is fixed at construction."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to prepare: storage makes folders as it writes."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Keep the plan."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Give each rank the name of its file."""
        return [SavePlan(plan.items, storage_data=f"rank-{rank}.bin", planner_data=plan.planner_data) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's fragments one after another, each with its SHA-256."""
        name, results, position = plan.storage_data, [], 0
        remote = storage.is_remote(self.url)
        target = storage.join(self.url, name)
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch, name) if remote else storage.local_path(target).with_suffix(".part")
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                for item in plan.items:
                    tensor = planner.resolve_data(item)
                    assert isinstance(tensor, torch.Tensor)  # FragmentSaver refused anything else
                    data = _bytes_of(tensor)
                    file.write(data)
                    place = {"file": name, "start": position, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
                    results.append(WriteResult(index=item.index, size_in_bytes=len(data), storage_data=place))
                    position += len(data)
                file.flush()
                os.fsync(file.fileno())
            if remote:
                storage.upload_file(path, target)
            else:
                path.replace(storage.local_path(target))
        return _done(results)

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
        """Any URL will do."""
        return True


class Reader(StorageReader):
    """Reads fragments of a checkpoint, and refuses those whose hash differs."""

    def __init__(self, url: str, index_digest: str) -> None:
        """
        Args:
            index_digest: what the index must have.
        """
        super().__init__()
        self.url, self.index_digest = url, index_digest
        self._places: dict[tuple[str, int], dict[str, Any]] = {}
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        self._metadata: Metadata | None = None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """The URL is fixed at construction."""

    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        """Torch's metadata from index.json, which is read once: torch swallows what goes wrong in here, so ``checkpoint.load`` reads first."""
        if self._metadata is not None:
            return self._metadata
        index = storage.read_json(storage.join(self.url, INDEX))
        if digest(index) != self.index_digest:
            raise CheckpointError(f"{storage.join(self.url, INDEX)}: damaged: its hash is not the one in meta.json.")
        entries = {}
        for name, entry in index["tensors"].items():
            chunks = []
            for chunk in entry["chunks"]:
                self._places[name, chunk["offset"]] = chunk | {"dtype": entry["dtype"]}
                chunks.append(ChunkStorageMetadata(offsets=torch.Size([chunk["offset"]]), sizes=torch.Size([chunk["length"]])))
            properties = TensorProperties(dtype=getattr(torch, entry["dtype"]))
            entries[name] = TensorStorageMetadata(properties=properties, size=torch.Size([entry["size"]]), chunks=chunks)
        self._metadata = Metadata(state_dict_metadata=entries)
        return self._metadata

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Ranks other than the coordinator get the metadata handed over, and need the places too."""
        if not self._places:
            self.read_metadata()

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Keep the plan."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Keep the plans."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy every requested piece into place, reading and checking each stored fragment once."""
        cache: dict[tuple[str, int], torch.Tensor] = {}
        for item in plan.items:
            place = self._place(item.storage_index)
            key = (item.storage_index.fqn, place["offset"])
            if key not in cache:
                cache = {key: self._fragment(place)}
            self._copy(cache[key], item, planner)
        return _done(None)

    def _copy(self, stored: torch.Tensor, item: ReadItem, planner: LoadPlanner) -> None:
        target = planner.resolve_tensor(item).detach()
        target.copy_(stored[item.storage_offsets[0] : item.storage_offsets[0] + item.lengths[0]])
        planner.commit_tensor(item, target)

    def _place(self, index: MetadataIndex) -> dict[str, Any]:
        return self._places[index.fqn, index.offset[0] if index.offset is not None else 0]

    def _fragment(self, place: dict[str, Any]) -> torch.Tensor:
        with files.read_errors(storage.join(self.url, place["file"])), self._path(place["file"]).open("rb") as file:
            file.seek(place["start"])
            data = bytearray(file.read(place["bytes"]))
        if hashlib.sha256(data).hexdigest() != place["sha256"]:
            raise CheckpointError(
                f"{storage.join(self.url, place['file'])}: damaged: the hash of bytes {place['start']} to {place['start'] + place['bytes']} differs."
            )
        return torch.frombuffer(data, dtype=getattr(torch, place["dtype"]))

    def _path(self, name: str) -> Path:
        url = storage.join(self.url, name)
        if not storage.is_remote(url):
            return storage.local_path(url)
        if self._scratch is None:
            self._scratch = tempfile.TemporaryDirectory()
        path = Path(self._scratch.name, name)
        if not path.exists():
            storage.download_file(url, path)
        return path

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any URL will do."""
        return True
