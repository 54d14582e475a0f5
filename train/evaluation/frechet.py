"""Fréchet distance between the features of two sets of pictures (Heusel et al. 2017). Shapes: B batch, D features."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor


class FeatureSums:
    """Sums features and their products over any number of batches and ranks, in float64."""

    def __init__(self, width: int, device: torch.device) -> None:
        self._sums = torch.zeros(width + 1, width, dtype=torch.float64, device=device)
        self._count = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, features_BD: Tensor) -> None:
        """Add the features of a batch."""
        wide_BD = features_BD.double()
        self._sums[0] += wide_BD.sum(0)
        self._sums[1:].addmm_(wide_BD.T, wide_BD)
        self._count += len(wide_BD)

    def moments(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean [D] and unbiased covariance [D, D] over all ranks. Collective.

        Raises:
            ValueError: fewer than two pictures were added.
        """
        sums, count = self._sums.clone(), self._count.clone()
        if dist.is_initialized():
            dist.all_reduce(sums)
            dist.all_reduce(count)
        n = float(count)
        if n < 2:
            raise ValueError(f"{n:.0f} pictures: a covariance needs at least two")
        mean_D = sums[0] / n
        covariance_DD = (sums[1:] - n * torch.outer(mean_D, mean_D)) / (n - 1)
        return mean_D.cpu().numpy(), covariance_DD.cpu().numpy()


def frechet_distance(a: tuple[NDArray[np.float64], NDArray[np.float64]], b: tuple[NDArray[np.float64], NDArray[np.float64]]) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^1/2) of two pairs (mean, covariance). For few pictures the result is too large, so compare only distances that
    were measured with equally many."""
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    root_a = _root(cov_a)
    # C_a C_b and root_a C_b root_a have the same eigenvalues, and the second is symmetric.
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root_a @ cov_b @ root_a), 0, None)).sum()
    return float(np.square(mean_a - mean_b).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def _root(covariance: NDArray[np.float64]) -> NDArray[np.float64]:
    values, vectors = np.linalg.eigh(covariance)
    root: NDArray[np.float64] = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    return root
