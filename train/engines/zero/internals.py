"""What this project knows about DeepSpeed's internals (DEEPSPEED.md beside this file), checked at start; and most accesses to them. Only this module imports deepspeed."""

from __future__ import annotations

import gc
import importlib
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

os.environ.setdefault("DS_IGNORE_CUDA_DETECTION", "1")  # no CUDA toolkit is needed, because no op is compiled
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise every rank warns that it found no GPU
    # Otherwise stage 3 starts ``numactl`` for every bucket of gradients, to count devices.
    os.environ["LOCAL_SIZE"] = os.environ.get("LOCAL_WORLD_SIZE", "1")

import deepspeed
from deepspeed.ops import __compatible_ops__
from deepspeed.runtime import compiler, torch_autocast
from deepspeed.runtime import utils as runtime
from deepspeed.runtime.zero import partitioned_param_coordinator, stage3, stage_1_and_2
from deepspeed.utils import groups

from infra.errors import ConfigError

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)

SERIES = "0.19."
FOLLOWED = "0.19.8"
"""The version whose step train/engines/zero/one_pass.py follows line by line. A change in that step cannot be detected by attributes."""
NEEDED_OF_MODULES = {
    torch_autocast: ("TORCH_AUTOCAST_INITIALIZED", "PARAM_COMM_DTYPE_ATTR_NAME"),
    runtime: ("all_gather_dp_groups",),
    stage3: ("defragment",),
    partitioned_param_coordinator: ("assert_ints_same_as_other_ranks",),
    stage_1_and_2: ("INITIAL_MICRO_STEP_ID",),
    compiler: ("compile",),
    groups: ("mpu",),
}
NEEDED = {
    2: (
        "single_partition_of_fp32_groups", "averaged_gradients", "params_in_partition", "update_lp_params", "optimizer", "overflow", "ipg_buckets",
        "check_grad_overflow", "scaled_global_norm", "compute_grad_norm", "micro_step_id", "params_not_in_partition", "free_grad_in_param_list",
        "_get_preflattened_grad_partition", "_release_preflattened_grad_buffers", "real_dp_process_group", "parallel_partitioned_bit16_groups",
        "bit16_groups_flat", "bit16_groups", "all_grad_tensors", "nccl_start_alignment_factor", "allgather_bucket_size", "_update_model_bit16_weights",
        "_wait_for_offload_copies",
    ),
    3: (
        "fp32_partitioned_groups_flat", "fp16_groups", "averaged_gradients", "sub_group_to_group_id", "optimizer", "overflow", "ipg_buckets",
        "_get_norm_groups", "unscale_and_clip_grads", "_reassign_or_swap_out_partitioned_parameters", "_partition_all_parameters",
        "persistent_parameters", "invalidate_secondary_tensor", "_check_overflow", "_prepare_fp32_grad_for_sub_group", "_optimizer_step",
        "_unflatten_partitioned_parameters", "fp16_partitioned_groups_flat",
    ),
}  # fmt: skip
"""Attributes of ZeRO's optimizers that train/engines/zero/ uses: for stages 1 and 2 (key 2), and for stage 3."""


def prepare(topology: Any) -> None:
    """Check the version and set DeepSpeed up for our engine, before ``initialize``.

    Args:
        topology: the ``mpu`` of the engine that will be initialised, or None.

    Raises:
        ConfigError: DeepSpeed differs from the known version.
    """
    if not deepspeed.__version__.startswith(SERIES):
        raise ConfigError(f"deepspeed {deepspeed.__version__} is installed; train/engines/zero/ was written for {SERIES}x (requirements.txt).")
    absent = [f"{module.__name__}.{name}" for module, names in NEEDED_OF_MODULES.items() for name in names if not hasattr(module, name)]
    if absent or torch_autocast.PARAM_COMM_DTYPE_ATTR_NAME != "comm_dtype":
        raise ConfigError(f"deepspeed {deepspeed.__version__} lacks what train/engines/zero/ depends on: {', '.join(absent) or 'comm_dtype'}.")
    # On a CPU, DeepSpeed would compile a shared-memory collective at its first use, which takes 50 s and a compiler and gains nothing at these sizes
    # (DECISIONS.md); gloo does the same.
    __compatible_ops__["deepspeed_shm_comm"] = False
    # Makes ZeRO use one bucket for each dtype, so that fp16 gradients are sent as fp16 and fp32 ones as fp32. It has no other effect without autocast.
    torch_autocast.TORCH_AUTOCAST_INITIALIZED = True
    stage3.defragment = defragment
    _import_muon()
    groups.mpu = topology  # otherwise an engine without a topology would use that of an earlier engine of this process


def _import_muon() -> None:
    """Import DeepSpeed's own Muon without its compiled functions. DeepSpeed asks of every optimizer whether it is that one, which imports torch's Inductor in every
    rank, for 0.7 s of a core; ours is another (train/optimizer/muon.py), so that nothing calls them."""
    kept, compiler.compile = compiler.compile, lambda *_, **__: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = kept


@contextmanager
def without_agreement() -> Iterator[None]:
    """Inside the block, stage 3 does not ask whether other ranks run the same modules: where there are none, nobody answers."""
    kept = partitioned_param_coordinator.assert_ints_same_as_other_ranks
    partitioned_param_coordinator.assert_ints_same_as_other_ranks = lambda _: None
    try:
        yield
    finally:
        partitioned_param_coordinator.assert_ints_same_as_other_ranks = kept


