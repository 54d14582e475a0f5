"""The kernels that torch generates for FlexAttention on real GPUs, without having one: their sources, and what NVIDIA's assembler says of them.

``python -m train.bench.flex_kernels CAPABILITY [KIND ...]`` prints the rows of docs/kernels.md for one GPU, as JSON. A process generates for one capability only: torch remembers the
first device that it has seen. What stands in for the driver are private parts of torch and Triton, so this is for the locked versions alone (constraints.txt).
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import torch
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
import torch.nn.attention.flex_attention as front
import triton
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._functorch.aot_autograd import aot_function
from torch._higher_order_ops.flex_attention import flex_attention
from torch._inductor import compile_fx, graph
from torch._inductor.codecache import PyCodeCache
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.runtime import triton_helpers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map
from triton.backends.compiler import GPUTarget

from model.config import StreamShape, TransformerConfig
from model.flex import BLOCK, block_mask
from model.offsets import Kind
from train.bench.kernels import Usage, usage

CONFIG, SHAPE = TransformerConfig(layers=4, width=1024, heads=16), StreamShape(text_tokens=256, text_vocab=16384, grid=32, image_vocab=8192)
"""The paper's stream and head size. Kernels depend on no other size of a model."""
BATCH = 8
KINDS: tuple[Kind, ...] = ("row", "column", "conv")
_SIZES = {80: (108, 166912), 90: (132, 232448), 100: (148, 232448)}
"""Multiprocessors of A100, H100 and B200, and the bytes of shared memory that a block may have there."""


@contextmanager
def pretended_gpu(capability: int) -> Iterator[None]:
    """Inside, torch and Triton believe in one GPU of this compute capability. Nothing can run on it."""
    pair, (processors, shared) = divmod(capability, 10), _SIZES[capability]
    facts = {
        "name": f"sm_{capability}",
        "major": pair[0],
        "minor": pair[1],
        "multi_processor_count": processors,
        "warp_size": 32,
        "total_memory": 80 << 30,
    }
    facts |= {"regs_per_multiprocessor": 65536, "max_threads_per_multi_processor": 2048, "max_threads_per_block": 1024, "gcnArchName": ""}
    properties = SimpleNamespace(**facts, shared_memory_per_block_optin=shared, shared_memory_per_block=49152, L2_cache_size=50 << 20)
    replaced: dict[str, Any] = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0, "_lazy_init": lambda: None, "set_device": lambda _: None,
        "get_device_properties": lambda *_: properties, "get_device_capability": lambda *_: pair, "is_bf16_supported": lambda *_, **__: True,
        "get_rng_state": lambda *_: torch.zeros(8, dtype=torch.uint8), "set_rng_state": lambda *_: None, "synchronize": lambda *_: None,
        "_exchange_device": lambda _: 0, "_maybe_exchange_device": lambda _: 0, "current_stream": lambda *_: SimpleNamespace(cuda_stream=0),
    }  # fmt: skip
    driver = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", capability, 32), get_current_device=lambda: 0)
    driver.get_device_capability, driver.get_active_torch_device = lambda *_: pair, lambda: torch.device("cuda", 0)
    torch._C._ensureCUDADeviceGuardSet()
    with ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
            if name in vars(CudaInterface):  # which took torch.cuda's functions when it was imported
                stack.enter_context(mock.patch.object(CudaInterface, name, staticmethod(value)))
        stack.enter_context(mock.patch.object(CudaInterface.Worker, "get_device_properties", staticmethod(lambda *_: properties)))
        stack.enter_context(mock.patch.object(triton_helpers, "set_driver_to_gpu", lambda: None))
        settings = {"compile_threads": 1, "fx_graph_cache": False, "use_static_triton_launcher": False}
        stack.enter_context(inductor_config.patch(settings))  # type: ignore[no-untyped-call]
        stack.enter_context(functorch_config.patch(enable_autograd_cache=False))  # type: ignore[no-untyped-call]
        before = triton.runtime.driver._active
        triton.runtime.driver.set_active(driver)
        try:
            yield
        finally:
            triton.runtime.driver._active = before


def programs(kind: Kind, cfg: TransformerConfig, shape: StreamShape, batch: int, dtype: torch.dtype) -> tuple[str, str]:
    """The programs that torch writes for a layer's attention, forward and backward: Python with the sources of Triton's kernels. Inside ``pretended_gpu``.

    The graphs are traced on fake tensors of the CPU, because torch's autograd asks the driver of a GPU, and then moved.
    """
    mask = block_mask(kind, shape, cfg, "cpu", BLOCK)
    parts = mask.as_tuple()
    graphs: list[tuple[Any, Any]] = []

    def keep(module: Any, inputs: Any) -> Callable[..., Any]:
        graphs.append((module, inputs))
        found: Callable[..., Any] = module.forward
        return found

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

        traced = aot_function(attend, fw_compiler=keep, bw_compiler=keep, decompositions=select_decomp_table())
        traced(q, k, v, *tensors).sum().backward()
        written = [_written(module, inputs, backward=bool(place)) for place, (module, inputs) in enumerate(graphs)]
    forward, backward = written
    return forward, backward


def _written(module: Any, inputs: Any, *, backward: bool) -> str:
    """The program for a graph, whose tensors are moved to the GPU."""

    def moved(values: Any) -> Any:
        return tree_map(lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda") if isinstance(t, Tensor) else t, values)

    for part in module.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            if "val" in node.meta:
                node.meta["val"] = moved(node.meta["val"])
            if node.kwargs.get("device") is not None:
                node.kwargs = {**node.kwargs, "device": torch.device("cuda")}
    found: list[str] = []

    def kept(lowering: Any) -> Any:
        code, _ = lowering.codegen()
        found.append(getattr(code, "value", code))
        return SimpleNamespace(call=lambda _: None, __path__="", key="")

    with mock.patch.object(graph.GraphLowering, "compile_to_module", kept), torch.no_grad():
        compile_fx.compile_fx_inner(module, moved(list(inputs)), is_backward=backward)
    return found[0]


def sources(program: str) -> dict[str, str]:
    """Name -> source of each kernel of a program."""
    return dict(re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str='cuda'\)", program, re.DOTALL))


def compiled(name: str, source: str) -> Usage:
    """Compile a kernel down to machine code, as torch would at its first call. Inside ``pretended_gpu``."""
    found: list[Any] = []
    compile_ = triton.compile

    def kept(*args: Any, **kwargs: Any) -> Any:
        found.append(compile_(*args, **kwargs))
        return found[-1]

    kernel = getattr(PyCodeCache.load(source), name)
    with mock.patch.object(triton, "compile", kept):
        kernel._precompile_config(kernel.configs[0])
    return usage(found[-1])


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
