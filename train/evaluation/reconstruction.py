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
from model.image_tokenizer import ImageTokenizer
from model.relaxation import GumbelNoise
from train.config_pictures import EvaluateSection
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
    """Rows of this rank's pictures [3, Y, X]: originals, reconstructions from discrete codes and, of a dVAE, from relaxed codes."""


class _Sums:
    """What is added up over the batches of an evaluation, and then over ranks: figures that compare reconstructions with originals, further ones that the caller
    names, counts of codes, and pictures to show."""

    def __init__(self, cfg: DVAEConfig, judges: Judges, names: tuple[str, ...], device: torch.device) -> None:
        self.judges, self.device = judges, device
        self.names = [*names, "psnr", *(["ssim"] if cfg.image_size >= _SSIM_SIDE else []), *(["lpips"] if judges.lpips is not None else [])]
        self.sums = torch.zeros(1 + len(self.names), dtype=torch.float64, device=device)
        """The number of pictures, and of each figure the sum: one tensor, which is read at once."""
        self.counts_N = torch.zeros(cfg.vocab, dtype=torch.int64, device=device)
        self.features = [FeatureSums(judges.net.width, device) for _ in range(2)] if judges.net is not None else []
        self.shown: list[tuple[Tensor, ...]] = []

    def add(self, figures: list[Tensor], pixels_B3YX: Tensor, drawn_B3YX: Tensor, codes_BYX: Tensor, *more: Tensor) -> None:
        """Add a batch.

        Args:
            figures: those that the caller has named, one value for each picture.
            more: further pictures to show.
        """
        right = psnr(drawn_B3YX, pixels_B3YX)
        rows = [torch.ones_like(right), *figures, right]
        rows += [ssim(drawn_B3YX, pixels_B3YX)] if "ssim" in self.names else []
        rows += [self.judges.lpips(drawn_B3YX, pixels_B3YX)] if self.judges.lpips is not None else []
        self.sums += torch.stack([row.double().sum() for row in rows])
        flat = codes_BYX.flatten()
        self.counts_N.scatter_add_(0, flat, torch.ones_like(flat))  # torch.bincount would wait for the GPU in every batch
        for total, some_B3YX in zip(self.features, (pixels_B3YX, drawn_B3YX), strict=False):
            assert self.judges.net is not None
            total.add(self.judges.net.features(some_B3YX))
        if sum(len(part[0]) for part in self.shown) < SHOWN:
            self.shown.append((pixels_B3YX, drawn_B3YX, *more))

    def result(self) -> Reconstruction:
        """The means over all ranks. Collective."""
        for part in (self.sums, self.counts_N):
            if dist.is_initialized():
                dist.all_reduce(part)
        images, *totals = self.sums.tolist()
        values = {name: total / max(images, 1.0) for name, total in zip(self.names, totals, strict=True)} | code_statistics(self.counts_N)
        if self.judges.net is not None:
            values[self.judges.net.metric] = frechet_distance(*(total.moments() for total in self.features))
        return Reconstruction(values, self.counts_N, int(images), [list(torch.cat(parts)[:SHOWN]) for parts in zip(*self.shown, strict=True)])


@torch.no_grad()
def reconstruct(
    forward: Forward, cfg: DVAEConfig, batches: Iterable[dict[str, Any]], seed: int, tau: float, judges: Judges, device: torch.device
) -> Reconstruction:
    """Measure on ``batches`` of (ids, pixels). The metrics are the same on all ranks.

    ELBs are in nats per pixel value, with beta = 1, for which they bound the likelihood: -(NLL + KL / (3 f^2)). The 'relaxed' one is at temperature tau.
    PSNR, SSIM, LPIPS and the Fréchet distance compare the originals with the reconstructions from discrete codes.
    """
    sums = _Sums(cfg, judges, ("nll_true", "nll_relaxed", "kl", "psnr_relaxed"), device)
    for batch in batches:
        pixels_B3YX = batch["pixels"].to(device, non_blocking=True, memory_format=torch.channels_last)
        true = forward(pixels_B3YX, None, tau)
        relaxed = forward(pixels_B3YX, noise_of(seed, "evaluate", batch["ids"], device), tau)
        drawn_B3YX, soft_B3YX = pictures(true.stats_B6YX), pictures(relaxed.stats_B6YX)
        figures = [true.nll_B, relaxed.nll_B, true.kl_B, psnr(soft_B3YX, pixels_B3YX)]
        sums.add(figures, pixels_B3YX, drawn_B3YX, true.codes_BYX, soft_B3YX)
    found = sums.result()
    found.values |= _elbos(found.values, cfg.downsample)
    return found


@torch.no_grad()
def reconstruct_codes(model: ImageTokenizer, batches: Iterable[dict[str, Any]], judges: Judges, device: torch.device) -> Reconstruction:
    """The same for an image tokenizer that has no likelihood and no relaxation: what its codes keep of pictures, and how many of them it uses."""
    sums = _Sums(model.cfg, judges, (), device)
    for batch in batches:
        pixels_B3YX = batch["pixels"].to(device)
        codes_BYX = model.encode(pixels_B3YX)
        sums.add([], pixels_B3YX, model.decode(codes_BYX), codes_BYX)
    return sums.result()


def _elbos(values: dict[str, float], downsample: int) -> dict[str, float]:
    kl = values["kl"] / (3 * downsample**2)
    true, relaxed = -(values["nll_true"] + kl), -(values["nll_relaxed"] + kl)
    return {"elb_true": true, "elb_relaxed": relaxed, "elb_gap": relaxed - true}
