"""What DeepSpeed is told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from infra.world import World
from train.config import DalleFit, ZeroSection
from train.engines.zero import buckets


def reduced(parameters: Iterable[Tensor]) -> list[int]:
    """Elements of the gradients of each dtype in which they travel, which has a bucket of its own. On stage 3 parameters may be sharded already."""
    found: Counter[torch.dtype] = Counter()
    for p in parameters:
        found[getattr(p, "comm_dtype", p.dtype)] += getattr(p, "ds_numel", p.numel())
    return list(found.values())


def deepspeed_config(fit: DalleFit, zero: ZeroSection, world: World, nodes: int = 1, reduced: Iterable[int] = ()) -> dict[str, Any]:
    """DeepSpeed's configuration, derived from ours. It has no section for precision (which would add a single loss scale) and no clipping; the engine does both.

    Args:
        reduced: what ``reduced`` says of the model's parameters; empty where none are there yet and nothing is reduced.
    """
    sections: dict[str, Any] = {
        "stage": zero.stage,
        "overlap_comm": zero.overlap_comm,
        "reduce_bucket_size": buckets.elements(zero.reduce_bucket_size, reduced),
        "allgather_bucket_size": zero.allgather_bucket_size,
    }
    if zero.stage < 3:
        sections |= {"use_multi_rank_bucket_allreduce": zero.use_multi_rank_bucket_allreduce, "compute_grad_norm": zero.offload_optimizer}
    else:
        sections |= {
            "stage3_prefetch_bucket_size": zero.stage3_prefetch_bucket_size,
            "stage3_param_persistence_threshold": zero.stage3_param_persistence_threshold,
            "stage3_max_live_parameters": zero.stage3_max_live_parameters,
            "stage3_max_reuse_distance": zero.stage3_max_reuse_distance,
        }
    if zero.offload_optimizer:
        sections["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_batch_size": fit.batch // nodes,
        "train_micro_batch_size_per_gpu": fit.batch // (world.size * fit.accumulation),
        "gradient_accumulation_steps": fit.accumulation,
        "gradient_clipping": 0.0,
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": sections,
        "steps_per_print": 1 << 60,
        "timers": {"throughput": {"enabled": False}},  # it would synchronise with the GPU in every micro-batch
        "wall_clock_breakdown": False,
    }
