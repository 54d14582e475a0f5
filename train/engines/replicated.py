"""The training engine for replicated models (torch DDP)."""

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
from train.optimizer.uncompiled import AdamW
from train.weights.fragments import Fragment, even_slice


def decay_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups: matrices, which have weight decay, and gains and biases, which have none."""
    parameters = list(named)
    return [
        {"params": [p for _, p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for _, p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]


WRITERS = 8
"""How many ranks write a part of a checkpoint. When restoring, every rank reads all parts; if all ranks wrote one, the requests would grow with their square."""


def writers_cut(world: World) -> tuple[int, int]:
    """(part, number of parts): the part of each tensor that a rank writes. Ranks that write nothing get the part after the last one, which is empty."""
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
            after_step: called after each applied update and before the average is updated, to bring parameters back within their bounds.
        """
        self.after_step = after_step
        self.module, self.world, self.clip_norm, self.loss_scale = module, world, clip_norm, loss_scale
        # The gradient of a 1x1 convolution has other strides than DDP's bucket. The copy is cheap, but the warning would appear on every rank.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        # DDP rebuilds its buckets after the first update of a process, and with three or more ranks the place in a bucket decides the order of a sum, so an
        # interrupted run would end with other bits. Searching for unused parameters prevents that; there are none, and DDP warns about it.
        warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")
        fixed = {"gradient_as_bucket_view": True, "find_unused_parameters": world.size > 2}
        self._replica = DistributedDataParallel(module, **fixed) if world.size > 1 else module
        groups = [group for group in decay_groups(module.named_parameters(), weight_decay) if group["params"]]
        self.optimizer = AdamW(groups, lr=0.0, betas=betas, eps=1e-8, fused=True)
        self.average = Average(module.named_parameters(), ema, ema_every)
        self.updates = 0
        self._norm: Tensor | None = None

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        return self._replica(*inputs, **named)

    def micro_batch(self, *, last: bool) -> None:
        """Tell DDP whether to reduce gradients in the coming backward pass, which it decides in the forward pass."""
        if isinstance(self._replica, DistributedDataParallel):
            self._replica.require_backward_grad_sync = last

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients. DDP averages over ranks, but shares of a global mean must be summed, so the loss is multiplied by the number of ranks."""
        (loss * (self.world.size * self._scale)).backward()

    def measure(self) -> Tensor:
        """The global norm of the gradients, float64 [1]. It is the same on all ranks, so the sum over ranks is a multiple of it, which float64 holds exactly. The
        first call in an update also divides the gradients by the loss scale."""
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
            measured: the sum of ``measure`` over all ranks; without it, this rank waits for its own norm.
        """
        own = self.measure()
        norm = own.item() if measured is None else measured[0] / self.world.size
        assert self._norm is not None
        nn.utils.clip_grads_with_norm_(self.module.parameters(), self.clip_norm, self._norm)
        self._norm = None
        applied = norm < float("inf")  # False for NaN, too
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
        """Whole tensors to load; to save, this rank's even slice of each, so that ranks share the writing."""
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
        """Finish a restore: set the number of applied updates, for Adam's bias correction."""
        self.updates = updates
        for state in self.optimizer.state.values():
            state["step"].fill_(float(updates))

    def _make_moments(self) -> None:
        """Create moments of zeros where no update has been applied yet."""
        for parameter in self.module.parameters():
            if not self.optimizer.state.get(parameter):
                self.optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }


def global_counts(counts: dict[str, int], device: torch.device) -> dict[str, Tensor]:
    """Sum integer counts over ranks: the denominators of an update (docs/contracts.md, section 5). They are 0-dimensional tensors (int64) on the device, so that the
    host does not wait for them."""
    vector = torch.tensor(list(counts.values()), dtype=torch.int64).to(device, non_blocking=True)
    if dist.is_initialized():
        dist.all_reduce(vector)
    return dict(zip(counts, vector.unbind(), strict=True))
