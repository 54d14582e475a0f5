"""Muon for block matrices (Jordan et al. 2024, kellerjordan.github.io/posts/muon), AdamW for everything else.

The update of a matrix is its momentum, made orthogonal by five steps of a Newton-Schulz iteration and 0.2 sqrt(max(rows, columns)) times as large, so that step
sizes and decay of AdamW fit it too (Liu et al. 2025, arXiv 2502.16982, section 2.2). An optimizer of shards has no whole matrices: before the step, the engine
replaces their gradients by these updates (train/engines/zero/whole_matrices.py), which ``Muon`` then subtracts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from train.optimizer.adamw import PaperAdamW, check_lengths
from train.optimizer.muon_schedule import STEPS
from train.optimizer.number_formats import SIGNED_169
from train.optimizer.protocol import ShardGroup

_A, _B, _C = 3.4445, -4.7750, 2.0315
"""Coefficients of a step: of x, x^3 and x^5 for each singular value x. They enlarge small ones most, and settle between 0.7 and 1.2 instead of at 1."""
_SMALLEST_NORM = 1e-15
"""A matrix of a smaller norm is not enlarged to norm 1. Its square still is a normal number of fp32."""
_CHUNK = 1 << 20
"""Elements of a momentum that are computed at a time, which bounds what that holds."""


def orthogonalised(matrix: Tensor) -> Tensor:
    """The matrix U V^T nearly, where U S V^T is its singular value decomposition. In the dtype of the matrix; its norm is computed in fp32."""
    x = matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / torch.linalg.vector_norm(x, dtype=torch.float32).clamp_min(_SMALLEST_NORM)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=_B, alpha=_C), x, beta=_A)
    return x.mT if matrix.shape[0] > matrix.shape[1] else x


def update_of(direction: Tensor) -> Tensor:
    """What is subtracted of a matrix with step size 1, in the dtype of its momentum's direction."""
    return orthogonalised(direction).mul_(0.2 * math.sqrt(max(direction.shape)))


def advance(gradient: Tensor, factor: float, momentum: Tensor, decay: float, direction: Tensor | None) -> None:
    """Move a momentum on by a gradient, both flat and equally long, and write Nesterov's direction: the gradient and the momentum in parts of 1 - decay and decay.

    Args:
        factor: the gradient is multiplied by it first.
        momentum: float32, or int16 in the format 1-6-9; changed in place.
        direction: None where it is not needed.
    """
    for start in range(0, gradient.numel(), _CHUNK):
        place = slice(start, start + _CHUNK)
        g, kept = gradient[place].float() * factor, momentum[place]
        packed = kept.dtype == torch.int16
        mean = (SIGNED_169.decode(kept) if packed else kept).lerp_(g, 1.0 - decay)
        if packed:
            kept.copy_(SIGNED_169.encode(mean))
        if direction is not None:
            direction[place] = g.lerp_(mean, decay)


class Muon(PaperAdamW):
    """See the module's docstring. Implements ``train.optimizer.protocol.OnePassOptimizer``.

    The state of block matrices is ``momentum``: float32, or for packed groups int16 in the format 1-6-9.
    """

    def __init__(
        self, groups: Iterable[ShardGroup], *, betas: tuple[float, float], momentum: float, eps: float = 1e-8, clip_variance: float | None = 5.0
    ) -> None:
        """Raises: ValueError: no groups."""
        super().__init__(groups, betas=betas, eps=eps, clip_variance=clip_variance)
        self.momentum = momentum

    def state_names(self, group: ShardGroup) -> tuple[str, ...]:
        """See the protocol."""
        return ("momentum",) if group["orthogonal"] else super().state_names(group)

    @torch.no_grad()
    def apply(self, group: ShardGroup, p: Tensor, grads: Sequence[Tensor], copy: Tensor | None = None) -> None:
        """See the protocol. What stands in place of gradients of block matrices is their update. Raises: ValueError: the gradients do not have as many elements as
        p."""
        if group["skip"] or not group["orthogonal"]:
            super().apply(group, p, grads, copy)
            return
        check_lengths(p, grads)
        start, whole = 0, p.detach().view(-1)
        for grad in grads:
            place = slice(start, start + grad.numel())
            whole[place].mul_(1.0 - group["lr"] * group["weight_decay"]).sub_(grad, alpha=group["lr"])
            if copy is not None:
                copy[place] = whole[place]
            start = place.stop

    def moments(self, group: ShardGroup, p: Tensor) -> dict[str, Tensor]:
        """See the protocol."""
        if not group["orthogonal"]:
            return super().moments(group, p)
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p, dtype=torch.int16 if group["packed"] else torch.float32, requires_grad=False)
        return state
