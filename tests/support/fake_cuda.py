"""CUDA tensors without CUDA: shapes, dtypes and devices of everything are computed, values of nothing.

Inside ``fake_cuda()``, tensors on "cuda" are fake, tensors on "cpu" are real. What would let the host wait for a GPU is an error with the line that asked for
it, unless the module is named as one that may wait; and so is a CPU tensor that meets a CUDA one. A wait that is allowed gives zeros.
"""

from __future__ import annotations

import math
import threading
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from model import sdpa
from tests.support import walked_autograd
from tests.support.root import ROOT

_aten: Any = torch.ops.aten
_COPIES = (_aten._to_copy.default, _aten.copy_.default)
_READS = (_aten._local_scalar_dense.default, _aten.equal.default, _aten.is_nonzero.default)
_SIZED_BY_VALUES = (
    *tuple(
        getattr(_aten, name).default
        for name in ("nonzero", "masked_select", "_unique2", "unique_consecutive", "unique_dim", "bincount", "nonzero_numpy")
    ),
    _aten.repeat_interleave.Tensor,
)
_INDEXING = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default, _aten._unsafe_index.Tensor, _aten._index_put_impl_.default)


class HostWait(AssertionError):
    """The host would wait for the GPU."""


@dataclass(frozen=True)
class Wait:
    """One wait of the host."""

    what: str
    place: str
    """Path below the root, and line, of the innermost line of ours."""


@dataclass
class Watch:
    """What ``fake_cuda`` saw."""

    may_wait: tuple[str, ...]
    """Files below the root in which the host may wait."""
    waits: list[Wait] = field(default_factory=list)
    replays: int = 0
    """Launches of recorded graphs."""
    _lifted: int = 0
    _recording: bool = False

    @contextmanager
    def recording(self, graph: Any, capture_error_mode: str) -> Iterator[None]:
        """In place of torch.cuda.graph: no wait can be recorded, wherever it is."""
        self._recording = True
        try:
            yield
        finally:
            self._recording = False

    @contextmanager
    def setting_up(self) -> Iterator[None]:
        """Inside, waits are neither errors nor counted: nothing runs yet."""
        self._lifted += 1
        try:
            yield
        finally:
            self._lifted -= 1

    def wait(self, what: str) -> None:
        """Take note of a wait.

        Raises:
            HostWait: there may be none here.
        """
        if self._lifted:
            return
        found = Wait(what, _place())
        self.waits.append(found)
        if self._recording or found.place.partition(":")[0] not in self.may_wait:
            raise HostWait(f"{found.place}: {what} waits for the GPU")


def _place() -> str:
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        # An environment lies in the repository under any name: what is installed there is not ours.
        if path.is_relative_to(ROOT) and "site-packages" not in path.parts and path.relative_to(ROOT).parts[:2] != ("tests", "support"):
            return f"{path.relative_to(ROOT)}:{frame.lineno}"
    return "elsewhere:0"


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def _is_fill(args: Any) -> bool:
    """Whether one number is written where one mask says: torch's kernel fills then, without counting; before torch 2.12 it is told apart only there."""
    return len(args) > 2 and isinstance(args[2], Tensor) and args[2].numel() == 1 and len(args[1]) == 1


