"""The engine of replicated models (torch DDP)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from infra.world import World
from train.engines.protocol import Update
from train.optimizer.averaging import Average
from train.optimizer.loss_scale import LossScale
from train.weights.fragments import Fragment, even_slice


def decay_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups: matrices decay, gains and biases do not."""
    parameters = list(named)
    return [
        {"params": [p for _, p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for _, p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]


WRITERS = 8
"""Replicas that write a part of a checkpoint each: every one reads all parts as it restores, so that more would cost requests by the square of the ranks."""


def writers_cut(world: World) -> tuple[int, int]:
    """The part of each tensor that a rank writes, and into how many they are cut; the part after the last, which is empty, for ranks that write nothing."""
    return min(world.rank, WRITERS), min(world.size, WRITERS)


class ReplicatedEngine:
    """torch DDP with AdamW: every rank holds the whole model."""

    def __init__(
        self,
        module: nn.Module,
        world: World,
        *,
        betas: tuple[float, float],
        weight_decay: float,
        ema: float,
        ema_every: int = 1,
        clip_norm: float = float("inf"),
        loss_scale: LossScale | None = None,
        after_step: Callable[[], None] | None = None,
    ) -> None:
        """
        Args:
            after_step: called after each applied update, before the average sees it: brings parameters that have bounds back within them.
        """
        self.after_step = after_step
        self.module, self.world, self.clip_norm, self.loss_scale = module, world, clip_norm, loss_scale
        # A 1x1 convolution's gradient has other strides than DDP's bucket; the copy is of no weight, the warning on every rank is.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        # DDP lays its buckets out anew after an attempt's first update, and from three ranks on the place in a bucket decides the order of a sum: a run
        # that was interrupted would end with other bits. A search for unused parameters keeps the first layout; there are none, and it says so.
        warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
        fixed = {"gradient_as_bucket_view": True, "find_unused_parameters": world.size > 2}
        self._replica = DistributedDataParallel(module, **fixed) if world.size > 1 else module
        groups = [group for group in decay_groups(module.named_parameters(), weight_decay) if group["params"]]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=1e-8, fused=True)
        self.average = Average(module.named_parameters(), ema, ema_every)
        self.updates = 0
        self._norm: Tensor | None = None

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        return self._replica(*inputs, **named)

    def micro_batch(self, *, last: bool) -> None:
        """Tell DDP whether to reduce in the coming backward pass; it decides in the forward pass."""
        if isinstance(self._replica, DistributedDataParallel):
            self._replica.require_backward_grad_sync = last

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients. DDP averages over ranks, and shares of a global mean must sum."""
        (loss * (self.world.size * self._scale)).backward()

    def measure(self) -> Tensor:
        """The global norm of the gradients, float64 [1]. It is alike on all ranks, so their sum is a multiple of it, which float64 holds exactly. After the
        first call of an update the gradients are without the loss scale."""
        if self._norm is None:
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            if self.loss_scale is not None:
                torch._foreach_mul_(gradients, 1 / self._scale)
            self._norm = nn.utils.get_total_norm(gradients)
        return self._norm.double().reshape(1)

    def step(self, lr: float, measured: Sequence[float] | None = None) -> Update:
        """Apply the update, unless a gradient is not finite (every rank sees the same reduced gradients).

        Args:
            lr: step size.
            measured: the sum of ``measure`` over all ranks; without it, this rank waits for its own.
        """
        own = self.measure()
        norm = own.item() if measured is None else measured[0] / self.world.size
        assert self._norm is not None
        nn.utils.clip_grads_with_norm_(self.module.parameters(), self.clip_norm, self._norm)
        self._norm = None
        applied = norm < float("inf")  # False for NaN too
        overflow = self.loss_scale is not None and self.loss_scale.update(finite=applied)
        if applied:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            if self.after_step is not None:
                self.after_step()
            self.updates += 1
            self.average.update(self.updates)
        self.optimizer.zero_grad(set_to_none=True)
        return Update(applied, norm, overflow)

    @property
    def _scale(self) -> float:
        return 1.0 if self.loss_scale is None else self.loss_scale.value

    def fragments(self, *, to_load: bool) -> dict[str, Fragment]:
        """Every tensor whole to load into; to save, this rank's even slice, so that ranks share the writing."""
        self._make_moments()
        found: dict[str, Tensor] = {}
        for name, parameter in self.module.named_parameters():
            found[f"model/{name}"] = parameter.detach()
            found[f"average/{name}"] = self.average.values[name]
            for moment in ("exp_avg", "exp_avg_sq"):
                found[f"optimizer/{moment}/{name}"] = self.optimizer.state[parameter][moment]
        cut = (0, 1) if to_load else writers_cut(self.world)
        return {name: even_slice(tensor, *cut) for name, tensor in found.items()}

    def loaded(self, updates: int) -> None:
        """Finish a restore: the number of applied updates, for Adam's bias correction."""
        self.updates = updates
        for state in self.optimizer.state.values():
            state["step"].fill_(float(updates))

    def _make_moments(self) -> None:
        """Zeros where no update has been applied yet."""
        for parameter in self.module.parameters():
            if not self.optimizer.state.get(parameter):
                self.optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def global_counts(counts: dict[str, int], device: torch.device) -> dict[str, Tensor]:
    """Sum integer counts over ranks, the denominators of an update (docs/contracts.md, section 5), as 0-dimensional tensors (int64) on the device: nobody waits
    for them."""
    vector = torch.tensor(list(counts.values()), dtype=torch.int64).to(device, non_blocking=True)
    if dist.is_initialized():
        dist.all_reduce(vector)
    return dict(zip(counts, vector.unbind(), strict=True))
