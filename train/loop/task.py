"""What a stage must provide to the training loop: the source of batches, the loss of a batch, the schedules and the evaluation."""

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
    """An endless stream of this rank's micro-batches, whose position can be saved and restored."""

    def next(self) -> Batch:
        """The next micro-batch: tensors by name, and the samples' ids under "ids"."""
        ...

    def state(self) -> dict[str, Any]:
        """The position in the stream, as JSON values. It is the same on all ranks, and a run with another number of ranks can be restored from it."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a position that ``state`` returned."""
        ...


@dataclass
class Loss:
    """What one micro-batch contributes to an update."""

    total: Tensor
    """This micro-batch's part of the global mean loss: the sum over all ranks and micro-batches of the update is that mean."""
    sums: dict[str, Tensor]
    """Its parts of the logged means, by name; they sum in the same way."""


class Task(Protocol):
    """The part of training that differs between the models. One object for each stage and rank."""

    metrics: tuple[str, ...]
    """The names in ``Loss.sums``, the same for every micro-batch."""
    unit: str
    """What the throughput counts: images or tokens."""

    curve: Curve | None
    """The range of updates over which the learning rate schedule runs; None: from the first update to the section's last."""

    def schedule(self, step: int) -> dict[str, float]:
        """The scheduled values of an update; the learning rate 'lr' must be one of them. The same on all ranks."""
        ...

    def denominators(self, batches: list[Batch]) -> Mapping[str, Any]:
        """What the sums of an update are divided by to become means, counted over all ranks and micro-batches (docs/contracts.md, section 5). Collective."""
        ...

    def loss(self, engine: Engine, batch: Batch, step: int, at: Mapping[str, float], denominators: Mapping[str, Any]) -> Loss:
        """Forward pass of one micro-batch. The caller runs the backward pass.

        Args:
            step: number of the update.
            at: what ``schedule`` returned for this update.
            denominators: what ``denominators`` returned for all micro-batches of this update.
        """
        ...

    def evaluate(self, engine: Engine, step: int, writer: MetricsWriter, between: Between) -> dict[str, float]:
        """Metrics on the validation split, equal on all ranks. Collective. Nothing is written before all is measured.

        Raises:
            Left: out of ``between``, which is called between batches; the weights are the training's again.
        """
        ...

    def units(self, batch: Batch) -> int:
        """How many units (see ``unit``) one micro-batch of this rank holds."""
        ...


class Onlooker(Protocol):
    """What draws pictures while a model trains; on the main rank alone."""

    def look(self, saved: int, *, at_evaluation: bool) -> None:
        """Called after each update, with the update of the newest complete checkpoint; may take time where the update ended with an evaluation."""
        ...

    def close(self) -> None:
        """Training ends."""
        ...


@dataclass(frozen=True)
class Outcome:
    """The result of a finished training run."""

    evaluation: dict[str, float]
    """Metrics of the last evaluation."""
    seconds: float
    """Training time over all attempts, without the work that was lost when attempts ended before a save."""
    units_per_s: float
    """Throughput of the last attempt during its updates; 0 if it made none."""
    updates: int
    """Number of updates, over all attempts."""


def sum_of_ids(batches: list[Batch]) -> float:
    """Sum of 32 bits of samples' hashed ids, exact in float64 up to 2^21 samples: where two updates have the same, they saw the same samples."""
    return float(sum(id_hash(name) & 0xFFFFFFFF for batch in batches for name in batch["ids"]))
