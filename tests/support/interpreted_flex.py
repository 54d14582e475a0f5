"""Runs the kernels that torch generates for FlexAttention on a GPU through Triton's interpreter, forward and backward, in place of ``flex_attention``.

    TRITON_INTERPRET=1 python -m tests.support.interpreted_flex row:float32 ...

prints for each mask and dtype the largest differences of outputs and of gradients from the dense engine in fp64, as JSON. The programs are those of
train/bench/flex_kernels.py, with what launches kernels on a GPU replaced by loops over their grids. A process of its own: Triton reads the variable at its import.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor
from torch._inductor.runtime import triton_helpers
from torch.nn.attention.flex_attention import BlockMask

from model.attention import DenseAttention
from model.config import StreamShape, TransformerConfig
from model.flex import FlexAttention
from model.offsets import Kind
from train.bench.flex_kernels import programs
from train.bench.generated import pretended_gpu

CONFIG, SHAPE = TransformerConfig(layers=4, width=64, heads=1), StreamShape(text_tokens=128, text_vocab=64, grid=16, image_vocab=64)
"""Three blocks of 128 states: whole ones, partial ones, and some that are left out."""
_ROWS = 64
"""Rows of the plain reduction's blocks."""


class _Kernel:
    """A kernel without the heuristics around it, which ask for a GPU."""

    def __init__(self, name: str, source: str, folder: Path) -> None:
        before, _, rest = source.partition("@triton_heuristics")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.py"  # Triton reads a kernel's source from its file
        path.write_text(before + "@triton.jit" + rest.partition("@triton.jit")[2])
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        self.function, self.is_attention = getattr(module, name), name.startswith("triton_tem")

    def run(self, *args: Any, stream: object) -> None:
        if self.is_attention:
            self.function[args[-3:]](*args[:-3])
        else:
            self.function[(-(-args[-2] // _ROWS), 1, 1)](*args, XBLOCK=_ROWS)


def _function(program: str, folder: Path) -> Any:
    """A program's ``call``, on the CPU."""

    class Compiler:
        def triton(self, name: str, source: str, **_: object) -> _Kernel:
            return _Kernel(name, source, folder)

        def wait(self, names: object) -> None: ...

    names: dict[str, Any] = {"__name__": "program", "Compiler": Compiler}
    exec(program.replace("async_compile = AsyncCompile()", "async_compile = Compiler()"), names)  # torch wrote it a moment ago, here
    names |= {"get_raw_stream": lambda _: 0, "copy_if_misaligned": lambda tensor: tensor}
    names["empty_strided_cuda"] = lambda shape, stride, dtype: torch.empty_strided(shape, stride, dtype=dtype)
    return names["call"]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, forward: Any, backward: Any, mask: tuple[Tensor, ...], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, *ctx.kept = forward([q, k, v, *mask])
        ctx.backward_program = backward
        return cast(Tensor, out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *ctx.backward_program([*ctx.kept, gradients[0].contiguous()])[:3]


def differences(kind: Kind, dtype: torch.dtype, folder: Path) -> dict[str, float]:
    """The largest differences of the engine with interpreted kernels from the dense engine in fp64."""
    with pretended_gpu(90):
        forward, backward = (_function(program, folder) for program in programs(kind, CONFIG, SHAPE, 1, dtype))

    def attend(q: Tensor, k: Tensor, v: Tensor, *, block_mask: BlockMask) -> Tensor:
        mask = tuple(part for part in block_mask.as_tuple() if isinstance(part, Tensor))
        return cast(Tensor, _Attention.apply(forward, backward, mask, q.contiguous(), k.contiguous(), v.contiguous()))

    torch.manual_seed(0)
    states = [torch.randn(1, CONFIG.heads, SHAPE.states, CONFIG.width // CONFIG.heads).to(dtype) for _ in range(4)]
    found = []
    for engine, to in ((FlexAttention(CONFIG, SHAPE, compiled=False, kernel=attend), dtype), (DenseAttention(CONFIG, SHAPE), torch.float64)):
        q, k, v = (state.detach().to(to).requires_grad_() for state in states[:3])
        with mock.patch.object(torch.cuda, "_DeviceGuard", lambda _: nullcontext()), mock.patch.object(torch.cuda, "set_device", lambda _: None):
            out = engine(q, k, v, kind)
            out.backward(states[3].to(to))
        found.append([tensor.detach().double() for tensor in (out, q.grad, k.grad, v.grad) if tensor is not None])
    return {name: float((ours - theirs).abs().max()) for name, ours, theirs in zip(("out", "dq", "dk", "dv"), *found, strict=True)}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place, mock.patch.object(triton_helpers, "set_driver_to_gpu", lambda: None):
        wanted = [word.split(":") for word in sys.argv[1:]]
        print(json.dumps({f"{kind}:{dtype}": differences(cast(Kind, kind), getattr(torch, dtype), Path(place, kind)) for kind, dtype in wanted}))
