"""Iterate averaging: an exponential moving average of parameters or of their shards, beside the optimizer (paper A.2 and B.2)."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor


class Average:
    """fp32 averages of named tensors: a <- decay * a + (1 - decay) * p, at every ``every``-th update.

    Starts at the first values it sees. dVAE: decay 0.999 at every update (A.2); transformer: 0.99 at every 25th (B.2), kept in CPU memory.
    """

    def __init__(self, tensors: Iterable[tuple[str, Tensor]], decay: float, every: int = 1, *, on_cpu: bool = False) -> None:
        """
        Args:
            tensors: what to average, by name; they must stay where they are.
            on_cpu: keep the averages in CPU memory, and let a thread do the arithmetic beside the next forward and backward passes. GPU tensors are copied
                to pinned memory by a side stream, and no step waits; CPU tensors (offloaded masters) are read where they are, before the next step.
        """
        self.decay, self.every = decay, every
        self._live = dict(tensors)
        place = "cpu" if on_cpu else None
        self.values: dict[str, Tensor] = {name: p.detach().to(place, torch.float32, copy=True) for name, p in self._live.items()}
        self._copier = _Copier(self._live) if on_cpu else None

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Take in the tensors after ``updates`` updates, if it is this update's turn."""
        if updates % self.every:
            return
        if self._copier is not None:
            self._copier.start(list(self.values.values()), 1 - self.decay)
            return
        _mix(list(self.values.values()), [p.detach().float() for p in self._live.values()], 1 - self.decay)

    def before_step(self) -> None:
        """To be called before the tensors change: the next step follows what is under way (on a GPU its queue waits, the host does not)."""
        if self._copier is not None:
            self._copier.order()

    def wait(self) -> None:
        """Finish what is under way; needed before the values are read."""
        if self._copier is not None:
            self._copier.wait()


@torch.no_grad()
def _mix(averages: list[Tensor], values: list[Tensor], weight: float) -> None:
    torch._foreach_lerp_(averages, values, weight)


class _Copier:
    """Mixes tensors into averages in a thread; GPU tensors from a copy in pinned memory, made on a side stream. That part was not yet seen on a GPU."""

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
        """Copy, then mix. Waits only if the mixing of ``every`` updates ago is not done."""
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
        """Let what follows on this stream, or on this CPU, follow the reading of the tensors."""
        if self.on_gpu:
            torch.cuda.current_stream().wait_event(self.copied)
        else:
            self.wait()

    def wait(self) -> None:
        """Finish the job under way."""
        if self.job is not None:
            self.job.result()
            self.job = None
