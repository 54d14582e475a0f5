"""In place of DeepSpeed, for one process: parameters, flat shards and gradients as stage 3 keeps them, so that our half of the engine runs where DeepSpeed cannot."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from train.engines.zero import internals


class _Optimizer:
    """What train/engines/zero/ reads of stage 3's optimizer."""

    def __init__(self, rule: Any) -> None:
        self.optimizer, self.overflow = rule, False
        self.ipg_buckets: dict[Any, Any] = {}
        self.fp16_groups: list[list[Any]] = [list(group["params"]) for group in rule.param_groups]
        self.sub_group_to_group_id = {index: index for index in range(len(self.fp16_groups))}
        self.fp32_partitioned_groups_flat, self.fp16_partitioned_groups_flat = [], []
        for group, params in zip(rule.param_groups, self.fp16_groups, strict=True):
            flat = torch.cat([p.detach().flatten() for p in params])
            self.fp16_partitioned_groups_flat.append(flat)
            self.fp32_partitioned_groups_flat.append(flat.detach().float().clone().requires_grad_())
            group["params"] = [self.fp32_partitioned_groups_flat[-1]]
            for p in params:
                p.ds_tensor, p.ds_shape, p.ds_numel = p.data, p.shape, p.numel()
                p.partition_numel = p.numel
        self.averaged_gradients: dict[int, list[Tensor] | None] = {}
        self.persistent_parameters: list[Any] = []

    def reduce(self) -> None:
        """What the backward pass leaves: fp32 gradients of this rank's shards, added up."""
        for index, params in enumerate(self.fp16_groups):
            grads = [p.grad.flatten().float() for p in params]
            held = self.averaged_gradients.get(index)
            self.averaged_gradients[index] = grads if held is None else [a + b for a, b in zip(held, grads, strict=True)]
            for p in params:
                p.grad = None

    def _unflatten_partitioned_parameters(self, index: int) -> None:
        flat, start = self.fp16_partitioned_groups_flat[index], 0
        with torch.no_grad():
            for p in self.fp16_groups[index]:
                p.copy_(flat[start : start + p.numel()].view_as(p))
                start += p.numel()

    def _reassign_or_swap_out_partitioned_parameters(self, index: int) -> None:
        self.fp16_partitioned_groups_flat[index].copy_(self.fp32_partitioned_groups_flat[index].detach())
        self._unflatten_partitioned_parameters(index)

    def __getattr__(self, name: str) -> Any:
        if name in ("_partition_all_parameters", "invalidate_secondary_tensor", "_prepare_fp32_grad_for_sub_group", "_optimizer_step"):
            return lambda *_: None
        raise AttributeError(name)


class _Engine:
    def __init__(self, model: nn.Module, optimizer: _Optimizer, config: dict[str, Any]) -> None:
        self.model, self.optimizer = model, optimizer
        self._each, self._count = config["gradient_accumulation_steps"], 0

    def __call__(self, *inputs: Any) -> Any:
        return self.model(*inputs)

    def is_gradient_accumulation_boundary(self) -> bool:
        return (self._count + 1) % self._each == 0

    def backward(self, loss: Tensor, scale_wrt_gas: bool) -> None:
        loss.backward()
        self.optimizer.reduce()

    def step(self) -> None:
        if self.is_gradient_accumulation_boundary():
            for index in range(len(self.optimizer.fp16_groups)):
                self.optimizer._prepare_fp32_grad_for_sub_group(index)
                self.optimizer._optimizer_step(index)
                self.optimizer._reassign_or_swap_out_partitioned_parameters(index)
        self._count += 1

    def eval(self) -> None:
        self.model.eval()

    def train(self) -> None:
        self.model.train()


@contextmanager
def installed() -> Iterator[None]:
    """Inside, engines are made on the stand-in."""

    def initialize(*, model: nn.Module, optimizer: Any, config: dict[str, Any], **_: Any) -> tuple[Any, ...]:
        made = _Optimizer(optimizer)
        return _Engine(model, made, config), made, None, None

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(internals, "deepspeed", SimpleNamespace(initialize=initialize, __version__=internals.FOLLOWED)))
        stack.enter_context(mock.patch.object(internals, "prepare", lambda topology: None))
        stack.enter_context(mock.patch.object(internals, "check", lambda *_: None))
        yield
