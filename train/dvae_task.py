"""The dVAE's part in the training loop: the ELB, its schedules, and evaluation with the averaged weights (paper 2.1, A.2)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call

from data_pipeline.loaders import SequentialReader
from infra import storage
from infra.run_folder import RunFolder
from infra.seeds import derive
from infra.world import World
from model.dvae import DVAE, DVAETerms, gumbel_like, pictures
from train.config import RunConfig
from train.engine import Engine
from train.fit import Batch, Loss
from train.metrics import MetricsWriter
from train.report.images import grid, grid_png
from train.schedules import half_cosine

_SHOWN = 12


def seeded(seed: int, purpose: str, ids: list[str], *counters: int) -> list[torch.Generator]:
    """One generator for each sample (docs/contracts.md, section 2)."""
    return [torch.Generator().manual_seed(derive(seed, purpose, *counters, name)) for name in ids]  # type: ignore[arg-type]


def psnr(a_BCYX: Tensor, b_BCYX: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each picture in dB, for values in [0, 1]."""
    mse_B = (a_BCYX - b_BCYX).square().mean((1, 2, 3)).clamp_min(1e-10)
    return -10 * torch.log10(mse_B)


def code_statistics(counts_N: Tensor) -> dict[str, float]:
    """Share of codes in use, their perplexity, and the entropy in nats of a code drawn by its frequency."""
    shares_N = counts_N.double() / counts_N.sum().clamp_min(1)
    entropy = -(shares_N * shares_N.clamp_min(1e-30).log()).sum().item()
    return {"code_use": (counts_N > 0).double().mean().item(), "perplexity": float(np.exp(entropy)), "entropy_nats": entropy}


class DvaeTask:
    """loss = NLL per value + beta / (3 f^2) KL per position, at the scheduled temperature and beta."""

    metrics: tuple[str, ...] = ("loss", "nll", "kl")
    unit = "images"

    def __init__(self, cfg: RunConfig, run: RunFolder, world: World, device: torch.device, validation: SequentialReader) -> None:
        self.cfg, self.run, self.world, self.device, self.validation = cfg, run, world, device, validation

    def schedule(self, step: int) -> dict[str, float]:
        """Half cosines for the step size, the temperature and beta (paper A.2)."""
        fit = self.cfg.dvae_fit
        return {
            "lr": half_cosine(step, fit.lr, fit.lr_final, fit.lr_steps) * min(1.0, (step + 1) / max(1, fit.warmup_steps)),
            "tau": half_cosine(step, 1.0, fit.tau_final, fit.tau_steps),
            "beta": half_cosine(step, 0.0, fit.beta, fit.beta_steps),
        }

    def denominators(self, batches: list[Batch]) -> Mapping[str, float]:
        """Every image counts alike, so the global batch is the denominator."""
        return {"images": float(self.cfg.dvae_fit.batch)}

    def units(self, batch: Batch) -> int:
        """Images."""
        return len(batch["ids"])

    def loss(self, engine: Engine, batch: Batch, step: int, at: Mapping[str, float], denominators: Mapping[str, float]) -> Loss:
        """The ELB's two terms on this rank's images."""
        shape = (len(batch["ids"]), self.cfg.dvae.vocab, self.cfg.dvae.grid, self.cfg.dvae.grid)
        noise_BNYX = gumbel_like(shape, seeded(self.cfg.run.seed, "gumbel", batch["ids"], step)).to(self.device)
        terms: DVAETerms = engine(self._pixels(batch), noise_BNYX, at["tau"])
        count = denominators["images"]
        nll, kl = terms.nll_B.sum() / count, terms.kl_B.sum() / count
        total = nll + at["beta"] / (3 * self.cfg.dvae.downsample**2) * kl
        return Loss(total, {"loss": total, "nll": nll, "kl": kl})

    def _pixels(self, batch: Batch) -> Tensor:
        pixels_B3YX: Tensor = batch["pixels"].to(self.device, memory_format=torch.channels_last)
        return pixels_B3YX

    @torch.no_grad()
    def evaluate(self, engine: Engine, step: int, writer: MetricsWriter) -> dict[str, float]:
        """Averaged weights on validation images: reconstruction from true and relaxed codes, ELB of both, codebook use."""
        tau = self.schedule(step)["tau"]
        names = ("images", "psnr", "psnr_relaxed", "nll_true", "nll_relaxed", "kl")
        sums = torch.zeros(len(names), dtype=torch.float64, device=self.device)
        counts_N = torch.zeros(self.cfg.dvae.vocab, dtype=torch.int64, device=self.device)
        shown: list[tuple[Tensor, Tensor, Tensor]] = []
        for batch in self.validation:
            pixels_B3YX = self._pixels(batch)
            true = self._averaged(engine, pixels_B3YX, None, 1.0)
            noise_BNYX = gumbel_like(true.logits_BNYX.shape, seeded(self.cfg.run.seed, "evaluate", batch["ids"])).to(self.device)
            relaxed = self._averaged(engine, pixels_B3YX, noise_BNYX, tau)
            from_true, from_relaxed = pictures(true.stats_B6YX), pictures(relaxed.stats_B6YX)
            rows = (torch.ones_like(true.nll_B), psnr(from_true, pixels_B3YX), psnr(from_relaxed, pixels_B3YX), true.nll_B, relaxed.nll_B, true.kl_B)
            sums += torch.stack([row.double().sum() for row in rows])
            counts_N += torch.bincount(true.logits_BNYX.argmax(1).flatten(), minlength=len(counts_N))
            if sum(len(part[0]) for part in shown) < _SHOWN:
                shown.append((pixels_B3YX, from_true, from_relaxed))
        for part in (sums, counts_N):
            if dist.is_initialized():
                dist.all_reduce(part)
        values = dict(zip(names, (sums / sums[0]).tolist(), strict=True))
        values |= code_statistics(counts_N)
        del values["images"]
        if self.world.is_main:
            self._show(step, shown, counts_N, int(sums[0].item()), writer)
        return values

    def _averaged(self, engine: Engine, pixels_B3YX: Tensor, noise_BNYX: Tensor | None, tau: float) -> DVAETerms:
        module = engine.module
        assert isinstance(module, DVAE)
        terms: DVAETerms = functional_call(module, engine.average.values, (pixels_B3YX, noise_BNYX, tau))
        return terms

    def _show(self, step: int, shown: list[tuple[Tensor, Tensor, Tensor]], counts_N: Tensor, samples: int, writer: MetricsWriter) -> None:
        rows = [[to_array(picture) for picture in torch.cat(parts)[:_SHOWN]] for parts in zip(*shown, strict=True)]
        if rows:
            labels = ("original", "from its codes", "relaxed")
            storage.write_bytes(self.run.at("dvae", "pictures", "reconstructions.png"), grid_png(rows, labels=labels))
            writer.images(step, ", ".join(labels), grid(rows))
        storage.write_json(self.run.at("dvae", "pictures", "codebook.json"), {"counts": counts_N.tolist(), "samples": samples})


def to_array(picture_CYX: Tensor) -> NDArray[np.uint8]:
    """A picture in [0, 1] as uint8 [H, W, C]."""
    array: NDArray[np.uint8] = (picture_CYX.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    return array