class _Functions(TorchFunctionMode):
    """Pinned memory, which no dispatcher sees."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if kwargs and kwargs.get("pin_memory"):
            found = func(*args, **{**kwargs, "pin_memory": False, "device": "cpu"})
            found.is_pinned_here = True
            return found
        return func(*args, **(kwargs or {}))


class _Dispatch(TorchDispatchMode):
    """Real operations on the CPU, fake ones on CUDA."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch, self.fake = watch, _Fake(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)]
        fakes = [t for t in tensors if isinstance(t, FakeTensor)]
        target = kwargs.get("device")
        to_cuda = target is not None and torch.device(target).type == "cuda"
        if not fakes and not to_cuda:
            return func(*args, **kwargs)
        if func in _COPIES:
            done = self._copy(func, args, kwargs)
            if done is not None:
                return done
        elif any(t.is_cuda for t in fakes):
            if func in _READS:
                self.watch.wait(str(func))
                return False if func is not _aten._local_scalar_dense.default else torch.zeros((), dtype=args[0].dtype).item()
            if func in _SIZED_BY_VALUES or (func in _INDEXING and not _is_fill(args) and any(_is_mask(i) for i in args[1])):
                self.watch.wait(f"{func}, whose size depends on values,")
            if func in _INDEXING and any(i is not None and not i.is_cuda for i in args[1]):
                self.watch.wait(f"{func} with an index on the CPU")
        # Of a CPU scalar a kernel reads the value at its launch; any other meeting of devices is torch's own error.
        with self.fake:
            return func(*args, **kwargs)

    def _copy(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Between devices: who waits for it, and what lies on the CPU afterwards."""
        is_new = func is _aten._to_copy.default
        source = args[0] if is_new else args[1]
        device = torch.device(kwargs.get("device") or source.device) if is_new else args[0].device
        asynchronous = kwargs.get("non_blocking", False) if is_new else (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
        if source.device.type == device.type:
            return None
        if device.type == "cpu":
            pinned = not is_new and getattr(args[0], "is_pinned_here", False)
            if not (asynchronous and pinned):
                self.watch.wait("a copy to the CPU")
            return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype) if is_new else args[0]
        if not asynchronous:
            self.watch.wait("a copy to the GPU without non_blocking")
        return None


class _Fake(FakeTensorMode):
    """Shapes that depend on values are the largest that they can be: where waiting for them is allowed, what follows can go on."""

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _aten.nonzero.default:
            return self._zeros([args[0].numel(), args[0].ndim], args[0])
        if func is _aten.bincount.default:
            return self._zeros([(kwargs or {}).get("minlength") or args[2]], args[0])
        return super().dispatch(func, types, args, kwargs)

    def _zeros(self, shape: list[int], like: Tensor) -> Any:
        return super().dispatch(_aten.zeros.default, (), (shape,), {"dtype": torch.int64, "device": like.device})


class _Stream:
    """A stream, or an event: everything on it is ordered, and the host waits where it says so."""

    watch: Watch

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = torch.device("cuda", 0)
        self._recorded_at = -1  # waits of the host until then

    def synchronize(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self.watch.wait("synchronize()")

    def wait_stream(self, stream: Any) -> None:
        assert isinstance(stream, _Stream)

    def wait_event(self, event: Any) -> None:
        assert isinstance(event, _Stream)

    def record(self, stream: Any = None) -> None:
        assert stream is None or isinstance(stream, _Stream)
        self._recorded_at = len(self.watch.waits)

    def elapsed_time(self, end: Any) -> float:
        """Between two events, in milliseconds. It waits for nothing only where the host has waited since the later one was recorded."""
        assert self._recorded_at >= 0 and end._recorded_at >= 0, "both were recorded"
        if len(self.watch.waits) == end._recorded_at:
            self.watch.wait("elapsed_time()")
        return 0.0

    def query(self) -> bool:
        return True


class _Graph:
    """A recorded graph, which computes nothing."""

    watch: Watch

    def replay(self) -> None:
        self.watch.replays += 1


class _Generator(torch.Generator):
    """A CUDA generator, whose values nobody asks for, is one of the CPU."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return super().__new__(cls)


def memory_saving(q_BHSK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """SDPA's memory-saving kernel by name, as torch would call it on a GPU: a bool mask becomes a bias of the products' dtype."""
    if not q_BHSK.is_cuda:
        return torch.nn.functional.scaled_dot_product_attention(q_BHSK, k_BHSK, v_BHSK, attn_mask=mask, is_causal=is_causal)
    bias = None
    if mask is not None:
        bias = torch.zeros(mask.shape, dtype=q_BHSK.dtype, device=mask.device).masked_fill(~mask, -math.inf)
        bias = bias.expand(*q_BHSK.shape[:2], q_BHSK.shape[2], k_BHSK.shape[2])
    return _aten._scaled_dot_product_efficient_attention(q_BHSK, k_BHSK, v_BHSK, bias, True, 0.0, is_causal)[0]


def flex(q_BHSK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, *, block_mask: Any) -> Tensor:
    """In place of flex_attention, which asks for the driver: its block mask must lie on the device, and fit."""
    assert block_mask.kv_indices.is_cuda and block_mask.seq_lengths == (q_BHSK.shape[2], k_BHSK.shape[2])
    return memory_saving(q_BHSK, k_BHSK, v_BHSK, None, True)


def is_cuda(tensors: Any) -> bool:
    """Whether every tensor in a nest lies on CUDA."""
    return all(leaf.is_cuda for leaf in tree_iter(tensors) if isinstance(leaf, Tensor))


@contextmanager
def fake_cuda(*may_wait: str) -> Iterator[Watch]:
    """See the module.

    Args:
        may_wait: files below the root in which the host may wait for the GPU.
    """
    watch = Watch(may_wait)
    stream = type("Stream", (_Stream,), {"watch": watch})
    dispatch = _Dispatch(watch)  # before anything is replaced: torch imports its compiler for it
    lifted = torch._C._only_lift_cpu_tensors()
    replaced = {
        "Stream": stream,
        "Event": stream,
        "current_stream": lambda *_: stream(),
        "default_stream": lambda *_: stream(),
        "stream": lambda _: ExitStack(),
        "CUDAGraph": type("CUDAGraph", (_Graph,), {"watch": watch}),
        "graph": watch.recording,
        "_lazy_init": lambda: None,
        "current_device": lambda: 0,
        "synchronize": lambda *_: watch.wait("torch.cuda.synchronize()"),
    }
    with ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch, "Generator", _Generator))
        stack.enter_context(mock.patch.object(Tensor, "backward", walked_autograd.backward))
        stack.enter_context(mock.patch.object(FakeTensor, "tolist", lambda fake: fake.cpu().tolist()))  # torch would take it apart, number by number
        stack.enter_context(sdpa.with_kernel(memory_saving))
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, lifted)
        torch._C._ensureCUDADeviceGuardSet()
        stack.enter_context(_Functions())
        stack.enter_context(dispatch)
        yield watch