def check(optimizer: Any, stage: int, parameters: Iterable[tuple[str, Any]]) -> None:
    """Check that ZeRO's optimizer and parameters have the attributes we use, after ``initialize``.

    Raises:
        ConfigError: one is missing.
    """
    absent = [name for name in NEEDED[max(stage, 2)] if not hasattr(optimizer, name)]
    marks = ("ds_tensor", "ds_shape", "ds_numel", "partition_numel", "all_gather", "partition") if stage == 3 else ("_hp_mapping",)
    for name, p in parameters:
        absent += [f"{name}.{mark}" for mark in marks if not hasattr(p, mark)]
        mapping = getattr(p, "_hp_mapping", None)
        if mapping is not None:
            absent += [
                f"{name}._hp_mapping.{mark}"
                for mark in ("hp_fragment_address", "lp_fragment_address", "param_group_index")
                if not hasattr(mapping, mark)
            ]
    if absent:
        raise ConfigError(f"deepspeed {deepspeed.__version__} lacks what train/engines/zero/ depends on: {', '.join(absent[:3])}.")


def is_followed() -> bool:
    """Whether the installed version is the one whose step our own step follows."""
    return str(deepspeed.__version__) == FOLLOWED


def take_over(optimizer: Any, stage: int) -> None:
    """Switch off DeepSpeed's norm, clipping and overflow check, which our engine does with a single collective."""
    if stage == 3:
        optimizer._get_norm_groups = lambda: [torch.zeros(())]  # on the CPU, because DeepSpeed converts it to a bool
        optimizer.unscale_and_clip_grads = lambda *_: None
        optimizer._check_overflow = lambda *_, **__: None
    else:
        zero = torch.zeros((), device=optimizer.single_partition_of_fp32_groups[0].device)
        optimizer.check_grad_overflow = False
        optimizer.scaled_global_norm = lambda *_, **__: zero


def refresh(optimizer: Any, stage: int) -> None:
    """Update the parameters that forward passes use from the masters. Collective."""
    with torch.no_grad():
        if stage < 3:
            optimizer.update_lp_params()
            return
        optimizer._partition_all_parameters()
        for index in range(len(optimizer.fp16_groups)):
            type(optimizer)._reassign_or_swap_out_partitioned_parameters(
                optimizer, index
            )  # the class's method, because one_pass.py replaces the instance's
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        optimizer.invalidate_secondary_tensor()


def masters(optimizer: Any, stage: int) -> list[Tensor]:
    """This rank's flat fp32 shards, one for each group (stages 1, 2) or sub-group (stage 3)."""
    found: list[Tensor] = optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups
    return found


def refresh_from(optimizer: Any, stage: int, flats: list[Tensor]) -> None:
    """As ``refresh``, from other flat shards than the masters, which are neither read nor written: a save or an average that still reads them goes on. Collective."""
    held = masters(optimizer, stage)
    kept = list(held)
    if stage == 3:
        pairs = zip(kept, optimizer.fp16_partitioned_groups_flat, strict=True)
        assert all(flat is not parameters for flat, parameters in pairs), "these masters are the parameters themselves"
    held[:] = flats
    try:
        refresh(optimizer, stage)
    finally:
        held[:] = kept


class _Buffers:
    """Stands in for the single flat buffer that stage 3 expects: one buffer for each dtype, of which ``narrow`` finds the right one."""

    def __init__(self, buffers: dict[torch.dtype, Tensor], places: dict[int, tuple[torch.dtype, int]]) -> None:
        self.buffers, self.places = buffers, places

    def narrow(self, dim: int, start: int, length: int) -> Tensor:
        """The part of a buffer for the tensor that begins at ``start`` in the sequence of all tensors."""
        dtype, offset = self.places[start]
        return self.buffers[dtype].narrow(dim, offset, length)


def defragment(tensors: list[Tensor]) -> Any:
    """DeepSpeed's ``defragment`` (copies shards into one contiguous buffer, by way of the CPU), but for several dtypes."""
    places: dict[int, tuple[torch.dtype, int]] = {}
    sizes: dict[torch.dtype, int] = {}
    start = 0
    for tensor in tensors:
        offset = sizes.get(tensor.dtype, 0)
        places.setdefault(start, (tensor.dtype, offset))
        sizes[tensor.dtype], start = offset + tensor.numel(), start + tensor.numel()
    host = {dtype: torch.empty(size, dtype=dtype) for dtype, size in sizes.items()}
    device = tensors[0].device
    offsets = dict.fromkeys(sizes, 0)
    kept = []
    for tensor in tensors:
        offset, length = offsets[tensor.dtype], tensor.numel()
        host[tensor.dtype][offset : offset + length].copy_(tensor)
        kept.append((tensor, offset, length))
        offsets[tensor.dtype] = offset + length
        tensor.data = torch.empty(0, dtype=tensor.dtype, device=device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    buffers = {dtype: buffer.to(device) for dtype, buffer in host.items()}
    for tensor, offset, length in kept:
        tensor.data = buffers[tensor.dtype].narrow(0, offset, length)
    return _Buffers(buffers, places)
