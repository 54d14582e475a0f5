"""Stage tokenizer: captions of the training split -> sentencepiece BPE (``launcher.py tokenizer PRESET``)."""

from __future__ import annotations

import time

from data_pipeline import tokenizer
from infra.run_folder import RunFolder, producer
from infra.signals import StopFlag
from infra.world import World
from train.config import RunConfig
from train.run import places
from train.run.inputs import open_images


def run(cfg: RunConfig, run: RunFolder, world: World, stop: StopFlag) -> None:
    """Train the tokenizer, unless one for the same captions exists, and mark the stage as done."""
    started = time.monotonic()
    stop.phase("the tokenizer's training")
    places.require(run, "prepare")
    training = open_images(cfg, run, "train")
    summary = tokenizer.run(cfg.tokenizer, training, places.tokenizer(cfg, run), producer(), shared=bool(cfg.data.tokenizer))
    run.finish("tokenizer", seconds=time.monotonic() - started, world_size=1, summary=summary, parents={"images": training.content_hash})
