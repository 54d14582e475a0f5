"""The paper's AdamW, compared with a copy of the same number of bytes, because memory bandwidth limits an update. ``python -m train.bench.optimizer``"""

from __future__ import annotations

from functools import partial

import torch

from train.bench import plain_adamw
from train.bench.harness import Result, main, start
from train.machine.rates import Options, copy_rate, measure, threads
from train.optimizer.adamw import Hyper, update, update_pieces

_COUNT = {"cpu": 1 << 22, "cuda": 1 << 28}
_PIECES = 1000
"""About as many parameters as the preset 12B has in a group of ZeRO stage 3."""
_KINDS = (
    ("fp32 moments", torch.float32, False, 2 * 4 + 4 * 4 + 4),
    ("16-bit moments", torch.int16, False, 2 * 4 + 4 * 2 + 4),
    ("16-bit moments and weights", torch.int16, True, 2 * 4 + 4 * 2 + 4 + 2),
)
"""Name, dtype of the moments, whether there is an fp16 copy of the master weights, and bytes for each element."""
_GOALS = {"fp32 moments": (1.0, 2.0), "16-bit moments": (0.5, 8.0), "16-bit moments and weights": (None, None)}
"""Goals on a CPU for the rate, divided by that of a copy, and by that of the same update in torch's operations."""
_HYPER = Hyper(lr=1e-3, beta1=0.9, beta2=0.96, eps=1e-8, weight_decay=4.5e-2, clip_variance=5.0, factor=0.5, count=100)


def run(options: Options) -> Result:
    """Measure bytes/s of an update with fp32 and with 16-bit moments; on a CPU in one thread. Counted are the master weights and both moments, which are read and
    written, the gradient, which is read, and the 16-bit copy of the master weights, which is written."""
    count = _COUNT[options.device]
    result = start("optimizer", "Optimizer: AdamW with 16-bit moments", options, elements=count, threads=1)
    with threads(1):
        result.floor["copy"] = copy_rate(options)
        for name, moments, half, each in _KINDS:
            p, grad = (torch.randn(count, device=options.device) for _ in range(2))
            m, v = (torch.zeros(count, dtype=moments, device=options.device) for _ in range(2))
            copy = torch.empty(count, dtype=torch.float16, device=options.device) if half else None
            result.measured[f"update, {name}"] = measure(partial(update, p, grad, m, v, _HYPER, copy), 1e-9 * each * count, "GB/s", options)
            if half:  # as on ZeRO stage 3
                pieces = [piece.clone() for piece in grad.chunk(_PIECES)]
                divided = partial(update_pieces, p, pieces, m, v, _HYPER, copy)
                result.measured[f"update, {name}, {_PIECES:,} gradients"] = measure(divided, 1e-9 * each * count, "GB/s", options)
                result.ratio(f"{_PIECES:,} gradients over one", f"update, {name}, {_PIECES:,} gradients", f"update, {name}")
            over_copy, over_torch = _GOALS[name]
            result.ratio(f"{name} over a copy", f"update, {name}", "copy", goal=0.8 if options.device == "cuda" else over_copy)
            result.peers[f"torch's operations, {name}"] = measure(
                partial(plain_adamw.update, p, grad, m, v, _HYPER, copy), 1e-9 * each * count, "GB/s", options
            )
            goal = None if options.device == "cuda" else over_torch
            result.ratio(f"{name} over torch's operations", f"update, {name}", f"torch's operations, {name}", goal)
    result.notes.append("On a GPU one fused kernel, on a CPU one compiled by numba. Gradients are fp32, as ZeRO hands them over.")
    return result


if __name__ == "__main__":
    main(run)
