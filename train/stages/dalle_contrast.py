"""The Task of the caption-contrastive objective: condition contrastive alignment (Chen et al. 2024, arXiv 2410.09347).

    loss = mean over pictures of  -log sigmoid(beta r) - lambda log sigmoid(-beta r')

r is log p(x | own caption) of the model less that of the frozen weights it started from, summed over the codes of a picture; r' is the same under another picture's
caption. A picture without another caption (train/stages/dalle_negatives.py) has the first term alone. Text is not learned: its cross-entropy is only logged.

B samples of a micro-batch, T text positions, I codes; P = 2 B: all samples under their own captions, then under the others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from infra.world import World
from model.transformer import Transformer
from train.config import RunConfig
from train.engines.protocol import Engine, FrozenEngine
from train.engines.replicated import global_counts
from train.loop.metrics import MetricsWriter
from train.loop.trainer import Batch, Loss
from train.ranks.leaving import Between, Left, nothing
from train.stages import dalle_negatives, dalle_temperature
from train.stages.dalle_task import DalleTask


def objective(own_B: Tensor, other_B: Tensor, has_other_B: Tensor, beta: float, weight: float) -> Tensor:
    """The loss of each picture [B], from log-likelihood ratios under its own caption and under another one. ``has_other_B`` is 1, or 0 where there is no other."""
    return -F.logsigmoid(beta * own_B) - weight * has_other_B * F.logsigmoid(-beta * other_B)


class ContrastTask(DalleTask):
    """Raises the likelihood of pictures under their own captions, and lowers it under others, relative to the engine's frozen weights."""

    metrics: tuple[str, ...] = (*DalleTask.metrics, "loss_image_other", "reward", "reward_other", "reward_accuracy")

    def __init__(self, cfg: RunConfig, device: torch.device, model: Transformer, validation: Iterable[Batch], world: World) -> None:
        super().__init__(cfg, device, model, validation)
        self.world = world
        self._waiting: list[Batch] = []
        self._before: dict[str, float] = {}

    def denominators(self, batches: list[Batch]) -> Mapping[str, Any]:
        """Global numbers of text and image tokens, of pictures, and of those that have another caption, which the micro-batches get here. They are kept for ``loss``."""
        dalle_negatives.add(batches, self.world)
        self._waiting = list(batches)
        text = sum(int(self.model.text_counts(batch["lengths"]).sum()) for batch in batches)
        pictures, others = (
            int(sum(count)) for count in ((len(batch["codes"]) for batch in batches), (batch["has_other"].sum() for batch in batches))
        )
        counts = {"text": text, "image": pictures * self.model.shape.image_tokens, "pictures": pictures, "others": others}
        return global_counts(counts, self.device)

    def loss(self, engine: Engine, batch: Batch, step: int, at: Mapping[str, float], denominators: Mapping[str, Any]) -> Loss:
        """This rank's part of the mean over pictures. The frozen weights compute all micro-batches of the update at once, before the first."""
        if self._waiting:
            self._compute_frozen(engine)
        fit, (text_PT, lengths_P, codes_PI) = self.cfg.dalle_fit, self._inputs(batch)
        text_nll_PT, image_nll_PI = engine(text_PT, lengths_P, codes_PI)
        # A difference of codes' likelihoods, and not of pictures': their sums have few digits left for it.
        own_B, other_B = (batch["frozen_nll"] - image_nll_PI).sum(1).chunk(2)
        has_other_B = batch["has_other"].to(self.device, non_blocking=True)
        pictures, others = denominators["pictures"], denominators["others"].clamp(min=1)
        # Zero times the text's: every parameter has a gradient, as ZeRO expects.
        total = objective(own_B, other_B, has_other_B, fit.contrast_beta, fit.contrast_lambda).sum() / pictures + 0.0 * text_nll_PT.sum()
        image_nll_BI, other_nll_BI = image_nll_PI.detach().chunk(2)
        own_B, other_B = own_B.detach(), other_B.detach()
        sums = {
            "loss": total,
            "loss_text": text_nll_PT.detach()[: len(own_B)].sum() / denominators["text"].clamp(min=1),
            "loss_image": image_nll_BI.sum() / denominators["image"],
            "loss_image_other": (other_nll_BI.mean(1) * has_other_B).sum() / others,
            "reward": fit.contrast_beta * own_B.sum() / pictures,
            "reward_other": fit.contrast_beta * (other_B * has_other_B).sum() / others,
            "reward_accuracy": ((own_B > other_B) * has_other_B).sum() / others,
        }
        if fit.caption_dropout:
            sums["captions_dropped"] = (lengths_P[: len(own_B)] == 0).sum()
        return Loss(total, sums)

    @torch.no_grad()
    def _compute_frozen(self, engine: Engine) -> None:
        """Add ``frozen_nll``, the frozen weights' cross-entropies [P, I], to all micro-batches of the update. Collective."""
        assert isinstance(engine, FrozenEngine)
        with engine.frozen(evaluates=False):
            for batch in self._waiting:
                batch["frozen_nll"] = engine(*self._inputs(batch))[1]
        self._waiting = []

    def _inputs(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Every picture under its own caption, then under the other: text [P, T], lengths [P], codes [P, I]."""
        pairs = (("text", "other_text"), ("lengths", "other_lengths"), ("codes", "codes"))
        text_PT, lengths_P, codes_PI = (torch.cat([batch[own], batch[other]]).to(self.device, non_blocking=True) for own, other in pairs)
        return text_PT, lengths_P, codes_PI

    def evaluate(self, engine: Engine, step: int, writer: MetricsWriter, between: Between = nothing) -> dict[str, float]:
        """As for likelihood, then both figures at the temperature that fits best, of the averaged weights and (once in an attempt, for they do not change) of the frozen
        ones."""
        assert isinstance(engine, FrozenEngine)
        found = super().evaluate(engine, step, writer, between)
        if not self._before:
            self._before = self._fitted(engine, engine.frozen(evaluates=True), between)
        after = self._fitted(engine, engine.averaged(), between)
        return found | after | {f"frozen_{name}": value for name, value in self._before.items()}

    def _fitted(self, engine: Engine, weights: AbstractContextManager[None], between: Between) -> dict[str, float]:
        batches = list(self.validation)
        left: Left | None = None
        found: dict[str, float] = {}
        with weights:
            try:
                found = dalle_temperature.fitted(engine, batches, self.device, between)
            except Left as caught:  # on all ranks: out of here they take the training's weights back together
                left = caught
        if left is not None:
            raise left
        return found


def described(evaluation: Mapping[str, float]) -> str:
    """Figures of the last evaluation before and after, for people."""
    lines = [f"{'caption contrast, on validation':34}{'before':>10}{'after':>10}{'change':>10}"]
    for key, words, digits in (
        ("fitted_loss_image", "nats per code, own caption", 4),
        ("fitted_caption_gain", "caption gain, nats per code", 4),
        ("temperature", "at the temperature that fits", 2),
    ):
        before, after = evaluation[f"frozen_{key}"], evaluation[key]
        lines.append(f"{words:34}{before:10.{digits}f}{after:10.{digits}f}{after - before:+10.{digits}f}")
    return "\n".join(lines)
