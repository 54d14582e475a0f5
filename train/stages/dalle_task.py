"""The Task of the transformer: two cross-entropies, each averaged over its own number of tokens, and evaluation with shuffled captions (paper 2.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.loading.loaders import READ
from infra.digests import id_hash
from model.transformer import Transformer
from train.config import RunConfig
from train.engines.protocol import Engine, StatefulEngine
from train.engines.replicated import global_counts
from train.loop.metrics import MetricsWriter
from train.loop.schedules import warmup, warmup_cosine
from train.loop.trainer import Batch, Loss
from train.ranks.leaving import Between, Left, nothing
from train.run.change_points import Curve

Losses = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@torch.no_grad()
def cross_entropies(
    losses: Losses,
    batches: Iterable[Batch],
    device: torch.device,
    text_counts: Callable[[Tensor], Tensor],
    *,
    rows: int = 0,
    text_weight: float = 0.125,
    between: Between = nothing,
) -> dict[str, float]:
    """Mean cross-entropies in nats over the batches of all ranks; that of the image tokens is also computed with the caption of another sample.

    Collective. Every rank calls ``losses`` equally often, because each call gathers weights with ZeRO stage 3. ``caption_gain`` is the cross-entropy with shuffled
    captions minus that with the right ones: how much information a caption gives about its picture.

    Args:
        rows: rows of the image's grid, each of which gets a figure of its own; 0: none.
        text_weight: share of the text in ``loss``.
        between: called before each of the batches.

    Raises:
        Left: out of ``between``.
    """
    sums = torch.zeros(5 + rows, dtype=torch.float64, device=device)
    for batch, counts in as_often_on_all_ranks(with_other_captions(list(batches), device), device):
        between()
        text_BT, lengths_B, codes_BI, other_BT, other_lengths_B = (
            batch[key].to(device, non_blocking=True) for key in ("text", "lengths", "codes", "other_text", "other_lengths")
        )
        text_nll_BT, image_nll_BI = losses(text_BT, lengths_B, codes_BI)
        _, shuffled_nll_BI = losses(other_BT, other_lengths_B, codes_BI)
        if not counts:
            continue
        totals = [text_nll_BT.double().sum(), text_counts(lengths_B).sum().double(), image_nll_BI.double().sum(), shuffled_nll_BI.double().sum()]
        totals.append(torch.full((), float(image_nll_BI.numel()), dtype=torch.float64, device=device))  # torch.tensor(number) would wait for the GPU
        if rows:
            totals += image_nll_BI.double().unflatten(1, (rows, -1)).sum((0, 2)).unbind()
        sums += torch.stack(totals)
    if dist.is_initialized():
        dist.all_reduce(sums)
    text, counted, image, shuffled, codes, *by_row = sums.tolist()
    text, right, wrong = text / max(counted, 1.0), image / codes, shuffled / codes
    found = {"loss": text_weight * text + (1 - text_weight) * right, "loss_text": text, "loss_image": right}
    found |= {"loss_image_shuffled": wrong, "caption_gain": wrong - right}
    return found | {f"loss_image_row_{row:02d}": value * rows / codes for row, value in enumerate(by_row)}


def with_other_captions(held: list[Batch], device: torch.device) -> list[Batch]:
    """Add ``other_text`` and ``other_lengths`` to the batches: the caption of the next sample in the order of hashed ids, over all ranks. Which caption a sample gets
    does not depend on the number of ranks. It gets its own only if there is no other sample."""
    rows = [torch.cat([_hashes(batch)[:, None], batch["lengths"][:, None], batch["text"]], 1) for batch in held]
    all_NC = _of_all_ranks(torch.cat(rows) if rows else torch.zeros(0, 0, dtype=torch.int64), device)
    if not held:
        return []
    sorted_NC = all_NC[all_NC[:, 0].argsort()]
    following = (torch.searchsorted(sorted_NC[:, 0].contiguous(), torch.cat([part[:, 0] for part in rows])) + 1) % len(sorted_NC)
    others = sorted_NC[following].split([len(part) for part in rows])
    return [batch | {"other_text": part[:, 2:], "other_lengths": part[:, 1]} for batch, part in zip(held, others, strict=True)]


def _hashes(batch: Batch) -> Tensor:
    return torch.tensor([id_hash(name) >> 1 for name in batch["ids"]])  # 63 bits, so that int64 holds it without a sign


def _of_all_ranks(mine_NC: Tensor, device: torch.device) -> Tensor:
    """The rows of all ranks. A rank may have none."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return mine_NC
    most, width = _largest(list(mine_NC.shape), device)
    padded = torch.full((most, width), -1, device=device)
    if len(mine_NC):
        padded[: len(mine_NC)] = mine_NC.to(device)
    parts = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, padded)
    all_NC = torch.cat(parts).cpu()
    return all_NC[all_NC[:, 0] >= 0]


