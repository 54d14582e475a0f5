"""Logits and cross-entropy in fp32, computed in chunks of rows (paper D.2), so that at most one copy of the logits is in memory.

The three matrix products may read bf16 copies of their operands instead, as GPT-style trainers do under autocast; all else stays fp32.

N positions, D width, V vocabulary, R rows of a chunk.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.starts import normal_

_CHUNK_ELEMENTS = {"cpu": 1 << 21}
_LARGE_CHUNK_ELEMENTS = 1 << 26
"""Number of fp32 logits in a chunk: on a CPU about the size of its cache, elsewhere enough to keep the device busy."""


def chunk_rows(vocab: int, device_type: str) -> int:
    """Number of rows in a chunk."""
    return max(1, _CHUNK_ELEMENTS.get(device_type, _LARGE_CHUNK_ELEMENTS) // vocab)


def _chunks(rows: int, vocab: int, device_type: str) -> Iterator[slice]:
    step = chunk_rows(vocab, device_type)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _bf16_product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of bf16 operands. A GPU returns fp32; a CPU cannot, and rounds to bf16."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else torch.mm(a, b)


def _product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """``a @ b`` as fp32, of operands that are both fp32 or both bf16."""
    if a.dtype == torch.float32:
        return torch.mm(a, b, out=out)
    product = _bf16_product(a, b)
    return product.float() if out is None else out.copy_(product)


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """Add ``a @ b`` to an fp32 sum, which is not read if this is its first term: the largest matrix need not be filled with zeros."""
    if a.dtype == torch.float32:
        total.addmm_(a, b, beta=0 if first else 1)
    elif first:
        _product(a, b, out=total)
    else:
        total.add_(_bf16_product(a, b))


class _CrossEntropy(torch.autograd.Function):
    """See cross_entropy."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, keeps_logits: bool, z_loss: float, products: torch.dtype) -> Tensor:
        rows, vocab = len(x_ND), len(weight_VD)
        kept_NV = x_ND.new_empty(rows, vocab) if keeps_logits else None
        log_sum_N, nll_N = x_ND.new_empty(rows), x_ND.new_empty(rows)
        read_VD = weight_VD.to(products)
        for part in _chunks(rows, vocab, x_ND.device.type):
            logits_RV = _product(x_ND[part].to(products), read_VD.t(), None if kept_NV is None else kept_NV[part])
            log_sum_N[part] = logits_RV.logsumexp(1)
            nll_N[part] = log_sum_N[part] - logits_RV.gather(1, targets_N[part, None])[:, 0]
            del logits_RV  # before the next chunk is made
        ctx.z_loss, ctx.products = z_loss, products
        ctx.save_for_backward(x_ND, weight_VD, targets_N, log_sum_N, *([] if kept_NV is None else [kept_NV]))
        return nll_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        x_ND, weight_VD, targets_N, log_sum_N, *kept = ctx.saved_tensors
        read_VD = weight_VD.to(ctx.products)
        grad_x_ND = torch.empty_like(x_ND)
        grad_weight_VD = torch.empty_like(weight_VD) if len(x_ND) else torch.zeros_like(weight_VD)
        # d (nll + z log_sum^2) / d logits = (1 + 2 z log_sum) softmax - one-hot, times the incoming gradient.
        softmax_N = grads[0] * (1 + 2 * ctx.z_loss * log_sum_N) if ctx.z_loss else grads[0]
        for part in _chunks(len(x_ND), len(weight_VD), x_ND.device.type):
            x_RD = x_ND[part].to(ctx.products)
            logits_RV = kept[0][part] if kept else _product(x_RD, read_VD.t())
            grad_RV = logits_RV.sub(log_sum_N[part, None]) if kept else logits_RV.sub_(log_sum_N[part, None])
            grad_RV = grad_RV.exp_().mul_(softmax_N[part, None])
            grad_RV.scatter_add_(1, targets_N[part, None], -grads[0][part, None])
            grad_RV = grad_RV.to(ctx.products)
            _product(grad_RV, read_VD, grad_x_ND[part])
            _add_product(grad_weight_VD, grad_RV.t(), x_RD, first=not part.start)
            del logits_RV, grad_RV
        return grad_x_ND, grad_weight_VD, None, None, None, None


def cross_entropy(
    x_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, keeps_logits: bool, z_loss: float = 0.0, products: torch.dtype = torch.float32
) -> Tensor:
    """Negative log-likelihood in nats of each target under the logits ``x @ weight.T``, fp32 [N].

    Args:
        x_ND: states, fp32.
        weight_VD: the unembedding, fp32.
        targets_N: int64, 0 to V - 1.
        keeps_logits: keep the logits, fp32 [N, V], from the forward to the backward pass. Otherwise only a chunk of them is in memory at a time, and the backward
            pass computes them again.
        z_loss: the gradient is that of nll + z_loss * (logarithm of the softmax's denominator)^2, which keeps logits from drifting; the result is the nll alone.
        products: float32, or bfloat16: the matrix products of both passes read operands that are rounded to it.
    """
    nll_N: Tensor = _CrossEntropy.apply(x_ND, weight_VD, targets_N, keeps_logits and torch.is_grad_enabled(), z_loss, products)
    return nll_N


class Unembedding(nn.Module):
    """Maps states to fp32 logits, or to the cross-entropies of targets. The weight, (vocabulary, D), is not tied to the embedding, and there is no bias.

    ``z_loss`` and ``products`` are those of ``cross_entropy``; in ``eval()``, as for logits, products are fp32.
    """

    def __init__(self, width: int, vocab: int, variance: float, z_loss: float = 0.0, products: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.z_loss, self.products = z_loss, products
        self.weight = nn.Parameter(torch.empty(vocab, width))
        normal_(self.weight, math.sqrt(variance / width))

    def forward(self, x_BPD: Tensor, targets_BP: Tensor | None = None, keeps_logits: bool = True) -> Tensor:
        """Logits fp32 [..., V] of states [..., D]; if targets int64 [B, P] are given, their cross-entropies, fp32 [B, P] (see ``cross_entropy``)."""
        if targets_BP is None:
            return F.linear(x_BPD, self.weight)
        products = self.products if self.training else torch.float32
        nll_N = cross_entropy(
            x_BPD.flatten(0, 1), self.weight, targets_BP.flatten(), keeps_logits=keeps_logits, z_loss=self.z_loss, products=products
        )
        return nll_N.view_as(targets_BP)
