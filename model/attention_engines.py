"""Attention engines by name, and which of them a device can run. The caller chooses (train/machine/attention_choice.py)."""

import importlib.util
from typing import Literal, get_args

import torch
from torch import nn

from model.attention import DenseAttention, StructuredAttention
from model.config import StreamShape, TransformerConfig

EngineName = Literal["dense", "flex", "structured"]
ENGINES: tuple[EngineName, ...] = get_args(EngineName)

_LEAST_HEAD_FLEX = 16
"""Smallest width of a head: Triton's matrix products need 16 columns."""


def why_unavailable(name: EngineName, device: torch.device, cfg: TransformerConfig) -> str | None:
    """Why an engine cannot train on a device; None if it can.

    Raises:
        ValueError: an unknown engine.
    """
    if name not in ENGINES:
        raise ValueError(f"attention engine '{name}': accepted are {', '.join(ENGINES)}")
    if name != "flex":
        return None
    if device.type != "cuda":
        return f"FlexAttention has no backward pass on device type '{device.type}', only on cuda"
    if importlib.util.find_spec("triton") is None:
        return "FlexAttention is compiled by triton, which is not installed"
    if cfg.width // cfg.heads < _LEAST_HEAD_FLEX:
        return f"FlexAttention needs heads of at least {_LEAST_HEAD_FLEX}, and width / heads is {cfg.width // cfg.heads}"
    return None


def make_engine(name: EngineName, cfg: TransformerConfig, shape: StreamShape, device: torch.device) -> nn.Module:
    """Make an engine: ``engine(q_BHSK, k_BHSK, v_BHSK, kind) -> out_BHSK``. All engines compute the same, up to rounding.

    Args:
        name: 'dense' (SDPA under the whole mask, the reference), 'structured' (short lines, for CPUs) or 'flex' (block masks, for GPUs).
        device: where it will run.

    Raises:
        ValueError: the engine is unknown, or cannot train on the device; the message says why.
    """
    reason = why_unavailable(name, device, cfg)
    if reason is not None:
        raise ValueError(f"attention = '{name}': {reason}; accepted here: {', '.join(e for e in ENGINES if not why_unavailable(e, device, cfg))}")
    if name == "flex":
        from model.flex import FlexAttention  # imported here, because its compiler takes seconds to import

        return FlexAttention(cfg, shape)
    return DenseAttention(cfg, shape) if name == "dense" else StructuredAttention(cfg, shape)
