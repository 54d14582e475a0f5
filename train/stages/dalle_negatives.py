"""Another picture's caption for every picture of an update, out of the same update: what its own caption is contrasted with.

The captions of an update stand in the order of the data, which depends neither on ranks nor on micro-batches (``ShardLoader``: rank r of R takes every R-th sample of a
micro-batch, from r on). A picture gets the next caption after its own, around the end, that is none of its own. So the same update has the same pairs after a
resume, on any number of ranks and with any accumulation. No random number is drawn: which pictures follow each other is drawn anew in each epoch already.

A micro-batches, B samples of one on this rank, R ranks, N = A B R samples of the update, T text positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from infra.world import World
from train.loop.trainer import Batch
from train.ranks import watchdog
from train.ranks.device import patient_group

watchdog.waits_for_ranks(__file__)


def add(batches: list[Batch], world: World) -> None:
    """Add ``other_text``, ``other_lengths`` and ``has_other`` (float32 [B], 1 or 0) to the micro-batches of an update. Collective, over gloo: a GPU is not waited for.

    A picture whose own caption was dropped has none, and so has one whose own captions are all that the update holds. It keeps its own caption in its place.
    """
    rows_ABC = torch.stack([torch.cat([batch["caption_keys"][:, None], batch["lengths"][:, None], batch["text"]], 1) for batch in batches])
    all_NC = _in_order(rows_ABC, world)
    keys, each = all_NC[:, 0].tolist(), rows_ABC.shape[1]
    for index, batch in enumerate(batches):
        places = [(index * each + row) * world.size + world.rank for row in range(each)]
        found = [following(keys, place, own) for place, own in zip(places, batch["own_keys"], strict=True)]
        other_BC = all_NC[torch.tensor(found)]
        has_other = [float(other != place) for other, place in zip(found, places, strict=True)]
        batch |= {"other_text": other_BC[:, 2:], "other_lengths": other_BC[:, 1], "has_other": torch.tensor(has_other)}


def following(keys: Sequence[int], place: int, own: Sequence[int]) -> int:
    """The place of the next caption after ``place``, around the end, that is neither dropped (key 0) nor one of the picture's own; ``place`` itself if there is none or
    its own is dropped."""
    if not keys[place]:
        return place
    mine = {0, *own}
    return next((other % len(keys) for other in range(place + 1, place + len(keys)) if keys[other % len(keys)] not in mine), place)


def _in_order(rows_ABC: Tensor, world: World) -> Tensor:
    """The rows of all ranks in the order of the data, [N, C]."""
    if world.size == 1:
        return rows_ABC.flatten(0, 1)
    parts = [torch.empty_like(rows_ABC) for _ in range(world.size)]
    dist.all_gather(parts, rows_ABC, group=patient_group())
    return torch.stack(parts, 2).flatten(0, 2)
