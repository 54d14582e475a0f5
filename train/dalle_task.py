"""The transformer's part in the training loop: two cross-entropies over their own counts, and evaluation with shuffled captions (paper 2.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.func import functional_call

from model.transformer import Transformer
from train.config import RunConfig
from train.engine import Engine, global_sum
from train.fit import Batch, Loss
from train.metrics import MetricsWriter
from train.schedules import warmup_cosine

Losses = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@torch.no_grad()
def cross_entropies(losses: Losses, batches: Iterable[Batch], device: torch.device, text_counts: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """Mean cross-entropies in nats over all ranks' batches; the image's also under captions rolled by one within each batch.

    Collective. ``caption_gain`` is shuffled minus right: how much a caption tells about its picture.
    """
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    for batch in batches:
        text_BT, lengths_B, codes_BI = (batch[key].to(device) for key in ("text", "lengths", "codes"))
        text_nll_BT, image_nll_BI = losses(text_BT, lengths_B, codes_BI)
        _, shuffled_nll_BI = losses(text_BT.roll(1, 0), lengths_B.roll(1, 0), codes_BI)
        counted = text_counts(lengths_B).sum()
        rows = (text_nll_BT.double().sum(), counted.double(), image_nll_BI.double().sum(), shuffled_nll_BI.double().sum())
        sums += torch.stack([*rows, torch.tensor(float(image_nll_BI.numel()), dtype=torch.float64, device=device)])
    if dist.is_initialized():
        dist.all_reduce(sums)
    text, counted, image, shuffled, codes = sums.tolist()
    right, wrong = image / codes, shuffled / codes
    return {"loss_text": text / max(counted, 1.0), "loss_image": right, "loss_image_shuffled": wrong, "caption_gain": wrong - right}


class DalleTask:
    """loss = 1/8 text + 7/8 image, each averaged over its own global count."""

    metrics: tuple[str, ...] = ("loss", "loss_text", "loss_image")
    unit = "tokens"

    def __init__(self, cfg: RunConfig, device: torch.device, model: Transformer, validation: Iterable[Batch]) -> None:
        self.cfg, self.device, self.model, self.validation = cfg, device, model, validation
        if cfg.dalle_fit.caption_dropout:
            self.metrics = (*self.metrics, "captions_dropped")

    def schedule(self, step: int) -> dict[str, float]:
        """Linear warm-up, then half a cosine."""
        fit = self.cfg.dalle_fit
        return {"lr": warmup_cosine(step, fit.lr, fit.lr_final, fit.warmup_steps, fit.steps)}

    def denominators(self, batches: list[Batch]) -> Mapping[str, float]:
        """Global counts of text and image tokens: one integer reduction, because captions differ in length."""
        text = sum(int(self.model.text_counts(batch["lengths"]).sum()) for batch in batches)
        image = sum(batch["codes"].numel() for batch in batches)
        return global_sum({"text": text, "image": image}, self.device)

    def units(self, batch: Batch) -> int:
        """States of the stream, padding included."""
        return int(len(batch["codes"]) * self.model.shape.states)

    def loss(self, engine: Engine, batch: Batch, step: int, at: Mapping[str, float], denominators: Mapping[str, float]) -> Loss:
        """Both cross-entropies on this rank's samples."""
        text_BT, lengths_B, codes_BI = (batch[key].to(self.device) for key in ("text", "lengths", "codes"))
        text_nll_BT, image_nll_BI = engine(text_BT, lengths_B, codes_BI)
        text, image = text_nll_BT.sum() / max(denominators["text"], 1), image_nll_BI.sum() / denominators["image"]
        weight = self.cfg.dalle.text_loss_weight
        total = weight * text + (1 - weight) * image
        sums = {"loss": total, "loss_text": text, "loss_image": image}
        if self.cfg.dalle_fit.caption_dropout:
            sums["captions_dropped"] = (lengths_B == 0).sum()
        return Loss(total, sums)

    def evaluate(self, engine: Engine, step: int, writer: MetricsWriter) -> dict[str, float]:
        """Averaged weights on validation codes."""

        def losses(text_BT: Tensor, lengths_B: Tensor, codes_BI: Tensor) -> tuple[Tensor, Tensor]:
            result: tuple[Tensor, Tensor] = functional_call(self.model, engine.average.values, (text_BT, lengths_B, codes_BI))
            return result

        return cross_entropies(losses, self.validation, self.device, self.model.text_counts)
