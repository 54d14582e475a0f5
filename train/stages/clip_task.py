"""The Task of the contrastive model: symmetric cross-entropy over the global batch (Radford et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from infra.world import World
from model.clip import Clip
from model.frozen_clip import FrozenHeads
from train.config import RunConfig
from train.engines.protocol import Engine
from train.evaluation.distances import nearer
from train.loop.metrics import MetricsWriter
from train.loop.schedules import warmup_cosine
from train.loop.trainer import Batch, Loss
from train.ranks.leaving import Batches, Between, equally_often, nothing
from train.run.change_points import Curve

PIXELS, FEATURES = ("pixels", "text", "lengths"), ("image_features", "text_features")
"""What the two kinds of models take of a batch."""


class BothTowers(nn.Module):
    """Runs both towers in one forward pass, as DDP requires."""

    def __init__(self, clip: Clip, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.clip, self.dtype = clip, dtype

    def forward(self, pixels_B3YX: Tensor, text_BT: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised image and text embeddings [B, E], and the factor that scales their products."""
        with torch.autocast(pixels_B3YX.device.type, self.dtype, enabled=self.dtype != torch.float32):
            image_BE, text_BE = self.clip.encode_image(pixels_B3YX), self.clip.encode_text(text_BT, lengths_B)
        return image_BE.float(), text_BE.float(), self.clip.scale


