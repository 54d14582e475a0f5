"""Autograd's backward pass, walked in Python: its engine asks the CUDA driver for streams, and a machine without one has none to give.

Every formula is autograd's own: a node of the graph is called as the engine calls it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction


@torch.no_grad()
def backward(self: Tensor, gradient: Tensor | None = None, **_: Any) -> None:
    """In place of ``Tensor.backward``: gradients of leaves are added to their ``grad``, after their hooks."""
    root = self.grad_fn
    assert root is not None, "nothing here requires a gradient"
    held: dict[Any, dict[int, Tensor]] = {root: {self.output_nr: torch.ones_like(self) if gradient is None else gradient}}
    for node in _order(root):
        given = held.pop(node, None)
        if given is None:
            continue
        if hasattr(node, "variable"):
            _accumulate(node.variable, given[0])
            continue
        for (following, place), grad in zip(node.next_functions, _called(node, given), strict=False):
            if following is None or grad is None:
                continue
            fitting, slots = _as_input(grad, following._input_metadata[place]), held.setdefault(following, {})
            slots[place] = fitting if place not in slots else slots[place] + fitting


def _order(root: Any) -> list[Any]:
    """Nodes, each before all that it leads to."""
    seen, done, stack = {root}, [], [(root, iter(root.next_functions))]
    while stack:
        node, following = stack[-1]
        for found, _ in following:
            if found is not None and found not in seen:
                seen.add(found)
                stack.append((found, iter(found.next_functions)))
                break
        else:
            done.append(node)
            stack.pop()
    return done[::-1]


def _called(node: Any, given: dict[int, Tensor]) -> tuple[Tensor | None, ...]:
    inputs = node._input_metadata
    grads: list[Tensor | None] = [given.get(place) for place in range(len(inputs))]
    if isinstance(node, BackwardCFunction):  # a Function of Python: what nothing depended on comes as zeros
        grads = [torch.zeros(m.shape, dtype=m.dtype, device=m.device) if g is None else g for g, m in zip(grads, inputs, strict=True)]
        found = node.apply(*grads)  # type: ignore[attr-defined]
    else:
        found = node(*grads)
    return found if isinstance(found, tuple) else (found,)


def _as_input(grad: Tensor, wanted: Any) -> Tensor:
    """Reduced over what was broadcast, and in the dtype of the forward pass, as the engine does it."""
    if grad.device != wanted.device:
        raise RuntimeError(f"a gradient on {grad.device} of a tensor on {wanted.device}")
    fitting = grad if grad.shape == wanted.shape else grad.sum_to_size(wanted.shape)
    return fitting if fitting.dtype == wanted.dtype else fitting.to(wanted.dtype)


def _accumulate(leaf: Tensor, grad: Tensor) -> None:
    for hook in (leaf._backward_hooks or {}).values():
        changed = hook(grad)
        grad = grad if changed is None else changed
    leaf.grad = grad if leaf.grad is None else leaf.grad + grad
