"""Distances between two sets of pictures by features, of kinds that say something from a thousand pictures on. Shapes: N pictures, D features, P projections.

The Fréchet distance is too large for few pictures; ``frechet_unbiased`` extrapolates it to infinitely many (Chong and Forsyth 2020). The squared maximum mean
discrepancy (the form of CMMD, Jayasumana et al. 2024) has no such bias, and the sliced Wasserstein distance compares sorted projections. What each gives for
two halves of the same real pictures says how small a distance can be seen at all.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.evaluation.frechet import frechet_distance

_PROJECTIONS = 512
_SIZES = 5
_DRAWN_ANEW = 2000
"""Samples of the bootstrap."""
FEWEST = 16
"""Below so many pictures nothing is extrapolated."""


def distances(drawn_ND: Tensor, real_ND: Tensor, seed: int) -> dict[str, float]:
    """All distances between two sets, of at least two pictures each."""
    found = {
        "frechet": frechet(drawn_ND, real_ND),
        "mmd2": mmd2(drawn_ND, real_ND, bandwidth(real_ND)),
        "sliced_wasserstein": sliced_wasserstein(drawn_ND, real_ND, seed),
    }
    if min(len(drawn_ND), len(real_ND)) >= FEWEST:
        found["frechet_unbiased"] = frechet_unbiased(drawn_ND, real_ND, seed)
    return found


def halves(real_ND: Tensor, seed: int) -> dict[str, float]:
    """The distances between two random halves of the real pictures: what a perfect model would get with half as many."""
    order_N = torch.from_numpy(np.random.default_rng(seed).permutation(len(real_ND)))
    half = len(real_ND) // 2
    return distances(real_ND[order_N[:half]], real_ND[order_N[half : 2 * half]], seed)


def frechet(a_ND: Tensor, b_ND: Tensor) -> float:
    """The Fréchet distance. For fewer pictures than features tr (C_a C_b)^1/2 is the sum of singular values of a matrix of pictures by pictures."""
    (a_centred, mean_a), (b_centred, mean_b) = _centred(a_ND), _centred(b_ND)
    if min(len(a_ND), len(b_ND)) > a_ND.shape[1]:
        return frechet_distance(*((mean_D.numpy(), (part.T @ part).numpy()) for part, mean_D in ((a_centred, mean_a), (b_centred, mean_b))))
    cross = torch.linalg.svdvals(a_centred @ b_centred.T).sum()
    return float((mean_a - mean_b).square().sum() + a_centred.square().sum() + b_centred.square().sum() - 2 * cross)


def _centred(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Features minus their mean, divided so that the matrix times itself is the unbiased covariance; and the mean."""
    mean_D = x_ND.double().mean(0)
    return (x_ND.double() - mean_D) / (len(x_ND) - 1) ** 0.5, mean_D


def frechet_unbiased(a_ND: Tensor, b_ND: Tensor, seed: int) -> float:
    """The Fréchet distance at infinitely many pictures: its bias falls as 1/N, so a line is fitted to its values at several N."""
    rng = np.random.default_rng(seed)
    most = min(len(a_ND), len(b_ND))
    sizes = [int(size) for size in np.linspace(most // 2, most, _SIZES)]
    values = []
    for size in sizes:
        some = [x_ND[torch.from_numpy(rng.permutation(len(x_ND))[:size])] for x_ND in (a_ND, b_ND)]
        values.append(frechet(*some))
    _, at_infinity = np.polyfit(1 / np.array(sizes), values, 1)
    return float(at_infinity)


def bandwidth(real_ND: Tensor) -> float:
    """Width of the kernel: the median distance between real pictures."""
    return float(torch.pdist(real_ND.double()).median().clamp(min=1e-12))


def mmd2(a_ND: Tensor, b_ND: Tensor, width: float) -> float:
    """Unbiased estimate of the squared maximum mean discrepancy with a Gaussian kernel; may be negative, and is 0 in the mean for equal distributions."""

    def kernel(x_ND: Tensor, y_ND: Tensor) -> Tensor:
        return torch.exp(-torch.cdist(x_ND.double(), y_ND.double()).square() / (2 * width**2))

    inside = 0.0
    for x_ND in (a_ND, b_ND):
        k_NN = kernel(x_ND, x_ND)
        inside += float((k_NN.sum() - k_NN.diagonal().sum()) / (len(x_ND) * (len(x_ND) - 1)))
    return inside - 2 * float(kernel(a_ND, b_ND).mean())


def sliced_wasserstein(a_ND: Tensor, b_ND: Tensor, seed: int) -> float:
    """Root mean square difference of sorted projections on random directions, of as many pictures of each set as the smaller one has."""
    most, rng = min(len(a_ND), len(b_ND)), np.random.default_rng(seed)
    direction_DP = torch.from_numpy(rng.standard_normal((a_ND.shape[1], _PROJECTIONS)))
    direction_DP = direction_DP / direction_DP.norm(dim=0)
    sorted_a, sorted_b = ((x_ND[:most].double() @ direction_DP).sort(0).values for x_ND in (a_ND, b_ND))
    return float((sorted_a - sorted_b).square().mean().sqrt())


def recalls(image_ND: Tensor, text_ND: Tensor, ks: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
    """Share of captions whose own picture is among the k nearest of all pictures, for unit embeddings; 1/N at k = 1 is chance."""
    above_N = nearer(image_ND, text_ND)
    return {f"recall_at_{k}": float((above_N < k).double().mean()) for k in ks}


def interval(values_M: NDArray[np.float64], seed: int = 0) -> tuple[float, float]:
    """95 % of the means of captions that are drawn anew, with replacement, lie between these."""
    chosen = np.random.default_rng(seed).integers(0, len(values_M), (_DRAWN_ANEW, len(values_M)))
    low, high = np.percentile(values_M[chosen].mean(1), (2.5, 97.5))
    return float(low), float(high)


def nearer(image_ND: Tensor, text_ND: Tensor) -> Tensor:
    """How many pictures are nearer to each caption than its own is, [N]. One that is equally near counts by half, so that equal pictures do not look found."""
    scores_NN = text_ND.double() @ image_ND.double().T
    own_N1 = scores_NN.diagonal()[:, None]
    return (scores_NN > own_N1).sum(1) + ((scores_NN == own_N1).sum(1) - 1) / 2


def quantiles(values_N: NDArray[np.float64]) -> dict[str, float]:
    """Those that describe distances to the nearest training images."""
    return {name: float(np.quantile(values_N, share)) for name, share in (("least", 0), ("p01", 0.01), ("p10", 0.1), ("median", 0.5))}
