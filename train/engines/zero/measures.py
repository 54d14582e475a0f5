"""What ranks must know about each other's gradients before a step: overflow flags, norms and numerics of each resblock, as a float64 vector summed over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from train.engines.zero.compression.update import Watched
from train.engines.zero.shards import Gradients

_ROWS = ("bad", "squares", "zeros", "subnormals", "counted", "owed", "asked")
_SMALLEST_NORMAL = 2.0**-14
"""The smallest normal number of fp16."""


@dataclass(frozen=True)
class Measures:
    """Sums over all ranks: one entry for each resblock, and the last one for all parameters outside resblocks."""

    bad: list[bool]
    """Whether a gradient was not finite."""
    squares: list[float]
    """Sum of squares of the raw, scaled gradients; 0 if one is not finite."""
    zeros: list[float]
    """Share of exact zeros among the gradients of block matrices; NaN if they were not counted."""
    subnormals: list[float]
    """Share of values below fp16's smallest normal number, without zeros; NaN if they were not counted."""
    owed: list[float]
    """What compression between machines has not sent yet, over what the gradient asks for: norms of what is compressed; NaN if that was not estimated."""
    owed_in_all: float
    """The same of all resblocks together."""


def length(slots: int) -> int:
    """Number of entries of the vector."""
    return len(_ROWS) * slots


@torch.no_grad()
def local(
    found: Gradients, slots: int, *, count: bool, device: torch.device, squares: Tensor | None = None, watched: Watched | None = None
) -> Tensor:
    """This rank's part of the vector, float64 [7 * slots], computed without waiting for the device.

    Args:
        count: also count zeros and subnormal values, in two more passes over the gradients of matrices.
        squares: sum of squares of each gradient, float64 and not finite for a gradient that is not, if they were computed already: compressed gradients are
            not in ``found`` yet.
        watched: what compression owes, where it was estimated.
    """
    layout = found.layout
    sums = torch.zeros(len(_ROWS), slots, dtype=torch.float64, device=layout.matrix_lengths.device)
    if found.tensors:
        if squares is None:
            squares = torch.stack([torch.linalg.vector_norm(t, dtype=torch.float32) for t in found.tensors]).double().square()
        finite = squares.isfinite()
        sums[0] = layout.by_slot((~finite).double())
        sums[1] = layout.by_slot(torch.where(finite, squares, 0.0))
    if count and layout.matrices:
        picked = [found.tensors[index] for index in layout.matrices]
        zeros = torch.stack([(t == 0).sum() for t in picked]).double()
        small = torch.stack([(t.abs() < _SMALLEST_NORMAL).sum() for t in picked]).double()
        for row, counts in ((2, zeros), (3, small - zeros), (4, layout.matrix_lengths)):
            sums[row] = layout.by_slot(counts, matrices=True)
    if watched is not None:
        sums[5], sums[6] = layout.by_slot(watched.owed), layout.by_slot(watched.asked)
    return sums.flatten().to(device, non_blocking=True)  # offloaded gradients are on the CPU


def agreed(sums: Sequence[float], slots: int, replicas: int) -> Measures:
    """Decode the vector after it was summed over all ranks; each shard was counted ``replicas`` times."""
    rows = [list(sums[row * slots : (row + 1) * slots]) for row in range(len(_ROWS))]
    share = [[part / count if count else float("nan") for part, count in zip(rows[row], rows[4], strict=True)] for row in (2, 3)]
    bad = [value > 0 for value in rows[0]]
    # The norm of a slot that is not finite is left out: its finite parts may be as large as fp16 allows, and would cause all others to be clipped.
    squares = [0.0 if odd else value / replicas for odd, value in zip(bad, rows[1], strict=True)]
    owed = [_over(owed, asked) for owed, asked in zip(rows[5], rows[6], strict=True)]
    return Measures(bad, squares, share[0], share[1], owed, _over(sum(rows[5]), sum(rows[6])))


def _over(squares: float, of: float) -> float:
    """A norm over another one; NaN if there is none."""
    return (squares / of) ** 0.5 if of else float("nan")
