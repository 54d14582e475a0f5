"""Storage of block matrices, and the optimizer and its parameter groups (DEEPSPEED.md beside this file, 3 and 4).

Block matrices have groups of their own if they are stored or sent in 16 bits, if their moments are, if Muon updates them, or if ``dalle.base_width`` gives them
another step size. Otherwise they share a group with embeddings and unembeddings.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from model.transformer import ParameterTag
from train.config import DalleFit, ZeroSection
from train.optimizer.adamw import PaperAdamW
from train.optimizer.muon import Muon
from train.optimizer.protocol import ShardGroup, ShardOptimizer

Storage = Literal["fp32", "fp16", "cast"]


def weight_storage(fit: DalleFit, zero: ZeroSection) -> Storage:
    """How block matrices are stored: 'fp32' with bf16 or fp32 arithmetic; with fp16 arithmetic, as zero.weights says.

    'auto' takes whichever needs fewer bytes on the ZeRO stage (``weight_bytes``, measured by tests/train/engines/test_zero.py): true fp16 parameters on all three.
    On stage 3 an fp32 shard could be its own master, but DeepSpeed 0.19.8 keeps a second copy.
    """
    if fit.precision != "fp16":
        return "fp32"
    by_bytes: list[Storage] = ["fp16", "cast"]
    return min(by_bytes, key=lambda kind: weight_bytes(zero.stage, kind, 2)) if zero.weights == "auto" else zero.weights


def weight_bytes(stage: int, storage: Storage, ranks: int) -> float:
    """Bytes per parameter that each of ``ranks`` sharding processes holds for the weight and the fp32 master, without moments, gradients and gathered parameters."""
    whole = 2.0 if storage == "fp16" else 4.0
    return (whole / ranks if stage == 3 else whole) + 4.0 / ranks


def store_weights(module: nn.Module, tags: dict[str, ParameterTag], storage: Storage) -> None:
    """Convert block matrices to their storage, before the parameters are given to ZeRO. Gains, biases, tables and unembeddings stay fp32 (paper D.2)."""
    for name, p in module.named_parameters():
        if tags[name].is_block_matrix and storage == "fp16":
            p.data = p.data.to(torch.float16)
            if hasattr(p, "ds_tensor"):  # sharded already: on stage 3 the shard is a tensor of its own
                p.ds_tensor.data = p.ds_tensor.data.to(torch.float16)
        elif tags[name].is_block_matrix and storage == "cast":
            p.comm_dtype = torch.float16  # type: ignore[attr-defined]


def parameter_groups(module: nn.Module, tags: dict[str, ParameterTag], fit: DalleFit, *, by_resblock: bool) -> list[ShardGroup]:
    """Groups of parameters that agree in storage, weight decay, packing of moments, optimizer and step size; and in their resblock, if gradients have scales.

    An fp32 group of parameters outside resblocks comes first, because ZeRO takes the dtype of its buckets from the first parameter.
    """
    groups: dict[tuple[Any, ...], ShardGroup] = {}
    named = sorted(module.named_parameters(), key=lambda item: tags[item[0]].resblock is not None)
    for name, p in named:
        tag = tags[name]
        packed = fit.moments == "16-bit" and tag.is_block_matrix
        orthogonal = fit.optimizer == "muon" and tag.is_block_matrix
        resblock = tag.resblock if by_resblock else None
        stored = (p.dtype == torch.float16, getattr(p, "comm_dtype", p.dtype))
        key = (-1 if resblock is None else resblock, *stored, tag.decays, packed, orthogonal, tag.ratios)
        step = tag.ratios.step(orthogonal=orthogonal)
        decay = fit.weight_decay / step if tag.decays else 0.0
        common: ShardGroup = {
            "params": [],
            "weight_decay": decay,
            "packed": packed,
            "orthogonal": orthogonal,
            "resblock": resblock,
            "step_ratio": step,
        }
        groups.setdefault(key, common)["params"].append(p)
    return list(groups.values())


def make_optimizer(groups: list[ShardGroup], fit: DalleFit) -> ShardOptimizer:
    """The optimizer that dalle_fit.optimizer names.

    Raises:
        ConfigError: it is apex's, and apex cannot be used here.
    """
    betas, eps = (fit.beta1, fit.beta2), 1e-8
    if fit.optimizer == "apex":
        from train.optimizer import apex_parts  # imported only if it is needed

        return apex_parts.adam(groups, betas=betas, eps=eps, key="dalle_fit.optimizer")
    if fit.optimizer == "muon":
        return Muon(groups, betas=betas, eps=eps, momentum=fit.muon_momentum, clip_variance=fit.clip_variance)
    return PaperAdamW(groups, betas=betas, eps=eps, clip_variance=fit.clip_variance)
