"""The Task of the dVAE: the ELB, its schedules, and evaluation with the averaged weights (paper 2.1, A.2)."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.func import functional_call

from data_pipeline.loading.loaders import SequentialReader
from infra import storage
from infra.run_folder import RunFolder
from infra.world import World
from model.dvae import DVAE, DVAETerms
from model.relaxation import GumbelNoise
from train.config import RunConfig
from train.engines.protocol import Engine
from train.evaluation.codes import ENOUGH_CODES, CodeWindow, code_statistics
from train.evaluation.collapse import collapse_warning
from train.evaluation.reconstruction import Judges, Reconstruction, noise_of, reconstruct
from train.loop.metrics import MetricsWriter
from train.loop.schedules import half_cosine, linear
from train.loop.trainer import Batch, Loss
from train.ranks.leaving import Between, equally_often, nothing
from train.report.images import enlarged, grid, grid_png, to_array
from train.run.change_points import Curve

log = logging.getLogger(__name__)

_LABELS = ("original", "from its codes", "relaxed")
_LARGE = 6
"""Number of pictures in a row for TensorBoard, which shrinks wide pictures to the width of its cards."""


class DvaeTask:
    """The loss is NLL per pixel value + beta / (3 f^2) KL per code position, at the scheduled temperature and beta."""

    metrics: tuple[str, ...] = ("loss", "nll", "kl")
    unit = "images"
    curve: Curve | None = None

    def __init__(self, cfg: RunConfig, run: RunFolder, world: World, device: torch.device, validation: SequentialReader) -> None:
        self.cfg, self.run, self.world, self.device, self.validation = cfg, run, world, device, validation
        self.judges = Judges.load(cfg.evaluate, device)
        self.window = CodeWindow(cfg.dvae.vocab, device, -(-ENOUGH_CODES // world.size))

    def schedule(self, step: int) -> dict[str, float]:
        """Half cosines for the learning rate, the temperature and beta (paper A.2)."""
        fit = self.cfg.dvae_fit
        fall = linear if fit.tau_schedule == "linear" else half_cosine
        at = step - self.curve.start if self.curve else step
        return {
            "lr": half_cosine(at, fit.lr, fit.lr_final, fit.lr_steps) * min(1.0, (at + 1) / max(1, fit.warmup_steps)),
            "tau": fall(step, 1.0, fit.tau_final, fit.tau_steps),
            "beta": half_cosine(step, 0.0, fit.beta, fit.beta_steps),
        }

    def denominators(self, batches: list[Batch]) -> Mapping[str, float]:
        """The number of images in the global batch: every image has the same weight."""
        return {"images": float(self.cfg.dvae_fit.batch)}

    def units(self, batch: Batch) -> int:
        """The number of images."""
        return len(batch["ids"])

    def loss(self, engine: Engine, batch: Batch, step: int, at: Mapping[str, float], denominators: Mapping[str, float]) -> Loss:
        """The ELB's two terms on this rank's images."""
        noise = noise_of(self.cfg.run.seed, "gumbel", batch["ids"], self.device, step)
        terms: DVAETerms = engine(batch["pixels"].to(self.device, non_blocking=True, memory_format=torch.channels_last), noise, at["tau"])
        self.window.add(terms.codes_BYX)
        count = denominators["images"]
        nll, kl = terms.nll_B.sum() / count, terms.kl_B.sum() / count
        total = nll + at["beta"] / (3 * self.cfg.dvae.downsample**2) * kl
        return Loss(total, {"loss": total, "nll": nll, "kl": kl})

    def evaluate(self, engine: Engine, step: int, writer: MetricsWriter, between: Between = nothing) -> dict[str, float]:
        """Averaged weights on validation images (see ``reconstruct``), and the codes of the newest million training positions (``train_``)."""
        module = engine.module
        assert isinstance(module, DVAE)

        def forward(pixels_B3YX: Tensor, noise: GumbelNoise | None, tau: float) -> DVAETerms:
            terms: DVAETerms = functional_call(module, engine.average.values, (pixels_B3YX, noise, tau))
            return terms

        batches = equally_often(self.validation, between)
        found = reconstruct(forward, self.cfg.dvae, batches, self.cfg.run.seed, self.schedule(step)["tau"], self.judges, self.device)
        values = found.values | self._codes_of_training()
        warning = collapse_warning(values, self.cfg.dvae.vocab, self.cfg.dvae_fit.warn_perplexity)
        if self.world.is_main:
            show(self.run, found, step, writer)
            if warning:
                log.warning("update %d: %s", step, warning)
                writer.text(step, "warning", warning)
        return values

    def _codes_of_training(self) -> dict[str, float]:
        counts_N = self.window.counts()
        if dist.is_initialized():
            dist.all_reduce(counts_N)
        total = float(counts_N.sum())
        if not total:  # right after a restart no codes have been counted
            return {}
        return {f"train_{name}": value for name, value in code_statistics(counts_N).items()} | {"train_codes_counted": total}


def show(run: RunFolder, found: Reconstruction, step: int, writer: MetricsWriter) -> None:
    """Write a sheet with originals above both reconstructions, and the counts of the codes, for TensorBoard and the report."""
    rows = [[to_array(picture) for picture in row] for row in found.shown]
    if rows:
        storage.write_bytes(run.at("dvae", "pictures", "reconstructions.png"), grid_png(rows, labels=_LABELS[: len(rows)]))
        writer.images(step, ", ".join(_LABELS[: len(rows)]), grid([enlarged(row[:_LARGE]) for row in rows]))
    uses = [int(count).bit_length() for count in found.counts_N.tolist()]
    bits = range(max(uses) + 1)
    writer.histogram(step, "eval/codes_by_bits_of_their_uses", [0.5 + each for each in bits], [uses.count(each) for each in bits])
    storage.write_json(run.at("dvae", "pictures", "codebook.json"), {"counts": found.counts_N.tolist(), "samples": found.samples})
