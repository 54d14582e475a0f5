"""Search instead of best of N: candidates compete while they are drawn. At one and at two thirds of their rows the contrastive model scores what is drawn so far;
the better half goes on, and the worse half is replaced by branches of it, which go on from the same codes with their own seeds. The transformer computes exactly as
many codes as for the best of N; what comes on top are 2 N decoded and scored pictures.

Every candidate keeps its place and its seed, so one that is never replaced is the one that the best of N would draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from infra.errors import DataError
from model.sampling import Sampling
from train.drawing.draw import Batch, Listen, Picture, begin_batch, decode, finished, run_to, score_one
from train.drawing.settings import Settings
from train.drawing.source import Models

Ancestry = list[list[int]]
"""Pairs (position, seed): from this position on the codes are those of this seed."""
_THIRDS = 3


def search(models: Models, caption: str, settings: Settings, prefix: Sequence[int] = (), listen: Listen | None = None) -> list[Picture]:
    """Draw the candidates of a caption, all in one batch, because they compete.

    Raises:
        ConfigError: nothing ranks, or there is only one candidate.
    """
    replace(settings, search=True).check_search(models.clip is not None)
    batch = Batch((caption,), tuple(range(settings.n)))
    seeds = settings.seeds(caption)
    ancestry: list[Ancestry] = [[[0, seed]] for seed in seeds]
    run = begin_batch(models, batch, settings, seeds, prefix)
    for end in _ends(run, len(prefix)):
        run_to(models, run, end, batch, listen)
        scores = [score_one(models, caption, pixels_YXC) for pixels_YXC in decode(models, _completed(run))]
        parents = _parents(scores)
        ancestry = [ancestry[parent] if parent == place else [*ancestry[parent], [end, seeds[place]]] for place, parent in enumerate(parents)]
        run.select(torch.tensor(parents, device=models.device), seeds)
    run_to(models, run, run.total, batch, listen)
    return finished(models, batch, run, seeds, [{"ancestry": found} for found in ancestry])


def along(models: Models, batch: Batch, settings: Settings, ancestry: Ancestry, prefix: Sequence[int]) -> list[Picture]:
    """Draw a batch of copies of one picture of a search again, by its ancestry.

    Raises:
        DataError: that is no ancestry.
    """
    check_ancestry(ancestry, models.weights.shape.image_tokens)
    seeds = [ancestry[0][1]] * batch.size
    run = begin_batch(models, batch, settings, seeds, prefix)
    for end, seed in ancestry[1:]:
        run_to(models, run, end, batch, None)
        seeds = [seed] * batch.size
        run.select(torch.arange(batch.size, device=models.device), seeds)
    run_to(models, run, run.total, batch, None)
    return finished(models, batch, run, seeds, [{"ancestry": ancestry}] * batch.size)


def check_ancestry(ancestry: Ancestry, positions: int) -> None:
    """
    Raises:
        DataError: that is no ancestry of a picture of so many codes.
    """
    places = [place for place, _ in ancestry]
    if places[0] != 0 or places != sorted(set(places)) or places[-1] >= positions:
        raise DataError(f"ancestry {ancestry}: expected rising positions from 0 on, below {positions}.")


def _ends(run: Sampling, given: int) -> list[int]:
    """The positions at which candidates are compared: those behind one and two thirds of the rows, if more is drawn than was given."""
    ends = [run.grid * third // _THIRDS * run.grid for third in range(1, _THIRDS)]
    return [end for end in ends if end > given]


def _completed(run: Sampling) -> Tensor:
    """The codes so far, with the last whole row repeated down to the edge, so that a picture comes out which the contrastive model can look at."""
    rows_BYX = run.codes_BI.view(-1, run.grid, run.grid).clone()
    done = run.least // run.grid
    rows_BYX[:, done:] = rows_BYX[:, done - 1 : done]
    return rows_BYX.flatten(1)


def _parents(scores: Sequence[float]) -> list[int]:
    """From which candidate each one goes on: the better half stays in its place, and the worse half branches from it, the best of it first."""
    order = [int(place) for place in np.argsort(-np.array(scores), kind="stable")]
    stays = (len(order) + 1) // 2
    parents = list(range(len(order)))
    for place, parent in zip(order[stays:], order, strict=False):
        parents[place] = parent
    return parents
