"""What stages share: agreeing to stop, and finishing a training stage."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from data_pipeline.config import DataConfig
from infra.errors import ConfigError, StopRequested
from infra.run_folder import RunFolder
from infra.signals import StopFlag
from infra.world import World
from train.config import FitSection, RunConfig
from train.engines.replicated import Engine
from train.loop.trainer import Outcome, full_shape
from train.ranks.signal_vector import SignalVector
from train.weights import export


def micro_batch(cfg: RunConfig, section: str, world: World) -> int:
    """Samples of one micro-batch over all ranks.

    Raises:
        ConfigError: the batch does not divide over ranks and micro-batches.
    """
    fit: FitSection = getattr(cfg, section)
    shares = world.size * fit.accumulation
    if fit.batch % shares:
        raise ConfigError(
            f"{section}.batch = {fit.batch} does not divide over {world.size} processes x {section}.accumulation = {fit.accumulation}; "
            f"use a multiple of {shares}."
        )
    return fit.batch // fit.accumulation


def loader_options(data: DataConfig) -> dict[str, Any]:
    """How a training stage's loader works. Its batches depend on the block of the shuffle and on the weights of sources, and on nothing else of it."""
    weights = {source.url: source.weight for source in data.sources}
    return {"workers": data.workers, "prefetch": data.prefetch, "cache_bytes": data.cache_bytes, "block": data.shuffle_block, "weights": weights}


def stop_together(stop: StopFlag, device: torch.device, stage: str) -> None:
    """At the end of a rank's share of parts: wait for all ranks, and end with code 75 on all if one was asked to stop. Collective.

    Raises:
        StopRequested: what is finished stays; the same command goes on.
    """
    if SignalVector((), device).exchange({"stop": float(bool(stop))})["stop"] > 0:
        raise StopRequested(f"{stage}: stopped by a signal; finished parts are kept.")


def finish_training(
    stage: str,
    model_config: Any,
    engine: Engine,
    outcome: Outcome,
    unit: str,
    lineage: Mapping[str, str],
    run: RunFolder,
    world: World,
    averaged: dict[str, Tensor] | None = None,
) -> None:
    """Export the averaged weights and mark a training stage done; the main rank's work.

    Args:
        averaged: the averaged weights; None: the engine's, if it holds them whole.
    """
    if not world.is_main:
        return
    tensors = engine.average.values if averaged is None else averaged
    weights = export.write(run.at(stage, "export"), tensors, model_config, parents=lineage, evaluation=outcome.evaluation)
    run.finish(
        stage,
        seconds=outcome.seconds,
        world_size=world.size,
        throughput={"value": outcome.units_per_s, "unit": unit},
        weights=weights,
        parents=lineage,
        summary=outcome.evaluation | {"parameters": sum(math.prod(full_shape(p)) for p in engine.module.parameters())},
    )
