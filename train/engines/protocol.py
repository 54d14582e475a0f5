"""The protocol of training engines: what the training loop needs from whatever holds the model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor, nn

from train.optimizer.averaging import Average
from train.optimizer.loss_scale import LossScale
from train.weights.fragments import Fragment


class Histogram(NamedTuple):
    """How many values lie in each bin."""

    edges: Sequence[float]
    """Upper ends of the bins, ascending."""
    counts: Sequence[float]


@dataclass(frozen=True)
class Update:
    """The result of an update."""

    applied: bool
    """False if a gradient was not finite: then parameters and moments are unchanged on every rank."""
    grad_norm: float
    """Global norm of the gradient before clipping."""
    overflow: bool = False
    """Whether scaled gradients overflowed; then the scale has been lowered, as far as its rules allow."""
    numerics: dict[str, float] = field(default_factory=dict)
    """Metrics of each resblock, in those updates in which they are measured."""
    histograms: dict[str, Histogram] = field(default_factory=dict)
    """Distributions of each resblock's gradients, in those updates in which they are counted."""


class Engine(Protocol):
    """A model, its optimizer and the collectives between ranks.

    The loop calls, for each update: for every micro-batch ``micro_batch``, a forward pass and ``backward``; then ``step`` once. A loss passed to ``backward`` is
    this rank's share of the global mean: the mean is the *sum* of all shares, over ranks and micro-batches.
    """

    module: nn.Module
    average: Average
    updates: int
    """Number of applied updates (Adam's step count)."""
    loss_scale: LossScale | None
    """The loss scale for fp16 gradients, if the engine scales the loss."""

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """The model's forward pass; gradients of its outputs are reduced over ranks."""
        ...

    def micro_batch(self, *, last: bool) -> None:
        """Announce a micro-batch, before its forward pass. Gradients are reduced over ranks in the last one of an update."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of one micro-batch. The loss is this rank's share of the global mean, and must not be divided again."""
        ...

    def step(self, lr: float) -> Update:
        """Apply the accumulated gradients with this step size, or skip the update, on all ranks alike. Gradients are cleared afterwards. Collective."""
        ...

    def fragments(self, *, to_load: bool) -> dict[str, Fragment]:
        """This rank's parts of weights, moments and averages, by name, as views into which a restore writes.

        Args:
            to_load: True: all that this rank holds. False: only what this rank has to save, since of equal replicas only one saves.
        """
        ...

    def loaded(self, updates: int) -> None:
        """Finish a restore, once the fragments are filled. ``updates`` is the number of updates that the checkpoint had applied."""
        ...


@runtime_checkable
class MeasuringEngine(Protocol):
    """An engine whose ranks must know something about each other's gradients before a step, such as their global norm.

    These measures are sent with the only message of the update (the signal vector), which is then the only thing that the host waits for.
    """

    def measure(self) -> Tensor:
        """This rank's part of a float64 vector that is summed over ranks. To be called after the last backward pass of an update."""
        ...

    def step(self, lr: float, measured: Sequence[float] | None = None) -> Update:
        """As ``Engine.step``; ``measured`` is the sum of ``measure`` over all ranks. If the caller has not computed it, the engine does."""
        ...


@runtime_checkable
class StatefulEngine(MeasuringEngine, Protocol):
    """An engine that also has a state besides its tensors, and can run forward passes with averaged weights."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores of the engine besides tensors: JSON values, the same on all ranks."""
        ...

    def more_to_load(self, state: dict[str, Any]) -> Iterator[dict[str, Fragment]]:
        """Further fragments to load, which depend on the ``state`` in the checkpoint. They are yielded in groups, each of which the caller fills before it asks for
        the next; every rank yields equally many."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from the ``state`` that was stored in a checkpoint, by any number of ranks."""
        ...

    def averaged(self) -> AbstractContextManager[None]:
        """During the block, forward passes use the averaged weights. Collective."""
        ...


@runtime_checkable
class FrozenEngine(StatefulEngine, Protocol):
    """An engine that also keeps the weights that training started from."""

    def frozen(self, *, evaluates: bool) -> AbstractContextManager[None]:
        """During the block, forward passes use the weights that training started from, in evaluation mode or as in training. Masters, moments and averages are not
        touched. Collective; to be entered between updates' micro-batches only, never between a forward pass and its backward pass."""
        ...
