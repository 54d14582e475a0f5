"""Optimizers of torch for programs that never compile them: without its compiler, whose import takes each rank 1.3 s of a core.

torch marks methods of its optimizers as not to be compiled, and imports the compiler to say so when one is called first. ``inspect.unwrap`` gives the method
below such a mark, and the method itself where a version of torch has none.
"""

from __future__ import annotations

import inspect

import torch


class Optimizer(torch.optim.Optimizer):
    """The base of our own optimizers."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)


class AdamW(Optimizer, torch.optim.AdamW):
    """torch's AdamW; its step has no gradient of its own, as there."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))  # type: ignore[assignment]