class BothHeads(nn.Module):
    """The same for heads on features of frozen towers."""

    def __init__(self, heads: FrozenHeads, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.clip, self.dtype = heads, dtype

    def forward(self, image_BF: Tensor, text_BF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As ``BothTowers``."""
        with torch.autocast(image_BF.device.type, self.dtype, enabled=self.dtype != torch.float32):
            image_BE, text_BE = self.clip.embed_image(image_BF), self.clip.embed_text(text_BF)
        return image_BE.float(), text_BE.float(), self.clip.scale


class _Gather(torch.autograd.Function):
    """The rows of all ranks, in the order of ranks. The gradient of a row is the sum of the gradients from all ranks."""

    @staticmethod
    def forward(ctx: Any, local_BE: Tensor, world: World) -> Tensor:
        ctx.world = world
        parts = [torch.empty_like(local_BE) for _ in range(world.size)]
        dist.all_gather(parts, local_BE.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        whole_AE = grads[0].contiguous()
        dist.all_reduce(whole_AE)
        return whole_AE.chunk(ctx.world.size)[ctx.world.rank], None


def _gather(local_BE: Tensor, world: World) -> Tensor:
    if world.size == 1:
        return local_BE
    gathered_AE: Tensor = _Gather.apply(local_BE, world)
    return gathered_AE


def recall_at_1(image_BE: Tensor, text_BE: Tensor) -> Tensor:
    """For how many captions the nearest picture of the batch is their own."""
    return ((text_BE @ image_BE.T).argmax(1) == torch.arange(len(text_BE), device=text_BE.device)).sum()


@dataclass(frozen=True)
class _Slope:
    """What the gradient of the update's loss is at one micro-batch's embeddings, and this micro-batch's part of that loss."""

    image_BE: Tensor
    text_BE: Tensor
    scale: Tensor
    loss: Tensor


def _cross_entropy(images: Sequence[Tensor], texts: Sequence[Tensor], scale: Tensor, world: World) -> Tensor:
    """Sum over this rank's pairs, given as micro-batches, of both cross-entropies among the pairs of all ranks and micro-batches."""
    image_BE, text_BE = (parts[0] if len(parts) == 1 else torch.cat(list(parts)) for parts in (images, texts))
    target_B = torch.arange(len(image_BE), device=image_BE.device) + world.rank * len(image_BE)
    to_text = F.cross_entropy(scale * image_BE @ _gather(text_BE, world).T, target_B, reduction="sum")
    to_image = F.cross_entropy(scale * text_BE @ _gather(image_BE, world).T, target_B, reduction="sum")
    return to_text + to_image


def _slopes(found: Sequence[tuple[Tensor, Tensor, Tensor]], world: World, denominators: Mapping[str, float]) -> list[_Slope]:
    """The gradients of the loss among all pairs of the update, at the embeddings of each of this rank's micro-batches. Collective."""
    images, texts = ([part[place].detach().requires_grad_() for part in found] for place in (0, 1))
    scale = found[0][2].detach().requires_grad_()
    with torch.enable_grad():
        total = _cross_entropy(images, texts, scale, world) / (2 * denominators["pairs"])
        total.backward()  # type: ignore[no-untyped-call]
    count = len(images)
    grads = zip(images, texts, strict=True)
    assert scale.grad is not None
    return [_Slope(image.grad, text.grad, scale.grad / count, total.detach() / count) for image, text in grads]  # type: ignore[arg-type]


class ClipTask:
    """Each rank compares its own images with all captions of the global batch, and its own captions with all images."""

    metrics: tuple[str, ...] = ("loss",)
    unit = "images"
    curve: Curve | None = None

    def __init__(self, cfg: RunConfig, world: World, device: torch.device, validation: Batches[Batch]) -> None:
        self.cfg, self.world, self.device, self.validation = cfg, world, device, validation
        self.inputs = FEATURES if cfg.clip.towers == "frozen" else PIXELS
        self._waiting: list[Batch] = []
        self._slopes: list[_Slope] = []

    def schedule(self, step: int) -> dict[str, float]:
        """Linear warm-up, then half a cosine to zero."""
        fit = self.cfg.clip_fit
        curve = self.curve or Curve(0, fit.steps)
        return {"lr": warmup_cosine(step - curve.start, fit.lr, 0.0, fit.warmup_steps, curve.updates)}

    def denominators(self, batches: list[Batch]) -> Mapping[str, float]:
        """The number of pairs in the global batch: every pair has the same weight. If pairs of the whole update are told apart, its batches are kept for ``loss``."""
        self._waiting = list(batches) if len(batches) > 1 and self.cfg.clip_fit.contrast == "update" else []
        return {"pairs": float(self.cfg.clip_fit.batch)}

    def units(self, batch: Batch) -> int:
        """The number of images."""
        return len(batch["ids"])

    def loss(self, engine: Engine, batch: Batch, step: int, at: Mapping[str, float], denominators: Mapping[str, float]) -> Loss:
        """This rank's part of the symmetric cross-entropy.

        If pairs of the whole update are told apart: a value with the gradient that this micro-batch has in the cross-entropy of all.
        """
        if self._waiting:
            with torch.no_grad():
                found = [engine(*self._inputs(some)) for some in self._waiting]
            self._waiting, self._slopes = [], _slopes(found, self.world, denominators)
        image_BE, text_BE, scale = engine(*self._inputs(batch))
        if self._slopes:
            slope = self._slopes.pop(0)
            inner = (image_BE * slope.image_BE).sum() + (text_BE * slope.text_BE).sum() + scale * slope.scale
            return Loss(inner, {"loss": slope.loss})
        total = _cross_entropy([image_BE], [text_BE], scale, self.world) / (2 * denominators["pairs"])
        return Loss(total, {"loss": total})

    def _inputs(self, batch: Batch) -> tuple[Tensor, ...]:
        return tuple(batch[key].to(self.device, non_blocking=True) for key in self.inputs)

    @torch.no_grad()
    def evaluate(self, engine: Engine, step: int, writer: MetricsWriter, between: Between = nothing) -> dict[str, float]:
        """Averaged weights: share of captions that find their picture first, or among ten, within a batch; and the share that chance would find first."""
        sums = torch.zeros(4, dtype=torch.float64, device=self.device)
        for batch in equally_often(self.validation, between):
            image_BE, text_BE, _ = functional_call(engine.module, engine.average.values, self._inputs(batch))
            sums[0] += recall_at_1(image_BE, text_BE)
            sums[1] += (nearer(image_BE, text_BE) < 10).sum()
            sums[2] += len(text_BE)
            sums[3] += 1
        if dist.is_initialized():
            dist.all_reduce(sums)
        first, among_ten, pairs, batches = sums.tolist()
        return {"recall_at_1": first / pairs, "recall_at_10": among_ten / pairs, "chance": batches / pairs}
