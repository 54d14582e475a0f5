"""Cross-entropies of the image codes at the temperature that fits validation best, with right and with shuffled captions.

Fine-tuning that sharpens or flattens a model changes its likelihoods even where it learns nothing about captions. At its best temperature it is judged without that.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from train.loop.trainer import Batch
from train.ranks.leaving import Between, nothing
from train.stages.dalle_task import as_often_on_all_ranks, with_other_captions

TEMPERATURES = (0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 1.15, 1.2, 1.3, 1.4, 1.6, 2.0)
"""Tried in one pass. Near the best one the cross-entropy is flat: a step of 0.05 is at most about 1e-3 nats off."""


@torch.no_grad()
def fitted(losses: Callable[..., tuple[Tensor, Tensor]], batches: list[Batch], device: torch.device, between: Between = nothing) -> dict[str, float]:
    """The temperature at which the codes of the batches of all ranks are likeliest under their own captions; the cross-entropy there, in nats per code; and how much higher
    it is there under the captions of other samples. Collective.

    Args:
        losses: a transformer's forward pass, which takes ``temperatures``.
        between: called before each of the batches.

    Raises:
        Left: out of ``between``.
    """
    sums_2K = torch.zeros(2, len(TEMPERATURES), dtype=torch.float64, device=device)
    codes = 0
    for batch, counts in as_often_on_all_ranks(with_other_captions(batches, device), device):
        between()
        given: dict[str, Any] = {key: batch[key].to(device, non_blocking=True) for key in ("text", "lengths", "codes", "other_text", "other_lengths")}
        right_BIK = losses(given["text"], given["lengths"], given["codes"], temperatures=TEMPERATURES)[1]
        wrong_BIK = losses(given["other_text"], given["other_lengths"], given["codes"], temperatures=TEMPERATURES)[1]
        if counts:
            sums_2K += torch.stack([right_BIK.double().sum((0, 1)), wrong_BIK.double().sum((0, 1))])
            codes += batch["codes"].numel()
    counted = torch.full((1,), float(codes), dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(sums_2K)
        dist.all_reduce(counted)
    right_K, wrong_K = (sums_2K / counted).tolist()
    best = min(range(len(TEMPERATURES)), key=right_K.__getitem__)
    return {"temperature": TEMPERATURES[best], "fitted_loss_image": right_K[best], "fitted_caption_gain": wrong_K[best] - right_K[best]}
