"""How many pictures are drawn together: as many as were asked for, if memory holds them, or as many as it holds. Needs no weights, only their sizes."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from infra.errors import ConfigError
from model.decoder import cache_bytes, text_bytes
from train.config import RunConfig
from train.drawing.settings import Settings

_CPU_BYTES, _CPU_PICTURES = 1 << 30, 64
"""Limits of memory and pictures of a batch on a CPU. Larger batches are not faster, and their first picture comes later."""
_SHARE_OF_FREE = 0.5
_UNKNOWN = 1 << 50
_CONTAINER = Path("/sys/fs/cgroup/memory.max")
_CPU_ROWS, _GPU_ROWS, _MOST_WINDOW = 16, 1 << 12, 16
"""How many positions a pass computes in less time than the passes that drafts save take: reading the weights takes most of it."""
_CPU_WIDTH = 384
"""From this width on. Weights of narrower models stay in a CPU's caches, and a pass over several positions takes as long as drafts save (docs/drawing.md)."""


@dataclass(frozen=True)
class Room:
    """Where pictures are drawn, and what a number takes there."""

    cfg: RunConfig
    device: torch.device
    itemsize: int
    """Bytes of a key or value."""

    def batch_width(self, settings: Settings) -> int:
        """How many pictures are drawn together: the number in the settings, or as many as memory allows."""
        if settings.batch:
            return settings.batch
        each = self._bytes_each(settings)
        if self.device.type == "cuda":
            return max(1, int(_SHARE_OF_FREE * available(self.device)) // each)
        return max(1, min(_CPU_PICTURES, min(_CPU_BYTES, int(_SHARE_OF_FREE * available(self.device))) // each))

    def _bytes_each(self, settings: Settings) -> int:
        """What each picture of a batch takes."""
        cfg, shape = self.cfg.dalle, self.cfg.stream_shape()
        copies = 1 if settings.guidance == 1 else 2
        window = max(1, settings.window)
        logits = 4 * 4 * window * shape.image_vocab  # logits, their noise, and up to two copies
        each = copies * (cache_bytes(cfg, shape, self.itemsize, window) + logits)
        return each + text_bytes(cfg, shape, self.itemsize)  # the worst case: each picture has its own caption

    def check(self, settings: Settings, pictures: int) -> None:
        """
        Raises:
            ConfigError: a batch takes more memory than there is. Sizes of batches come from command lines, and from the lines of strangers (``draw --again``).
        """
        needed, free = pictures * self._bytes_each(settings), available(self.device)
        if needed > free:
            raise ConfigError(
                f"{pictures:,} pictures at once take {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free: give a smaller --batch (with --search: a smaller "
                "--n); a picture that was drawn in such a batch is drawn again on a machine that holds it."
            )

    def check_asked(self, settings: Settings, captions: int) -> None:
        """The same for the largest batch of so many captions, before anything is loaded.

        Raises:
            ConfigError: it takes more memory than there is.
        """
        n, batch = settings.n, settings.batch
        if settings.search:
            self.check(settings, n)
        elif batch:  # without a number as many are drawn together as there is room for
            self.check(settings, min(batch, n) * max(1, min(captions, batch // n)))

    def window(self, settings: Settings, pictures: int) -> int:
        """How many positions of each picture a pass computes."""
        rows = _GPU_ROWS if self.device.type == "cuda" else _CPU_ROWS if self.cfg.dalle.width >= _CPU_WIDTH else 0
        return settings.window or max(1, min(_MOST_WINDOW, self.cfg.stream_shape().grid, rows // pictures))


def available(device: torch.device) -> int:
    """Bytes of free memory of the device; for a CPU no more than a container may have. A very large number if that is not known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = [_UNKNOWN]
    with suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")))
    with suppress(OSError, ValueError):  # ValueError: "max", no limit
        found.append(int(_CONTAINER.read_text()))
    return min(found)
