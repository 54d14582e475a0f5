"""Stage tokenizer: captions of the training split -> sentencepiece BPE (``launcher.py tokenizer PRESET``)."""

from __future__ import annotations

import time

from data_pipeline import tokenizer
from infra import storage
from infra.errors import DataError
from infra.run_folder import RunFolder, producer
from infra.signals import StopFlag
from infra.world import World
from train.config import RunConfig
from train.run import places
from train.run.data_inputs import open_images


def run(cfg: RunConfig, run: RunFolder, world: World, stop: StopFlag) -> None:
    """Train the tokenizer, unless one for the same captions exists, and mark the stage as done.

    Raises:
        DataError: ``data.tokenizer`` names a place that holds a tokenizer of other captions or settings.
    """
    started = time.monotonic()
    stop.phase("the tokenizer's training")
    places.require(run, "prepare")
    training = open_images(cfg, run, "train")
    if cfg.data.tokenizer:
        check_shared(cfg, training.content_hash)
    summary = tokenizer.run(cfg.tokenizer, training, places.tokenizer(cfg, run), producer())
    run.finish("tokenizer", seconds=time.monotonic() - started, world_size=1, summary=summary, parents={"images": training.content_hash})


def check_shared(cfg: RunConfig, images: str) -> None:
    """Refuse to train anew what other runs may use.

    Args:
        images: content hash of the training images.

    Raises:
        DataError: ``data.tokenizer`` holds a tokenizer of other captions or settings.
    """
    url = cfg.data.tokenizer
    if not storage.exists(storage.join(url, tokenizer.MANIFEST)):
        return
    found = tokenizer.read_manifest(url)
    other = [
        what
        for what, same in (
            ("captions", found["parents"] == {"images": images}),
            ("settings", found["settings"] == tokenizer.settings_of(cfg.tokenizer)),
        )
        if not same
    ]
    if other:
        raise DataError(
            f"data.tokenizer = {url}: holds a tokenizer of other {' and '.join(other)}, which other runs may use, so it is not trained anew; "
            "name another folder, or leave data.tokenizer empty for one of this run's own."
        )
