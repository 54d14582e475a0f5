"""What the ZeRO engine asks of an optimizer: updates of flat fp32 shards, and state that checkpoints can name.

An optimizer of ours derives from torch.optim.Optimizer, because DeepSpeed wraps it, and speaks one of the two protocols below. Nothing else in the engine knows
which one runs; docs/architecture.md says where another one is entered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypedDict, runtime_checkable

from torch import Tensor


class ShardGroup(TypedDict, total=False):
    """A group of parameters that are updated alike: an entry of torch's ``param_groups``, with the keys that are ours.

    The first four are fixed when the engine is made (``train.engines.zero.groups``), the others are set before each step.
    """

    params: list[Tensor]
    """In the optimizer's constructor the parameters themselves; afterwards DeepSpeed's flat fp32 shards. On stages 1 and 2 that is one shard: the parameters in
    this order, laid end to end, padded and cut evenly over the ranks, so that it may begin and end inside a matrix. An optimizer that needs shapes notes
    them in its constructor (stage 3: ``p.ds_shape``)."""
    weight_decay: float
    packed: bool
    """Whether the state is kept in the 16-bit formats (paper B.2): that of block matrices alone. With fp32 moments these may share a
    group with other parameters."""
    resblock: int | None
    """The resblock that the group lies in, where each has a gradient scale of its own; None: outside, or no such scales."""
    lr: float
    factor: float
    """What the raw gradients are multiplied by: it undoes scales and averaging, and clips."""
    skip: bool
    """Whether the coming step leaves parameters and state alone."""


@runtime_checkable
class ShardOptimizer(Protocol):
    """An optimizer under DeepSpeed's own step: it joins the gradients of a group in fp32, sets ``grad`` of its flat shard and calls ``step``."""

    state_names: tuple[str, ...]
    """Names of the tensors of ``moments``, as checkpoints have them: ``optimizer/<name>/<parameter>``. Every group has all of them."""
    count: int
    """Applied updates, the coming one included: for bias corrections. The engine sets it before each step."""
    param_groups: list[Any]
    """``ShardGroup``s; DeepSpeed exchanges the list during a step, so nothing may depend on a group's place in it."""

    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient, unless its group is to be skipped."""
        ...

    def moments(self, group: ShardGroup, p: Tensor) -> dict[str, Tensor]:
        """The state of a flat shard of the group, as tensors of its length under ``state_names``; made, as zero, at first use. Restored in place."""
        ...


@runtime_checkable
class OnePassOptimizer(ShardOptimizer, Protocol):
    """One that can also take gradients as the reduction left them, and write the copy that forward passes read (train/engines/zero/one_pass.py)."""

    def apply(self, group: ShardGroup, p: Tensor, grads: Sequence[Tensor], copy: Tensor | None = None) -> None:
        """Update one flat shard, unless its group is to be skipped.

        Args:
            p: flat fp32.
            grads: flat, of any floating dtype; one after the other they cover p.
            copy: flat, as long as p, of any floating dtype: gets the new values, in the same pass.

        Raises:
            ValueError: the gradients are more or fewer than p's elements.
        """
        ...
