"""A stand-in of a CUDA graph on a CPU: what a function does to tensors is recorded once, without effect, and done again on the same tensors, whatever Python would
do by now. What a graph cannot record is an error here too: a number that the host reads, and sizes that depend on values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

_aten = torch.ops.aten
_REFUSED = (_aten._local_scalar_dense.default, _aten.is_nonzero.default, _aten.equal.default, _aten.nonzero.default, _aten.masked_select.default)


class NotRecordableError(RuntimeError):
    """Work that a CUDA graph cannot hold."""


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.work: list[tuple[Any, Any, Any, list[Any]]] = []
        self._made: set[int] = set()
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        indices = tree_flatten(args[1])[0] if func in (_aten.index.Tensor, _aten.index_put_.default) else []
        if func in _REFUSED or any(isinstance(index, Tensor) and index.dtype == torch.bool for index in indices):
            raise NotRecordableError(f"operation not permitted when stream is capturing: {func}")
        for argument, given in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write and _place(given) not in self._made:
                self._before.setdefault(_place(given), (given, given.clone()))
        out = func(*args, **kwargs)
        outputs = tree_flatten(out)[0]
        of_arguments = {_place(leaf) for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)}
        self._made |= {_place(leaf) for leaf in outputs if isinstance(leaf, Tensor)} - of_arguments
        self.work.append((func, args, kwargs, outputs))
        return out

    def undo(self) -> None:
        for given, before in self._before.values():
            given.copy_(before)


def record(run: Callable[[], None]) -> Callable[[], object]:
    """A ``model.captured.Capture``."""
    recorder = _Recorder()
    with recorder, torch.no_grad():
        run()
    recorder.undo()

    @torch.no_grad()
    def replay() -> None:
        for func, args, kwargs, outputs in recorder.work:
            for made, kept in zip(tree_flatten(func(*args, **kwargs))[0], outputs, strict=True):
                if isinstance(kept, Tensor) and _place(made) != _place(kept):
                    kept.copy_(made)

    return replay


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
