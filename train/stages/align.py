"""Stage align: trained transformer -> one whose captions count for more (``launcher.py align RUN``). In: codes/, tokenizer/, dalle/export. Out: align/checkpoints,
align/export (averaged weights)."""

from __future__ import annotations

from infra.errors import DataError
from infra.run_folder import RunFolder
from infra.signals import StopFlag
from infra.world import World
from train.config import RunConfig
from train.run import lineage, places
from train.stages import dalle
from train.weights import checkpoint, export


def run(cfg: RunConfig, run: RunFolder, world: World, stop: StopFlag) -> None:
    """Train until align_fit.steps, export the averaged weights, and mark the stage as done.

    Raises:
        DataError: stage dalle has not finished or is out of date, or was trained further since this stage began.
    """
    places.require(run, "tokenizer", "encode", "dalle")
    begin = run.at("dalle", "export")
    identity = str(export.describe(begin)["content_hash"])
    if world.is_main:
        _check(cfg, run, identity)
    contrasting = cfg.model_copy(update={"dalle_fit": cfg.fit("align", begin)})
    dalle.train("align", contrasting, cfg, run, world, stop, parents={"dalle": identity})


def _check(cfg: RunConfig, run: RunFolder, identity: str) -> None:
    if not places.finished(cfg, run, "dalle"):
        raise DataError(f"{run.at('dalle')} is to be trained further (dalle_fit.steps = {cfg.dalle_fit.steps}); align the result. Nothing was begun.")
    if old := lineage.out_of_date(cfg, run, "dalle"):
        raise DataError(f"dalle is out of date: {old}; {lineage.remedy(run, 'dalle')}, then align it.")
    if not (steps := checkpoint.complete(run.at("align"))):
        return
    began = checkpoint.read_meta(checkpoint.folder(run.at("align"), steps[-1]))["parents"]["dalle"]
    if began != identity:
        raise DataError(f"align began with dalle {began[:12]}, which is {identity[:12]} by now; {lineage.remedy(run, 'align')}, which begins anew.")