def _largest(numbers: list[int], device: torch.device) -> list[int]:
    agreed = torch.tensor(numbers, device=device)
    dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
    return [int(number) for number in agreed.tolist()]


def as_often_on_all_ranks(held: list[Batch], device: torch.device) -> list[tuple[Batch, bool]]:
    """This rank's batches with True; then copies with False, which are not counted, until it has as many batches as the rank with the most."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [(batch, True) for batch in held]
    most, minus_fewest = _largest([len(held), -len(held)], device)
    spare: list[Any] = [held[0] if held else None]
    if minus_fewest == 0 and most:
        dist.broadcast_object_list(spare, device=device)  # records are assigned to ranks in turn, so rank 0 has a batch if any rank has one
    return [(batch, True) for batch in held] + [(spare[0], False)] * (most - len(held))


class DalleTask:
    """The loss is 1/8 text + 7/8 image, each averaged over its own global number of tokens."""

    metrics: tuple[str, ...] = ("loss", "loss_text", "loss_image")
    unit = "tokens"
    curve: Curve | None = None

    def __init__(self, cfg: RunConfig, device: torch.device, model: Transformer, validation: Iterable[Batch]) -> None:
        self.cfg, self.device, self.model, self.validation = cfg, device, model, validation
        if cfg.dalle_fit.caption_dropout:
            self.metrics = (*self.metrics, "captions_dropped")

    def schedule(self, step: int) -> dict[str, float]:
        """Linear warm-up, then half a cosine, or a constant that ``Trainer.plateau`` halves."""
        fit = self.cfg.dalle_fit
        curve = self.curve or Curve(0, fit.steps)
        if fit.schedule == "plateau":
            return {"lr": warmup(step - curve.start, fit.lr, fit.warmup_steps)}
        return {"lr": warmup_cosine(step - curve.start, fit.lr, fit.lr_final, fit.warmup_steps, curve.updates)}

    def denominators(self, batches: list[Batch]) -> Mapping[str, Any]:
        """Global numbers of text and image tokens. They need a reduction over integers, because captions have different lengths."""
        text = sum(int(self.model.text_counts(batch["lengths"]).sum()) for batch in batches)
        image = sum(batch["codes"].numel() for batch in batches)
        return global_counts({"text": text, "image": image}, self.device)

    def units(self, batch: Batch) -> int:
        """The number of positions of the stream, padding included."""
        return int(len(batch["codes"]) * self.model.shape.states)

    def loss(self, engine: Engine, batch: Batch, step: int, at: Mapping[str, float], denominators: Mapping[str, Any]) -> Loss:
        """Both cross-entropies on this rank's samples."""
        text_BT, lengths_B, codes_BI = (batch[key].to(self.device, non_blocking=True) for key in ("text", "lengths", "codes"))
        read = [batch[key].to(self.device, non_blocking=True) for key in READ if key in batch]
        text_nll_BT, image_nll_BI = engine(text_BT, lengths_B, codes_BI, *read)
        text, image = text_nll_BT.sum() / denominators["text"].clamp(min=1), image_nll_BI.sum() / denominators["image"]
        weight = self.cfg.dalle.text_loss_weight
        total = weight * text + (1 - weight) * image
        sums = {"loss": total, "loss_text": text, "loss_image": image}
        if self.cfg.dalle_fit.caption_dropout:
            sums["captions_dropped"] = (lengths_B == 0).sum()
        return Loss(total, sums)

    def evaluate(self, engine: Engine, step: int, writer: MetricsWriter, between: Between = nothing) -> dict[str, float]:
        """Averaged weights on validation codes."""
        assert isinstance(engine, StatefulEngine)
        batches = list(self.validation)  # what cannot be read ends this rank here, and not between collectives
        found: dict[str, float] | Left
        with engine.averaged():
            options: dict[str, Any] = {"rows": self.model.shape.grid, "text_weight": self.cfg.dalle.text_loss_weight, "between": between}
            try:
                found = cross_entropies(engine, batches, self.device, self.model.text_counts, **options)
            except Left as left:  # on all ranks: out of here they take the training's weights back together
                found = left
        if isinstance(found, Left):
            raise found
        return found
