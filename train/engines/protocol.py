"""What the training loop asks of whatever holds the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from train.optimizer.averaging import Average
from train.optimizer.loss_scale import LossScale
from train.weights.fragments import Fragment


@dataclass(frozen=True)
class Update:
    """What became of an update."""

    applied: bool
    """False where a non-finite gradient was found: parameters and moments are untouched on every rank."""
    grad_norm: float
    """Global norm of the gradient before clipping."""
    overflow: bool = False
    """Scaled gradients overflowed; the scale has been lowered in answer, as far as its rules allow."""
    numerics: dict[str, float] = field(default_factory=dict)
    """Series of each resblock, in the updates in which they are measured."""


class Engine(Protocol):
    """A model, its optimizer and the collectives between ranks. Losses passed to ``backward`` are this rank's share of the global mean: they *sum* over ranks and micro-batches."""

    module: nn.Module
    average: Average
    updates: int
    """Applied updates: Adam's count."""
    loss_scale: LossScale | None
    """Scale of fp16 gradients, if the engine scales the loss."""

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """The model's forward pass; gradients of its outputs are reduced over ranks."""
        ...

    def micro_batch(self, *, last: bool) -> None:
        """Announce a micro-batch, before its forward pass: gradients are reduced over ranks with the last one of an update."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of one micro-batch. The loss is this rank's share of the global mean and is not divided again."""
        ...

    def step(self, lr: float) -> Update:
        """Apply the accumulated gradients with this step size, or skip the update on all ranks alike; gradients are empty afterwards. Collective."""
        ...

    def fragments(self, *, to_load: bool) -> dict[str, Fragment]:
        """What this rank holds of weights, moments and averages, by name, as views that a restore writes into. With ``to_load`` false, only what this rank
        has to save: of replicas, one saves."""
        ...

    def loaded(self, updates: int) -> None:
        """Called after the fragments have been filled by a restore, with the number of updates that the checkpoint has applied."""
        ...


@runtime_checkable
class MeasuringEngine(Protocol):
    """An engine whose ranks must know of each other's gradients before a step. What they must know travels with the step's one message, which is then the
    only thing that the host waits for."""

    def measure(self) -> Tensor:
        """This rank's part of a float64 vector that is summed over ranks, after the last backward pass of an update."""
        ...

    def step(self, lr: float, measured: Sequence[float] | None = None) -> Update:
        """As ``Engine.step``; ``measured`` is the sum of ``measure`` over ranks, formed here where the caller has not done it."""
        ...


@runtime_checkable
class StatefulEngine(MeasuringEngine, Protocol):
    """One that also has a state of its own, and forward passes with averaged weights."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the engine besides tensors: JSON values, alike on all ranks."""
        ...

    def more_to_load(self, state: dict[str, Any]) -> Iterator[dict[str, Fragment]]:
        """Fragments that depend on what the checkpoint holds, by its ``state``, in lots: each is filled before the next is asked for. As many lots on every rank."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what ``state`` returned when the checkpoint was written, on any number of ranks."""
        ...

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, forward passes read the averaged weights. Collective."""
        ...
