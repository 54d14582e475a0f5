"""The end of a stage: all ranks agree to stop, or a training stage is exported and marked as done."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from infra.errors import StopRequested
from infra.run_folder import RunFolder
from infra.signals import StopFlag
from infra.world import World
from train.engines.protocol import Engine
from train.loop.trainer import Outcome
from train.ranks.signal_vector import SignalVector
from train.weights import export
from train.weights.checkpoint import StoredTensors
from train.weights.fragments import full_shape


def stop_together(stop: StopFlag, device: torch.device, stage: str) -> None:
    """Called when a rank has finished its parts, or was asked to stop. Waits for all ranks; if any was asked to stop, all end with code 75. Collective.

    Raises:
        StopRequested: a rank was asked to stop. Finished parts stay; the same command continues with the others.
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
    averaged: StoredTensors | None = None,
) -> None:
    """Export the averaged weights and mark a training stage as done. For the main rank only.

    Args:
        averaged: the averaged weights, in a checkpoint; None: the engine's, if it holds them whole.
    """
    if not world.is_main:
        return
    found = engine.average.values if averaged is None else averaged
    weights = export.write(run.at(stage, "export"), found, model_config, parents=lineage, evaluation=outcome.evaluation)
    run.finish(
        stage,
        seconds=outcome.seconds,
        updates=outcome.updates,
        world_size=world.size,
        throughput={"value": outcome.units_per_s, "unit": unit},
        weights=weights,
        parents=lineage,
        summary=outcome.evaluation | {"parameters": sum(math.prod(full_shape(p)) for p in engine.module.parameters())},
    )
