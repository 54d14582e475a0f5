"""AdamW as the paper runs it: variance clipped to 5, decoupled decay, moments in fp32 or in the 16-bit formats (paper B.2; docs/paper.md 3.7, 4).

Under ZeRO each parameter here is the fp32 master copy of a flat shard (train/optimizer/protocol.py). A gradient is multiplied by its group's ``factor`` when it
is read. So it is read only once, and never written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from train.optimizer.protocol import ShardGroup
from train.optimizer.uncompiled import Optimizer


@dataclass(frozen=True)
class Hyper:
    """The numbers that one update of one group needs."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    clip_variance: float
    """Upper limit of the variance estimate; infinity: no limit."""
    factor: float
    """The gradient is multiplied by it first."""
    count: int
    """Number of updates, this one included, for the bias corrections."""

    @property
    def correction1(self) -> float:
        return 1.0 - self.beta1**self.count

    @property
    def correction2(self) -> float:
        return 1.0 - self.beta2**self.count


class PaperAdamW(Optimizer):
    """See the module's docstring. Implements ``train.optimizer.protocol.OnePassOptimizer``.

    The moments are ``state[p]["exp_avg"]`` and ``["exp_avg_sq"]``: float32, or for packed groups int16 tensors in the formats 1-6-9 and 0-6-10.
    """

    count: int

    def __init__(self, groups: Iterable[ShardGroup], *, betas: tuple[float, float], eps: float = 1e-8, clip_variance: float | None = 5.0) -> None:
        """Raises: ValueError: no groups."""
        self.betas, self.eps, self.clip_variance = betas, eps, float("inf") if clip_variance is None else clip_variance
        self.count = 1
        super().__init__(
            [dict(group) for group in groups], {"lr": 0.0, "weight_decay": 0.0, "packed": False, "orthogonal": False, "factor": 1.0, "skip": False}
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update all groups but those whose ``skip`` is set."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.apply(group, p, [p.grad.view(-1)])

    @torch.no_grad()
    def apply(self, group: ShardGroup, p: Tensor, grads: Sequence[Tensor], copy: Tensor | None = None) -> None:
        """See the protocol. Raises: ValueError: the gradients do not have as many elements as p."""
        if group["skip"]:
            return
        check_lengths(p, grads)
        hyper = Hyper(group["lr"], *self.betas, self.eps, group["weight_decay"], self.clip_variance, factor=float(group["factor"]), count=self.count)
        state = self.moments(group, p)
        update_pieces(p.detach().view(-1), grads, state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1), hyper, copy)

    def state_names(self, group: ShardGroup) -> tuple[str, ...]:
        """See the protocol."""
        return "exp_avg", "exp_avg_sq"

    def moments(self, group: ShardGroup, p: Tensor) -> dict[str, Tensor]:
        """See the protocol. Code 0 of the 16-bit formats is zero."""
        state = self.state[p]
        if not state:
            dtype = torch.int16 if group["packed"] else torch.float32
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(p, dtype=dtype, requires_grad=False) for _ in range(2))
        return state


def check_lengths(p: Tensor, grads: Sequence[Tensor]) -> None:
    """Raises: ValueError: the gradients do not have as many elements as p."""
    if (count := sum(grad.numel() for grad in grads)) != p.numel():
        raise ValueError(f"{count} gradients for {p.numel()} parameters.")


_chosen: list[Callable[[Tensor, Tensor, Tensor, Tensor, Hyper, Tensor | None], None]] = []


@contextmanager
def with_kernel(kernel: Callable[[Tensor, Tensor, Tensor, Tensor, Hyper, Tensor | None], None]) -> Iterator[None]:
    """Inside the block, every ``update`` of this process is computed by this kernel: for tensors without values, which no compiled one can read."""
    _chosen.append(kernel)
    try:
        yield
    finally:
        _chosen.pop()


def update(p: Tensor, grad: Tensor, mean: Tensor, variance: Tensor, hyper: Hyper, copy: Tensor | None = None) -> None:
    """One AdamW update in place, of contiguous tensors of equal size: p fp32, grad of any floating dtype, the moments both fp32 or both int16. The new p is also
    written to ``copy``."""
    if _chosen:
        _chosen[-1](p, grad, mean, variance, hyper, copy)
        return
    if p.is_cuda:
        from train.optimizer import adamw_kernel as compiled  # needs triton, which comes only with CUDA builds of torch
    else:
        from train.optimizer import adamw_cpu as compiled  # type: ignore[no-redef]  # numba takes a moment to import
    compiled.update(p, grad, mean, variance, hyper, copy)


def update_pieces(p: Tensor, grads: Sequence[Tensor], mean: Tensor, variance: Tensor, hyper: Hyper, copy: Tensor | None = None) -> None:
    """``update`` with a gradient in pieces: flat tensors of one dtype, as many elements together as p. On a GPU that is one launch, however many there are."""
    if p.is_cuda and len(grads) > 1 and not _chosen:
        from train.optimizer import adamw_kernel

        adamw_kernel.update_pieces(p, grads, mean, variance, hyper, copy)
        return
    start = 0
    for grad in grads:
        place = slice(start, start + grad.numel())
        update(p[place], grad, mean[place], variance[place], hyper, None if copy is None else copy[place])
        start = place.stop
