"""Fragments of flattened tensors, and the planners by which torch.distributed.checkpoint saves and restores them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType

from infra.errors import CheckpointError


@dataclass(frozen=True)
class Fragment:
    """A contiguous piece of a flattened tensor."""

    tensor: Tensor
    """1-D view of the piece; restoring writes into it."""
    offset: int
    """Index of the piece's first element in the flattened tensor."""
    total: int
    """Number of elements of the whole tensor."""


def even_slice(tensor: Tensor, part: int, parts: int) -> Fragment:
    """Piece ``part`` of ``parts`` of a whole contiguous tensor (the last ones may be shorter, even empty)."""
    flat = tensor.view(-1)
    each = -(-flat.numel() // parts)
    start = min(part * each, flat.numel())
    return Fragment(flat[start : start + each], start, flat.numel())


def _chunk(fragment: Fragment) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size([fragment.offset]), sizes=torch.Size([fragment.tensor.numel()]))


def _read_item(name: str, fragment: Fragment) -> ReadItem:
    here, there, length = torch.Size([0]), torch.Size([fragment.offset]), torch.Size([fragment.tensor.numel()])
    return ReadItem(LoadItemType.TENSOR, MetadataIndex(name, there), here, MetadataIndex(name), there, length)


class FragmentSaver(DefaultSavePlanner):
    """Saves a dictionary of name -> Fragment, of this rank alone: that the pieces of all make up the tensors was found before (``train/weights/layout.py``)."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False)

    def create_local_plan(self) -> SavePlan:
        """One write item for each piece that is not empty."""
        items = []
        for name, fragment in self.state_dict.items():
            if fragment.tensor.numel():
                properties = TensorProperties(dtype=fragment.tensor.dtype)
                data = TensorWriteData(chunk=_chunk(fragment), properties=properties, size=torch.Size([fragment.total]))
                items.append(WriteItem(index=MetadataIndex(name, data.chunk.offsets), type=WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Keep the plan: the default would miss the other ranks' pieces."""
        return all_plans, Metadata(state_dict_metadata={})

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        """The tensor of a piece."""
        tensor: Tensor = self.state_dict[index.fqn].tensor
        return tensor


class FragmentLoader(DefaultLoadPlanner):
    """Restores a dictionary of name -> Fragment in place. The stored pieces may be divided in any other way."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        """Keep the fragments as they are. The default implementation would replace values whose type it does not know."""
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        """One item for each of our pieces: which stored ones it overlaps is found file by file, as they are read.

        Raises:
            CheckpointError: a tensor is missing, or has another size or another kind of dtype.
        """
        assert self.metadata is not None
        items: list[ReadItem] = []
        for name, fragment in self.state_dict.items():
            stored = self.metadata.state_dict_metadata.get(name)
            if not isinstance(stored, TensorStorageMetadata):
                raise CheckpointError(f"holds no '{name}'.")
            if stored.size[0] != fragment.total:
                raise CheckpointError(f"'{name}' has {stored.size[0]} elements, this configuration builds {fragment.total}.")
            kept, wanted = stored.properties.dtype, fragment.tensor.dtype
            if kept.is_floating_point != wanted.is_floating_point:
                raise CheckpointError(f"'{name}' is kept as {kept}, this configuration holds {wanted}: set moments as the checkpoint has them.")
            if fragment.tensor.numel():
                items.append(_read_item(name, fragment))
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """The tensor of a piece; its index 0 is the piece's first element."""
        tensor: Tensor = self.state_dict[index.fqn].tensor
        return tensor


def full_shape(parameter: Tensor) -> list[int]:
    """Full shape of a parameter, also of one that ZeRO stage 3 has partitioned."""
    return list(getattr(parameter, "ds_shape", parameter.shape))
