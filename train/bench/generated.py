"""The programs that torch's compiler writes for real GPUs, without having one: Python that launches Triton's kernels, and their sources.

A process generates for one compute capability only: torch remembers the first device that it has seen. What stands in for the driver are private parts of torch and
Triton, so this is for the locked versions alone (constraints.txt).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
import triton
from torch import Tensor
from torch._dynamo.device_interface import CudaInterface
from torch._functorch.aot_autograd import aot_function
from torch._inductor import compile_fx, graph
from torch._inductor.codecache import PyCodeCache
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.runtime import triton_helpers
from torch.utils._pytree import tree_map
from triton.backends.compiler import GPUTarget

from train.bench.kernels import Usage, usage

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


def written(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> tuple[str, str]:
    """The programs that torch writes for a function, forward and backward. Inside ``pretended_gpu`` and a FakeTensorMode; ``inputs`` are fake tensors of the CPU.

    The graphs are traced there, because torch's autograd asks the driver of a GPU, and then moved.
    """
    graphs: list[tuple[Any, Any]] = []

    def keep(module: Any, example: Any) -> Callable[..., Any]:
        graphs.append((module, example))
        found: Callable[..., Any] = module.forward
        return found

    traced = aot_function(function, fw_compiler=keep, bw_compiler=keep, decompositions=select_decomp_table())
    traced(*inputs).sum().backward()
    forward, backward = (_written(module, example, backward=bool(place)) for place, (module, example) in enumerate(graphs))
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
