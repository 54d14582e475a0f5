"""Codes and pictures for captions, in batches that fit into memory. Behind ``launcher.py draw``, ``load(...).draw`` and the stage generate."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from infra.errors import CheckpointError
from model.decoder import cache_bytes, text_bytes
from model.sampling import NotFiniteError, sample
from train.drawing.settings import Settings
from train.drawing.source import Models
from train.report.images import to_array

_CPU_BYTES, _CPU_PICTURES = 1 << 30, 64
"""On a CPU a batch takes at most this much, and so many pictures: beyond them nothing gets faster, and the first picture comes later."""
_SHARE_OF_FREE = 0.5
_CPU_ROWS, _GPU_ROWS, _GPU_WINDOW = 8, 1 << 12, 16
"""States that a pass computes for about the price of one: that of reading the weights."""


@dataclass(frozen=True)
class Picture:
    """A drawn picture, and all that shaped its bits."""

    caption: str
    candidate: int
    seed: int
    pixels_YXC: NDArray[np.uint8]
    codes_I: NDArray[np.int64]
    shaped_by: dict[str, Any]
    """Precision, device, threads, and the batch: captions, pictures of each, which of them this one is, and the window."""

    @property
    def codes_hash(self) -> str:
        return hashlib.sha256(self.codes_I.astype("<u2").tobytes()).hexdigest()


@dataclass(frozen=True)
class Batch:
    """Pictures drawn at once: the same candidates of several captions, or some candidates of one."""

    captions: tuple[str, ...]
    candidates: tuple[int, ...]

    @property
    def size(self) -> int:
        return len(self.captions) * len(self.candidates)


Listen = Callable[[Batch, Tensor, Tensor], None]
"""Called after each pass with the codes so far, int64 [B, I], and how many of each picture are drawn; may raise to end the drawing."""


def plan(captions: Sequence[str], candidates: Sequence[int], width: int) -> Iterator[Batch]:
    """Batches of at most ``width`` pictures. Several captions share one only with all of their candidates, so that each caption of a batch has equally many."""
    several = max(1, width // len(candidates))
    for start in range(0, len(captions), several):
        some = tuple(captions[start : start + several])
        for first in range(0, len(candidates), width):
            yield Batch(some, tuple(candidates[first : first + width]))


def batch_width(models: Models, settings: Settings) -> int:
    """Pictures drawn at once: what was asked for, or what memory allows."""
    if settings.batch:
        return settings.batch
    cfg, shape = models.cfg.dalle, models.weights.shape
    copies = 1 if settings.guidance == 1 else 2
    window = max(1, settings.window)
    logits = 4 * 4 * window * shape.image_vocab  # with their noise, and a copy or two
    each = copies * (cache_bytes(cfg, shape, models.weights.dtype.itemsize, window) + logits)
    each += text_bytes(cfg, shape, models.weights.dtype.itemsize)  # at worst each picture has a caption of its own
    if models.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(models.device)
        return max(1, int(_SHARE_OF_FREE * free) // each)
    return max(1, min(_CPU_PICTURES, min(_CPU_BYTES, _available()) // each))


def _available() -> int:
    """Bytes of memory that this machine can give; a great many where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return _CPU_BYTES
    return int(_SHARE_OF_FREE * 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")))


def window_of(models: Models, settings: Settings, pictures: int) -> int:
    """Positions of each picture computed in one pass."""
    rows = _GPU_ROWS if models.device.type == "cuda" else _CPU_ROWS
    return settings.window or max(1, min(_GPU_WINDOW, models.weights.shape.grid, rows // pictures))


def draw(
    models: Models,
    captions: Sequence[str],
    settings: Settings,
    prefix: Sequence[int] = (),
    *,
    candidates: Sequence[int] | None = None,
    listen: Listen | None = None,
) -> Iterator[list[Picture]]:
    """Draw ``settings.n`` pictures of each caption, batch by batch.

    Args:
        prefix: codes of a given image, its first rows.
        candidates: only these; None: all.
        listen: see Listen.

    Raises:
        ConfigError: settings that this model cannot be drawn with.
        CheckpointError: its weights give logits that are no numbers.
    """
    settings.check(models.cfg)
    wanted = list(range(settings.n)) if candidates is None else list(candidates)
    if not wanted:
        return
    for batch in plan(captions, wanted, batch_width(models, settings)):
        yield draw_batch(models, batch, settings, prefix, listen)


def draw_batch(models: Models, batch: Batch, settings: Settings, prefix: Sequence[int] = (), listen: Listen | None = None) -> list[Picture]:
    """One batch; see ``draw``."""
    encoded = [models.tokenizer.encode(caption) for caption in batch.captions]
    text_CT = torch.from_numpy(np.stack([ids for ids, _ in encoded])).to(models.device)
    lengths_C = torch.tensor([length for _, length in encoded], device=models.device)
    seeds = [settings.seeds(caption)[candidate] for caption in batch.captions for candidate in batch.candidates]
    window = window_of(models, settings, batch.size)
    prefix_BP = torch.tensor([list(prefix)], dtype=torch.int64, device=models.device).expand(batch.size, -1) if prefix else None
    try:
        drawn = sample(
            models.weights,
            text_CT,
            lengths_C,
            seeds,
            settings.rule,
            prefix_BP=prefix_BP,
            window=window,
            after_pass=None if listen is None else lambda codes_BI, known_B: listen(batch, codes_BI, known_B),
        )
    except NotFiniteError as error:
        raise CheckpointError(
            f"{models.url}: {error}: the weights ({models.description}) are broken; draw with those of another checkpoint."
        ) from error
    arithmetic = {
        "precision": models.precision,
        "deterministic": models.is_deterministic,
        "device": models.device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    arrays = decode(models, drawn.codes_BI)
    out = []
    for place, (caption, candidate) in enumerate((caption, candidate) for caption in batch.captions for candidate in batch.candidates):
        layout = {"captions": len(batch.captions), "each": len(batch.candidates), "place": place, "window": window}
        out.append(Picture(caption, candidate, seeds[place], arrays[place], drawn.codes_BI[place].cpu().numpy(), arithmetic | layout))
    return out


def decode(models: Models, codes_BI: Tensor) -> list[NDArray[np.uint8]]:
    """Pictures, uint8 [S, S, 3], of codes. One at a time: a picture's bits depend on its codes alone."""
    grid = models.weights.shape.grid
    return [to_array(models.dvae.decode(codes_I.view(1, grid, grid))[0]) for codes_I in codes_BI]


@torch.no_grad()
def score(models: Models, pictures: Sequence[Picture]) -> list[float]:
    """How well each picture fits its caption, by the contrastive model: cosines."""
    assert models.clip is not None
    out = []
    for picture in pictures:
        ids, length = models.tokenizer.encode(picture.caption)
        text_1E = models.clip.encode_text(torch.from_numpy(ids)[None].to(models.device), torch.tensor([length], device=models.device))
        pixels_13YX = torch.from_numpy(picture.pixels_YXC).permute(2, 0, 1)[None].float().div(255).to(models.device)
        out.append(float(models.clip.encode_image(pixels_13YX) @ text_1E.T))
    return out
