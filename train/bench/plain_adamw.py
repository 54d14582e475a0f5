"""The same update in torch's operations: a dozen passes over chunks that fit into a cache. The compiled update on a CPU is compared with it, and gives the same bits."""

from __future__ import annotations

from torch import Tensor

from train.optimizer.adamw import Hyper
from train.optimizer.number_formats import SIGNED_169, UNSIGNED_0610

CHUNK = 1 << 16
"""Number of elements handled at a time: two to four times as fast as whole tensors."""


def update(p: Tensor, grad: Tensor, mean: Tensor, variance: Tensor, hyper: Hyper, copy: Tensor | None = None) -> None:
    """See ``train.optimizer.adamw.update``."""
    given = (p, grad, mean, variance) if copy is None else (p, grad, mean, variance, copy)
    # The copy, too, is written chunk by chunk.
    for chunks in zip(*(t.detach().view(-1).split(CHUNK) for t in given), strict=True):
        _chunk(chunks[0], chunks[1], chunks[2], chunks[3], hyper)
        if copy is not None:
            chunks[4].copy_(chunks[0])


def _chunk(p: Tensor, grad: Tensor, mean: Tensor, variance: Tensor, hyper: Hyper) -> None:
    packed = not mean.is_floating_point()
    g = grad.float() * hyper.factor
    m = SIGNED_169.decode(mean) if packed else mean
    v = UNSIGNED_0610.decode(variance) if packed else variance
    m.lerp_(g, 1 - hyper.beta1)
    v.mul_(hyper.beta2).addcmul_(g, g, value=1 - hyper.beta2).clamp_(max=hyper.clip_variance)
    denominator = v.sqrt().mul_(hyper.correction2**-0.5).add_(hyper.eps)
    p.mul_(1 - hyper.lr * hyper.weight_decay).addcdiv_(m, denominator, value=-hyper.lr / hyper.correction1)
    if packed:
        mean.copy_(SIGNED_169.encode(m))
        variance.copy_(UNSIGNED_0610.encode(v))
