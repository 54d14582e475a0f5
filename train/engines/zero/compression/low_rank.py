"""The algorithm on tensors: batches of error matrices E [n, rows, cols] with rows <= cols, each with a fixed Gaussian Q0 [n, cols, rank] (paper E.2).

    P = E Q0, summed over machines; P <- its orthonormal columns; Q = E^T P, summed over machines; D = P Q^T; E <- E - D / machines

Since Q is a sum over machines (for P any multiple of the sum would do), D is the projection of the sum of all E, and the sum of all E decreases by exactly D. All
in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPSILON = 1e-6
"""This multiple of the identity is added to P, in units of P's largest element. (In the paper P is multiplied by a constant, which is not given.)"""
_TINY = torch.finfo(torch.float32).tiny


def gaussian(cols: int, rank: int, seed: int) -> Tensor:
    """Q0 of one matrix, [cols, rank], on the CPU: the same on every machine."""
    return torch.randn(cols, rank, generator=torch.Generator().manual_seed(seed))


def sketch(matrices: Tensor, probes: Tensor) -> Tensor:
    """Products with Gaussian vectors, [n, rows, k], of which ``squares`` tells the norms. They can be summed over machines, as P can.

    Args:
        probes: [n, cols, k], independent of the matrices: what an error consists of is to a large part orthogonal to Q0.
    """
    return torch.bmm(matrices, probes)


def squares(sketches: Tensor) -> Tensor:
    """Estimates of the squared norms of matrices, [n], float64, unbiased. The standard error is at most sqrt(2 / k) of the value, reached by matrices of rank 1."""
    return sketches.double().square().sum((1, 2)) / sketches.shape[-1]


def left(errors: Tensor, q0: Tensor) -> Tensor:
    """P of one machine, [n, rows, rank]."""
    return torch.bmm(errors, q0)


def orthonormal(p: Tensor) -> Tensor:
    """Orthonormal columns with the span of P's columns, by Householder reflections; for P = 0, the first columns of the identity."""
    scaled = p / p.abs().amax((-2, -1), keepdim=True).clamp(min=_TINY)
    scaled.diagonal(dim1=-2, dim2=-1).add_(EPSILON)
    return torch.linalg.qr(scaled).Q


def right(errors: Tensor, p: Tensor) -> Tensor:
    """Q of one machine, [n, cols, rank]."""
    return torch.bmm(errors.mT, p)


def product(p: Tensor, q: Tensor) -> Tensor:
    """D, [n, rows, cols]."""
    return torch.bmm(p, q.mT)


def refreshed(errors: Tensor, rank: int) -> Tensor:
    """Q0 from the sum of all machines' errors: their largest right singular vectors, [n, cols, rank] (PowerSGD+, arXiv 2509.11254)."""
    return torch.linalg.svd(errors, full_matrices=False).Vh[:, :rank].mT.contiguous()
