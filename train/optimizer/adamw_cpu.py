"""One update of AdamW on a CPU, compiled by numba: gradient, master and moments go through the processor's cache once, whatever the format of the moments.

The arithmetic is that of torch's kernels, bit for bit: their ``lerp`` and ``addcmul`` fuse a product with a sum, and their square roots are MKL's, which are
not always those of IEEE 754, so that torch takes them here too. Compiled at first use, for the processor at hand, and kept in numba's cache.
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
"""Elements handled at a time: what fits into a second-level cache, and what one thread of torch takes alone."""
_SHARED = 1 << 18
"""From so many elements on, torch's threads share a tensor."""
_LOCK = threading.Lock()
_pools: dict[int, ThreadPoolExecutor] = {}


def update(p: Tensor, grad: Tensor, mean: Tensor, variance: Tensor, hyper: Any, copy: Tensor | None = None) -> None:
    """As ``train.optimizer.adamw.update``, of tensors on a CPU. ``hyper`` is a ``train.optimizer.adamw.Hyper``."""
    given = [t.detach().view(-1) for t in ((p, grad, mean, variance) if copy is None else (p, grad, mean, variance, copy))]
    threads, count = torch.get_num_threads(), p.numel()
    if threads == 1 or count < _SHARED:
        _span(given, hyper)
        return
    each = -(-count // (threads * CHUNK)) * CHUNK  # cut where chunks begin, so that threads change no bit
    parts = [[t[start : start + each] for t in given] for start in range(0, count, each)]
    list(_pool(threads).map(lambda part: _span(part, hyper), parts))


def _span(given: list[Tensor], hyper: Any) -> None:
    p, grad, mean, variance, *copy = given
    moments, step = compiled(mean.dtype == torch.int16)
    # As torch's kernels take them: worked out in double precision, and rounded once.
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
    """The two loops for moments in fp32, or in the 16-bit formats: new moments, and new master weights."""
    with _LOCK:
        return _compiled(packed)


@lru_cache
def _compiled(packed: bool) -> tuple[Callable[..., None], Callable[..., None]]:
    import numba  # 0.2 s that those who never train need not wait
    from numba import float32, int16, types

    from train.optimizer import adamw_loops

    values, codes = float32[::1], int16[::1] if packed else float32[::1]
    # No fastmath: it may neither reorder nor fuse what is not fused by name.
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
        found = [numba.njit(signature, **options)(loop) for signature, loop in loops]  # nowhere to write: compiled in each process
    return found[0], found[1]
