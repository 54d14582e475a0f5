"""What the ZeRO engine requires of an optimizer: it updates flat fp32 shards, and its state has names under which checkpoints store it.

An optimizer derives from torch.optim.Optimizer, because DeepSpeed wraps it, and implements one of the two protocols below. Nothing else in the engine depends on
which optimizer is used; docs/architecture.md says how another one is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypedDict, runtime_checkable

from torch import Tensor


class ShardGroup(TypedDict, total=False):
    """A group of parameters with common settings: an entry of torch's ``param_groups``, with additional keys.

    The first six are fixed when the engine is made (``train.engines.zero.groups``), the others are set before each step.
    """

    params: list[Tensor]
    """In the optimizer's constructor the parameters themselves; afterwards DeepSpeed's flat fp32 shards. With ZeRO stages 1 and 2 that is one shard: the parameters
    are concatenated in this order, padded and divided evenly among the ranks, so a shard may begin and end inside a matrix. An optimizer that needs the shapes must
    store them in its constructor (stage 3: ``p.ds_shape``)."""
    weight_decay: float
    packed: bool
    """Whether the optimizer's state is stored in the 16-bit formats (paper B.2). Only block matrices may be in such a group. If moments are fp32, block matrices and
    other parameters may be in the same group."""
    orthogonal: bool
    """Whether the group is one of block matrices that Muon updates (train/optimizer/muon.py)."""
    resblock: int | None
    """Number of the resblock that the group belongs to, if each resblock has its own gradient scale. None: it belongs to none, or there are no such scales."""
    step_ratio: float
    """What the step size of the update is multiplied by for this group (model/width.py). ``weight_decay`` has been divided by it."""
    lr: float
    factor: float
    """What the raw gradients must be multiplied by: the factor removes gradient scales, averages over ranks and clips."""
    skip: bool
    """Whether the next step must leave parameters and state unchanged."""


@runtime_checkable
class ShardOptimizer(Protocol):
    """An optimizer that DeepSpeed's own step can use: DeepSpeed concatenates the gradients of a group in fp32, sets them as ``grad`` of the group's flat shard, and
    calls ``step``."""

    count: int
    """Number of applied updates, the next one included, for bias corrections. The engine sets it before each step."""
    param_groups: list[Any]
    """The groups, each a ``ShardGroup``. DeepSpeed replaces the list during a step, so nothing may depend on a group's position in it."""

    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient, except in groups whose ``skip`` is set."""
        ...

    def state_names(self, group: ShardGroup) -> tuple[str, ...]:
        """The names of the tensors that ``moments`` returns for the group. Checkpoints store them as ``optimizer/<name>/<parameter>``."""
        ...

    def moments(self, group: ShardGroup, p: Tensor) -> dict[str, Tensor]:
        """The state of a flat shard of the group: for each of ``state_names`` a tensor as long as the shard. Created with zeros when first asked for. To restore a
        checkpoint, the caller writes into these tensors."""
        ...


@runtime_checkable
class OnePassOptimizer(ShardOptimizer, Protocol):
    """An optimizer that can also read the gradients as the reduction leaves them, and write the copy of the weights that forward passes use
    (train/engines/zero/one_pass.py)."""

    def apply(self, group: ShardGroup, p: Tensor, grads: Sequence[Tensor], copy: Tensor | None = None) -> None:
        """Update one flat shard, unless its group's ``skip`` is set.

        Args:
            p: the shard, flat and fp32.
            grads: flat tensors of any floating dtype; concatenated they are the gradient of p.
            copy: flat, as long as p, of any floating dtype; the new values are also written to it.

        Raises:
            ValueError: the gradients do not have as many elements as p.
        """
        ...
