"""One update of AdamW on a CPU, compiled by numba: gradient, master weights and moments pass through the processor's cache once, in any format of the moments.

The results are bitwise those of torch's kernels. Torch's ``lerp`` and ``addcmul`` fuse a product with a sum, so the loops do too. Torch's square roots come from
MKL and are not always rounded as IEEE 754 demands, so they are computed by torch here too. Compiled at first use, for the present processor, and kept in numba's
cache.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

CHUNK = 1 << 15
"""Number of elements handled at a time: they fit into a second-level cache, and torch handles so many in one thread."""
_SHARED = 1 << 18
"""A tensor with at least this many elements is divided among threads."""
_LOCK = threading.Lock()
_pools: dict[int, ThreadPoolExecutor] = {}


def update(p: Tensor, grad: Tensor, mean: Tensor, variance: Tensor, hyper: Any, copy: Tensor | None = None) -> None:
    """``train.optimizer.adamw.update`` for tensors on a CPU. ``hyper`` is a ``train.optimizer.adamw.Hyper``."""
    given = [t.detach().view(-1) for t in ((p, grad, mean, variance) if copy is None else (p, grad, mean, variance, copy))]
    threads, count = torch.get_num_threads(), p.numel()
    if threads == 1 or count < _SHARED:
        _span(given, hyper)
        return
    each = -(-count // (threads * CHUNK)) * CHUNK  # threads get whole chunks, so that their number does not change the result
    parts = [[t[start : start + each] for t in given] for start in range(0, count, each)]
    list(_pool(threads).map(lambda part: _span(part, hyper), parts))


def _span(given: list[Tensor], hyper: Any) -> None:
    p, grad, mean, variance, *copy = given
    moments, step = compiled(mean.dtype == torch.int16)
    # Computed in double precision and rounded once, as torch does before it calls its kernels.
    first = [np.float32(x) for x in (hyper.factor, 1 - hyper.beta1, hyper.beta2, 1 - hyper.beta2, hyper.clip_variance)]
    second = [np.float32(x) for x in (hyper.correction2**-0.5, hyper.eps, 1 - hyper.lr * hyper.weight_decay, -hyper.lr / hyper.correction1)]
    decoded_mean, root = (torch.empty(min(CHUNK, p.numel())) for _ in range(2))
    for start in range(0, p.numel(), CHUNK):
        place = slice(start, min(start + CHUNK, p.numel()))
        m, v = decoded_mean[: place.stop - start], root[: place.stop - start]
        moments(grad[place].float().numpy(), mean[place].numpy(), variance[place].numpy(), m.numpy(), v.numpy(), *first)
        step(p[place].numpy(), m.numpy(), v.sqrt_().numpy(), *second)
        if copy:
            copy[0][place] = p[place]


def _pool(threads: int) -> ThreadPoolExecutor:
    with _LOCK:
        return _pools.setdefault(threads, ThreadPoolExecutor(threads, "adamw"))


def compiled(packed: bool) -> tuple[Callable[..., None], Callable[..., None]]:
    """The two compiled loops, for moments in the 16-bit formats or in fp32: one computes the new moments, the other the new master weights."""
    with _LOCK:
        return _compiled(packed)


@lru_cache
def _compiled(packed: bool) -> tuple[Callable[..., None], Callable[..., None]]:
    import numba  # imported here because it takes 0.2 s, which programs that do not train are spared
    from numba import float32, int16, types

    from train.optimizer import adamw_loops

    values, codes = float32[::1], int16[::1] if packed else float32[::1]
    # Without fastmath: the compiler must not reorder operations, or fuse any but those that the code fuses explicitly.
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
    loops = (
        (types.void(values, codes, codes, values, values, *[float32] * 5), adamw_loops.packed_moments if packed else adamw_loops.plain_moments),
        (types.void(values, values, values, *[float32] * 4), adamw_loops.step),
    )
    try:
        found = [numba.njit(signature, cache=True, **options)(loop) for signature, loop in loops]
    except RuntimeError as error:
        if "cannot cache" not in str(error):
            raise
        found = [numba.njit(signature, **options)(loop) for signature, loop in loops]  # the cache cannot be written: each process compiles for itself
    return found[0], found[1]
