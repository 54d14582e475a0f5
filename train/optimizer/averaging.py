"""Iterate averaging: an exponential moving average of parameters, or of shards of them (paper A.2 and B.2)."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor


class Average:
    """fp32 averages of named tensors: a <- decay * a + (1 - decay) * p, after every ``every``-th update.

    The initial average is the tensors' value at construction. dVAE: decay 0.999 at every update (A.2); transformer: 0.99 at every 25th (B.2), in CPU memory.
    """

    def __init__(self, tensors: Iterable[tuple[str, Tensor]], decay: float, every: int = 1, *, on_cpu: bool = False) -> None:
        """
        Args:
            tensors: what to average, by name. They must keep their memory.
            on_cpu: keep the averages in CPU memory, and compute them in a thread during the next forward and backward passes. GPU tensors are copied to pinned
                memory on a side stream, and no step waits for that; CPU tensors (offloaded master weights) are read directly, before the next step.
        """
        self.decay, self.every = decay, every
        self._live = dict(tensors)
        place = "cpu" if on_cpu else None
        self.values: dict[str, Tensor] = {name: p.detach().to(place, torch.float32, copy=True) for name, p in self._live.items()}
        self._copier = _Copier(self._live) if on_cpu else None

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Add the present values of the tensors to the averages, if ``updates`` is a multiple of ``every``."""
        if updates % self.every:
            return
        if self._copier is not None:
            self._copier.start(list(self.values.values()), 1 - self.decay)
            return
        _mix(list(self.values.values()), [p.detach().float() for p in self._live.values()], 1 - self.decay)

    def before_step(self) -> None:
        """Must be called before the tensors change: what still reads them is finished first. On a GPU, the current stream waits, not this process."""
        if self._copier is not None:
            self._copier.order()

    def wait(self) -> None:
        """Wait for the computation that is running, if one is. Must be called before the averages are read."""
        if self._copier is not None:
            self._copier.wait()


@torch.no_grad()
def _mix(averages: list[Tensor], values: list[Tensor], weight: float) -> None:
    torch._foreach_lerp_(averages, values, weight)


class _Copier:
    """Computes averages in a thread. GPU tensors are first copied to pinned memory on a side stream; this part was not yet run on a GPU."""

    def __init__(self, live: dict[str, Tensor]) -> None:
        self.live = list(live.values())
        self.on_gpu = any(p.is_cuda for p in self.live)
        self.sources = [torch.empty(p.shape, dtype=torch.float32, pin_memory=True) for p in self.live] if self.on_gpu else self.live
        if self.on_gpu:
            self.stream = torch.cuda.Stream()
            self.copied = torch.cuda.Event()
        self.thread = ThreadPoolExecutor(1, "average")
        self.job: Future[None] | None = None

    def start(self, averages: list[Tensor], weight: float) -> None:
        """Start the copies and the averaging. Waits only if the previous averaging, ``every`` updates ago, is not finished."""
        self.wait()
        if self.on_gpu:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                for target, source in zip(self.sources, self.live, strict=True):
                    target.copy_(source.detach(), non_blocking=True)
                self.copied.record(self.stream)
        self.job = self.thread.submit(self._mix, averages, weight)

    def _mix(self, averages: list[Tensor], weight: float) -> None:
        if self.on_gpu:
            self.copied.synchronize()
        _mix(averages, [source.detach().float() for source in self.sources], weight)

    def order(self) -> None:
        """Let everything that follows on this stream, or on the CPU, wait until the tensors have been read."""
        if self.on_gpu:
            torch.cuda.current_stream().wait_event(self.copied)
        else:
            self.wait()

    def wait(self) -> None:
        """Wait for the averaging that is running, if one is."""
        if self.job is not None:
            self.job.result()
            self.job = None
