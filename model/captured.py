"""Passes of a drawing as one recorded CUDA graph. A pass over one position is hundreds of small kernels, whose launches take longer than the kernels; a graph
launches them all at once."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

log = logging.getLogger(__name__)

Capture = Callable[[Callable[[], None]], Callable[[], object] | None]
"""Records a function that only queues work on fixed tensors, without running it, and returns what runs that work again; None if it cannot be recorded."""

PASSES_BEFORE = 2
"""Passes of the recorded kind that run one by one first: they load kernels and make the workspaces of libraries, which cannot be done while recording."""
WORTHWHILE = 64
"""Passes to come below which recording, which takes some tenths of a second, saves nothing."""


def cuda_graph(run: Callable[[], None]) -> Callable[[], object] | None:
    """A ``Capture`` for the current CUDA device. Where recording fails, it says so once a drawing, and the passes run one by one."""
    graph = torch.cuda.CUDAGraph()
    try:
        # Other threads may use the GPU meanwhile: samples while training, a page with several readers.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            run()
    except RuntimeError as error:
        log.warning("drawing: passes run one by one, because they could not be recorded as a CUDA graph (%s)", str(error).partition("\n")[0])
        return None
    replay: Callable[[], object] = graph.replay
    return replay
