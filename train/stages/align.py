"""Stage align: trained transformer -> one whose captions count for more (``launcher.py align RUN``). In: codes/, tokenizer/, dalle/export. Out: align/checkpoints,
align/export (averaged weights)."""

from __future__ import annotations

from infra.run_folder import RunFolder
from infra.signals import StopFlag
from infra.world import World
from train.config import RunConfig
from train.run import places
from train.stages import dalle
from train.weights import export


def run(cfg: RunConfig, run: RunFolder, world: World, stop: StopFlag) -> None:
    """Train until align_fit.steps, export the averaged weights, and mark the stage as done."""
    places.require(run, "tokenizer", "encode", "dalle")
    begin = run.at("dalle", "export")
    contrasting = cfg.model_copy(update={"dalle_fit": cfg.fit("align", begin)})
    dalle.train("align", contrasting, cfg, run, world, stop, parents={"dalle": export.describe(begin)["content_hash"]})
