"""Fragments of flattened tensors, and the planners by which torch.distributed.checkpoint saves and restores them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

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


class FragmentSaver(DefaultSavePlanner):
    """Saves a dictionary of name -> Fragment; each rank contributes the pieces that it holds."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False)

    def create_local_plan(self) -> SavePlan:
        """One write item for each piece that is not empty."""
        items = []
        for name, fragment in self.state_dict.items():
            if not isinstance(fragment, Fragment):
                raise CheckpointError(f"'{name}' is not a fragment of a tensor: other state belongs in meta.json.")
            if fragment.tensor.numel():
                properties = TensorProperties(dtype=fragment.tensor.dtype)
                data = TensorWriteData(chunk=_chunk(fragment), properties=properties, size=torch.Size([fragment.total]))
                items.append(WriteItem(index=MetadataIndex(name, data.chunk.offsets), type=WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

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
        """One read item for each overlap of a wanted piece and a stored one.

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
                items += create_read_items_for_chunk_list(name, stored, [_chunk(fragment)])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """The tensor of a piece; its index 0 is the piece's first element."""
        tensor: Tensor = self.state_dict[index.fqn].tensor
        return tensor


def full_shape(parameter: Tensor) -> list[int]:
    """Full shape of a parameter, also of one that ZeRO stage 3 has partitioned."""
    return list(getattr(parameter, "ds_shape", parameter.shape))
