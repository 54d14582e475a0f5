"""The kernels that torch generates for FlexAttention on real GPUs, without having one (train/bench/generated.py): what NVIDIA's assembler says of them.

``python -m train.bench.flex_kernels CAPABILITY [KIND ...]`` prints the rows of docs/kernels.md for one GPU, as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, cast

import torch
import torch.nn.attention.flex_attention as front
from torch import Tensor
from torch._higher_order_ops.flex_attention import flex_attention
from torch._subclasses.fake_tensor import FakeTensorMode

from model.config import StreamShape, TransformerConfig
from model.flex import BLOCK, block_mask
from model.offsets import Kind
from train.bench.generated import compiled, pretended_gpu, sources, written

CONFIG, SHAPE = TransformerConfig(layers=4, width=1024, heads=16), StreamShape(text_tokens=256, text_vocab=16384, grid=32, image_vocab=8192)
"""The paper's stream and head size. Kernels depend on no other size of a model."""
BATCH = 8
KINDS: tuple[Kind, ...] = ("row", "column", "conv")


def programs(kind: Kind, cfg: TransformerConfig, shape: StreamShape, batch: int, dtype: torch.dtype) -> tuple[str, str]:
    """The programs that torch writes for a layer's attention, forward and backward. Inside ``pretended_gpu``."""
    parts = block_mask(kind, shape, cfg, "cpu", BLOCK).as_tuple()
    size = (batch, cfg.heads, shape.states, cfg.width // cfg.heads)
    with FakeTensorMode(allow_non_fake_inputs=True):
        q, k, v = (torch.empty(size, dtype=dtype, requires_grad=True) for _ in range(3))
        on_gpu = [torch.empty(size, dtype=dtype, device="cuda") for _ in range(3)]
        options = front._apply_kernel_options(*on_gpu, False, {}, None) | {"OUTPUT_LOGSUMEXP": True}
        tensors = [torch.empty(part.shape, dtype=part.dtype) for part in parts if isinstance(part, Tensor)]

        def attend(q: Tensor, k: Tensor, v: Tensor, *masks: Tensor) -> Tensor:
            left = iter(masks)
            whole = tuple(next(left) if isinstance(part, Tensor) else part for part in parts)
            out: Tensor = flex_attention(q, k, v, front._identity, whole, size[-1] ** -0.5, options, (), ())[0]
            return out

        return written(attend, [q, k, v, *tensors])


def rows(capability: int, kinds: Sequence[Kind] = KINDS) -> list[dict[str, Any]]:
    """Every kernel for one GPU: its kind of mask, its pass, and what it uses."""
    found = []
    with pretended_gpu(capability):
        for kind in kinds:
            for direction, program in zip(("forward", "backward"), programs(kind, CONFIG, SHAPE, BATCH, torch.float16), strict=True):
                for name, source in sources(program).items():
                    if name.startswith("triton_tem"):  # attention itself; the sum of gradients times outputs is a plain reduction
                        found.append({"kind": kind, "pass": direction, "target": capability} | asdict(compiled(name, source)))
    return found


if __name__ == "__main__":
    print(json.dumps(rows(int(sys.argv[1]), cast(tuple[Kind, ...], tuple(sys.argv[2:])) or KINDS)))
