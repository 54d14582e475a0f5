"""Draws codes and pictures for captions, in batches that fit into memory. Used by ``launcher.py draw``, ``load(...).draw`` and the stage generate."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from infra.errors import CheckpointError
from model.sampling import NotFiniteError, Sampling, begin
from train.drawing.settings import Settings
from train.drawing.source import Models
from train.report.images import to_array


@dataclass(frozen=True)
class Picture:
    """A drawn picture, and everything on which its bits depend."""

    caption: str
    candidate: int
    seed: int
    pixels_YXC: NDArray[np.uint8]
    codes_I: NDArray[np.int64]
    shaped_by: dict[str, Any]
    """Precision, device, threads, and the batch: how many captions, how many pictures of each, which of them this one is, and the window. After a search also
    'ancestry': pairs of a position and the seed of the codes from there on."""

    @property
    def codes_hash(self) -> str:
        return hashlib.sha256(self.codes_I.astype("<u2").tobytes()).hexdigest()


@dataclass(frozen=True)
class Batch:
    """Pictures that are drawn together: the same candidates of several captions, or some candidates of one."""

    captions: tuple[str, ...]
    candidates: tuple[int, ...]

    @property
    def size(self) -> int:
        return len(self.captions) * len(self.candidates)


Listen = Callable[[Batch, Tensor, Tensor], None]
"""Called after each pass with the codes so far, int64 [B, I], and how many codes of each picture are drawn. May raise an exception to end the drawing."""


def plan(captions: Sequence[str], candidates: Sequence[int], width: int) -> Iterator[Batch]:
    """Divide the pictures into batches of at most ``width``. A batch has several captions only if it holds all candidates of each, so that each has equally many."""
    several = max(1, width // len(candidates))
    for start in range(0, len(captions), several):
        some = tuple(captions[start : start + several])
        for first in range(0, len(candidates), width):
            yield Batch(some, tuple(candidates[first : first + width]))


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
        prefix: codes of the first rows of a given image.
        candidates: draw only these; None: all.
        listen: see Listen.

    Raises:
        ConfigError: this model cannot draw with these settings.
        CheckpointError: the logits are NaN, because the weights are damaged.
    """
    settings.check(models.cfg)
    wanted = list(range(settings.n)) if candidates is None else list(candidates)
    if not wanted:
        return
    if settings.search:
        from train.drawing.search import search

        for caption in captions:
            yield [picture for picture in search(models, caption, settings, prefix, listen) if picture.candidate in wanted]
        return
    for batch in plan(captions, wanted, models.room.batch_width(settings)):
        yield draw_batch(models, batch, settings, prefix, listen)


def draw_batch(models: Models, batch: Batch, settings: Settings, prefix: Sequence[int] = (), listen: Listen | None = None) -> list[Picture]:
    """Draw one batch; see ``draw``."""
    of_caption = {caption: settings.seeds(caption) for caption in dict.fromkeys(batch.captions)}  # once: of n candidates, each has n seeds
    seeds = [of_caption[caption][candidate] for caption in batch.captions for candidate in batch.candidates]
    run = begin_batch(models, batch, settings, seeds, prefix)
    run_to(models, run, run.total, batch, listen)
    return finished(models, batch, run, seeds)


def begin_batch(models: Models, batch: Batch, settings: Settings, seeds: Sequence[int], prefix: Sequence[int]) -> Sampling:
    """Compute the captions and the given codes of a batch, with a seed for each picture.

    Raises:
        ConfigError: it takes more memory than there is.
    """
    models.room.check(settings, batch.size)
    encoded = [models.tokenizer.encode(caption) for caption in batch.captions]
    text_CT = torch.from_numpy(np.stack([ids for ids, _ in encoded])).to(models.device)
    lengths_C = torch.tensor([length for _, length in encoded], device=models.device)
    prefix_BP = torch.tensor([list(prefix)], dtype=torch.int64, device=models.device).expand(batch.size, -1) if prefix else None
    window = models.room.window(settings, batch.size)
    return begin(models.weights, text_CT, lengths_C, seeds, settings.rule, prefix_BP=prefix_BP, window=window)


@torch.no_grad()
def run_to(models: Models, run: Sampling, end: int, batch: Batch, listen: Listen | None) -> None:
    """Draw the codes up to a position.

    Raises:
        CheckpointError: the logits are NaN, because the weights are damaged.
    """
    try:
        run.run_to(end, None if listen is None else lambda codes_BI, known_B: listen(batch, codes_BI, known_B))
    except NotFiniteError as error:
        raise CheckpointError(
            f"{models.url}: {error}: the weights ({models.description}) are broken; draw with those of another checkpoint."
        ) from error


def finished(models: Models, batch: Batch, run: Sampling, seeds: Sequence[int], more: Sequence[dict[str, Any]] = ()) -> list[Picture]:
    """The pictures of a batch whose codes are drawn.

    Args:
        seeds: of the last codes of each picture.
        more: what else has shaped each picture.
    """
    arithmetic = {
        "precision": models.precision,
        "deterministic": models.is_deterministic,
        "device": models.device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    arrays = decode(models, run.codes_BI)
    out = []
    for place, (caption, candidate) in enumerate((caption, candidate) for caption in batch.captions for candidate in batch.candidates):
        layout = {"captions": len(batch.captions), "each": len(batch.candidates), "place": place, "window": run.window}
        shaped = arithmetic | layout | (more[place] if more else {})
        out.append(Picture(caption, candidate, seeds[place], arrays[place], run.codes_BI[place].cpu().numpy(), shaped))
    return out


def decode(models: Models, codes_BI: Tensor) -> list[NDArray[np.uint8]]:
    """Decode codes to pictures, uint8 [S, S, 3]. They are decoded one at a time, so that the bits of a picture depend only on its codes."""
    grid = models.weights.shape.grid
    return [to_array(models.dvae.decode(codes_I.view(1, grid, grid))[0]) for codes_I in codes_BI]


@torch.no_grad()
def score(models: Models, pictures: Sequence[Picture]) -> list[float]:
    """How well each picture fits its caption according to the contrastive model: the cosines of their embeddings."""
    return [score_one(models, picture.caption, picture.pixels_YXC) for picture in pictures]


def score_one(models: Models, caption: str, pixels_YXC: NDArray[np.uint8]) -> float:
    """The same for one picture."""
    image_1E, text_1E = embeddings(models, caption, pixels_YXC)
    return float(image_1E @ text_1E.T)


@torch.no_grad()
def embeddings(models: Models, caption: str, pixels_YXC: NDArray[np.uint8]) -> tuple[Tensor, Tensor]:
    """A picture's and its caption's embeddings by the contrastive model, [1, E] each."""
    assert models.clip is not None
    pixels_13YX = torch.from_numpy(pixels_YXC).permute(2, 0, 1)[None].float().div(255).to(models.device)
    return models.clip.encode_image(pixels_13YX), models.clip.encode_caption(caption)
