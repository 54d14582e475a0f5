"""Measures how a dVAE reconstructs pictures: both ELBs, reconstructions from discrete and from relaxed codes, use of the codebook. Collective.

Shapes: B batch, N code vocabulary, Y X rows and columns; pictures in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from infra.seeds import derive
from model.config import DVAEConfig
from model.dvae import DVAETerms, pictures
from model.relaxation import GumbelNoise
from train.config import EvaluateSection
from train.evaluation.codes import code_statistics
from train.evaluation.features import FeatureNet, feature_net
from train.evaluation.frechet import FeatureSums, frechet_distance
from train.evaluation.lpips import Lpips
from train.evaluation.pixels import psnr, ssim

SHOWN = 12
"""Number of pictures in the grid of reconstructions."""
_SSIM_SIDE = 11

Forward = Callable[[Tensor, GumbelNoise | None, float], DVAETerms]


def noise_of(seed: int, purpose: Literal["gumbel", "evaluate"], ids: list[str], device: torch.device, *counters: int) -> GumbelNoise:
    """The noise for pictures with these ids. The noise of a picture depends only on (seed, purpose, counters, id) (docs/contracts.md, section 2)."""
    return GumbelNoise([derive(seed, purpose, *counters, name) for name in ids], device)


@dataclass
class Judges:
    """The networks that compare reconstructions with originals. What a missing one would measure is left out."""

    lpips: Lpips | None = None
    net: FeatureNet | None = None

    @classmethod
    def load(cls, section: EvaluateSection, device: torch.device) -> Judges:
        """Load the networks that the configuration names.

        Raises:
            DataError, ConfigError: weights or packages are missing.
        """
        lpips = Lpips.from_files(section.lpips_weights).to(device) if section.lpips_weights else None
        net = None if section.frechet_net == "none" else feature_net(section.frechet_net, section.frechet_weights, device)
        return cls(lpips, net)


@dataclass
class Reconstruction:
    """The metrics and pictures of one evaluation."""

    values: dict[str, float]
    counts_N: Tensor
    """How often each code was chosen, over all ranks."""
    samples: int
    shown: list[list[Tensor]] = field(default_factory=list)
    """Three rows of this rank's pictures [3, Y, X]: originals, reconstructions from discrete codes, reconstructions from relaxed codes."""


@torch.no_grad()
def reconstruct(
    forward: Forward, cfg: DVAEConfig, batches: Iterable[dict[str, Any]], seed: int, tau: float, judges: Judges, device: torch.device
) -> Reconstruction:
    """Measure on ``batches`` of (ids, pixels). The metrics are the same on all ranks.

    ELBs are in nats per pixel value, with beta = 1, for which they bound the likelihood: -(NLL + KL / (3 f^2)). The 'relaxed' one is at temperature tau.
    PSNR, SSIM, LPIPS and the Fréchet distance compare the originals with the reconstructions from discrete codes.
    """
    names = ["images", "nll_true", "nll_relaxed", "kl", "psnr", "psnr_relaxed"]
    names += ["ssim"] if cfg.image_size >= _SSIM_SIDE else []
    names += ["lpips"] if judges.lpips is not None else []
    sums = torch.zeros(len(names), dtype=torch.float64, device=device)
    counts_N = torch.zeros(cfg.vocab, dtype=torch.int64, device=device)
    features = [FeatureSums(judges.net.width, device) for _ in range(2)] if judges.net is not None else []
    shown: list[tuple[Tensor, Tensor, Tensor]] = []
    for batch in batches:
        pixels_B3YX = batch["pixels"].to(device, non_blocking=True, memory_format=torch.channels_last)
        true = forward(pixels_B3YX, None, tau)
        relaxed = forward(pixels_B3YX, noise_of(seed, "evaluate", batch["ids"], device), tau)
        drawn_B3YX, soft_B3YX = pictures(true.stats_B6YX), pictures(relaxed.stats_B6YX)
        rows = [torch.ones_like(true.nll_B), true.nll_B, relaxed.nll_B, true.kl_B, psnr(drawn_B3YX, pixels_B3YX), psnr(soft_B3YX, pixels_B3YX)]
        rows += [ssim(drawn_B3YX, pixels_B3YX)] if "ssim" in names else []
        rows += [judges.lpips(drawn_B3YX, pixels_B3YX)] if judges.lpips is not None else []
        sums += torch.stack([row.double().sum() for row in rows])
        flat = true.codes_BYX.flatten()
        counts_N.scatter_add_(0, flat, torch.ones_like(flat))  # torch.bincount would wait for the GPU in every batch
        for total, some_B3YX in zip(features, (pixels_B3YX, drawn_B3YX), strict=False):
            assert judges.net is not None
            total.add(judges.net.features(some_B3YX))
        if sum(len(part[0]) for part in shown) < SHOWN:
            shown.append((pixels_B3YX, drawn_B3YX, soft_B3YX))
    for part in (sums, counts_N):
        if dist.is_initialized():
            dist.all_reduce(part)
    totals = sums.tolist()
    values = {name: total / max(totals[0], 1.0) for name, total in zip(names, totals, strict=True)}
    samples = int(totals[0])
    del values["images"]
    values |= _elbos(values, cfg.downsample) | code_statistics(counts_N)
    if judges.net is not None:
        values[judges.net.metric] = frechet_distance(*(total.moments() for total in features))
    return Reconstruction(values, counts_N, samples, [list(torch.cat(parts)[:SHOWN]) for parts in zip(*shown, strict=True)])


def _elbos(values: dict[str, float], downsample: int) -> dict[str, float]:
    kl = values["kl"] / (3 * downsample**2)
    true, relaxed = -(values["nll_true"] + kl), -(values["nll_relaxed"] + kl)
    return {"elb_true": true, "elb_relaxed": relaxed, "elb_gap": relaxed - true}
