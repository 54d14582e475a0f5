"""What the training loop asks of a stage: where batches come from, how one becomes a loss, what is scheduled and evaluated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from infra.digests import id_hash
from train.engines.protocol import Engine
from train.loop.metrics import MetricsWriter
from train.ranks.leaving import Between
from train.run.change_points import Curve

Batch = dict[str, Any]


class Loader(Protocol):
    """An endless stream of this rank's micro-batches, with a position that can be saved."""

    def next(self) -> Batch:
        """The next micro-batch: tensors by name, and the samples' ids under "ids"."""
        ...

    def state(self) -> dict[str, Any]:
        """The position in the stream, as JSON values: the same on all ranks, and valid on any number of them."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a position that ``state`` returned."""
        ...


@dataclass
class Loss:
    """One micro-batch's contribution."""

    total: Tensor
    """This rank's share of the global mean: shares sum to it over ranks and micro-batches."""
    sums: dict[str, Tensor]
    """Shares of the logged means, likewise."""


class Task(Protocol):
    """What differs between the models."""

    metrics: tuple[str, ...]
    """Names of the shares that ``loss`` returns."""
    unit: str
    """What throughput counts: images or tokens."""

    curve: Curve | None
    """The updates that the schedule of the step size spans; None: all of the section's."""

    def schedule(self, step: int) -> dict[str, float]:
        """Values scheduled at an update; must hold 'lr'."""
        ...

    def denominators(self, batches: list[Batch]) -> Mapping[str, Any]:
        """Global denominators of an update over all ranks and micro-batches (docs/contracts.md, section 5)."""
        ...

    def loss(self, engine: Engine, batch: Batch, step: int, at: Mapping[str, float], denominators: Mapping[str, Any]) -> Loss:
        """This rank's share of one micro-batch's loss.

        Args:
            step: number of the update.
            at: the values of ``schedule`` at that update.
            denominators: what ``denominators`` returned for all micro-batches of the update.
        """
        ...

    def evaluate(self, engine: Engine, step: int, writer: MetricsWriter, between: Between) -> dict[str, float]:
        """Metrics on the validation split, equal on all ranks. Collective. Nothing is written before all is measured.

        Raises:
            Left: out of ``between``, which is called between batches; the weights are the training's again.
        """
        ...

    def units(self, batch: Batch) -> int:
        """Units of one local micro-batch, for throughput."""
        ...


def sum_of_ids(batches: list[Batch]) -> float:
    """Sum of 32 bits of samples' hashed ids, exact in float64 up to 2^21 samples: where two updates have the same, they saw the same samples."""
    return float(sum(id_hash(name) & 0xFFFFFFFF for batch in batches for name in batch["ids"]))
