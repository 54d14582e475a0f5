"""An optimizer step in a single pass over this rank's shards, which replaces DeepSpeed's. Gradients are read where the reduction left them, masters and moments are
read and written once, and the copy for forward passes is written in the same pass.

DeepSpeed's own step first joins the gradients of a group in a new tensor, and afterwards reads the masters again to copy them. With fp16 parameters and 16-bit
moments that moves 34 bytes per parameter instead of 22. The results are the same, bit for bit.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from train.engines.zero import internals
from train.optimizer.protocol import OnePassOptimizer


def install(optimizer: Any, stage: int, ours: OnePassOptimizer) -> None:
    """Replace the step of ZeRO's optimizer, which must not be offloaded and wraps ``ours``."""
    if stage < 3:
        optimizer.step = partial(_step, optimizer, ours)
        return

    def update(index: int) -> None:
        group = ours.param_groups[optimizer.sub_group_to_group_id[index]]
        flats = [grad.view(-1) for grad in optimizer.averaged_gradients[index]]
        optimizer.averaged_gradients[index] = None
        ours.apply(group, optimizer.fp32_partitioned_groups_flat[index], flats, optimizer.fp16_partitioned_groups_flat[index].data)

    optimizer._prepare_fp32_grad_for_sub_group = lambda index: None  # it would join the gradients in fp32
    optimizer._optimizer_step = update
    optimizer._reassign_or_swap_out_partitioned_parameters = optimizer._unflatten_partitioned_parameters


@torch.no_grad()
def _step(optimizer: Any, ours: OnePassOptimizer, closure: None = None) -> None:
    """The part of DeepSpeedZeroOptimizer.step that remains on stages 1 and 2 without offloading, norms and loss scales."""
    optimizer.micro_step_id = internals.stage_1_and_2.INITIAL_MICRO_STEP_ID
    optimizer.overflow, optimizer._global_grad_norm = False, None
    for index, group in enumerate(ours.param_groups):
        optimizer.free_grad_in_param_list(optimizer.params_not_in_partition[index])
        whole = optimizer._get_preflattened_grad_partition(index)
        flats = [grad.view(-1) for grad in optimizer.averaged_gradients[index]] if whole is None else [whole]
        rank = dist.get_rank(group=optimizer.real_dp_process_group[index])
        copy = optimizer.parallel_partitioned_bit16_groups[index][rank].data
        ours.apply(group, optimizer.single_partition_of_fp32_groups[index], flats, copy)
        optimizer.free_grad_in_param_list(optimizer.params_in_partition[index])
        optimizer._release_preflattened_grad_buffers(index)
        optimizer.averaged_gradients[index] = optimizer.all_grad_tensors[index] = None
    internals.runtime.all_gather_dp_groups(
        groups_flat=optimizer.bit16_groups_flat,
        partitioned_param_groups=optimizer.parallel_partitioned_bit16_groups,
        dp_process_group=optimizer.real_dp_process_group,
        start_alignment_factor=optimizer.nccl_start_alignment_factor,
        allgather_bucket_size=optimizer.allgather_bucket_size,
    )
    for index in range(len(optimizer.bit16_groups)):
        optimizer._update_model_bit16_weights(index)
