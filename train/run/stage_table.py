"""The table of stages, in the order of the demo. The launcher, cluster jobs, ``status``, ``doctor`` and the report all read this one.

Needs no torch: the module of a stage is imported only when the stage runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from infra.job import Gpus

if TYPE_CHECKING:
    from infra.run_folder import RunFolder
    from infra.signals import StopFlag
    from infra.world import World
    from train.config import RunConfig

    StageFunction = Callable[[RunConfig, RunFolder, World, StopFlag], None]


@dataclass(frozen=True)
class Stage:
    """One stage: a module whose function ``run(cfg, run, world, stop)`` is called in every rank, and a description."""

    module: str
    title: str
    """What it makes, in a few words."""
    help: str
    needs: tuple[str, ...] = ()
    """Stages that must finish before it: those whose outputs it reads. A stage that one of these needs in turn is left out."""
    makes: tuple[str, ...] = ()
    """What it writes to the run folder for other stages, besides ``<stage>/done.json``."""
    trains: bool = False
    """Whether it trains a model: it then has metrics, checkpoints and an export, and may run on several nodes at once."""
    optional: bool = False
    """Whether a run has it only if its configuration gives it updates. What such a stage makes takes the place of what its first need made."""
    parallel: bool = True
    """Whether it can use more than one rank; if not, it runs in one."""
    repeats: bool = False
    """Whether it runs again although it has finished: for a stage that is cheap and shows the present state of the run."""
    shared: bool = False
    """Whether independent launchers may divide its work (infra/world.py: Share)."""
    gpus: Gpus = "node"
    """How many GPUs it requests from a scheduler: those of a node, one, or none."""
    preview: str = ""
    """Module whose function ``preview(cfg)`` returns further text for ``--dry-run``, without torch."""

    def function(self) -> StageFunction:
        """Import the stage's module and return its ``run``."""
        function: StageFunction = importlib.import_module(self.module).run
        return function

    def previewed(self, cfg: RunConfig) -> str:
        """The text that a dry run shows in addition to the configuration."""
        return str(importlib.import_module(self.preview).preview(cfg)) if self.preview else ""


STAGES: dict[str, Stage] = {
    "prepare": Stage(
        "train.stages.prepare",
        "Image shards from data.sources",
        "Read captioned images from data.sources, filter them, split off validation concepts, and write image shards.\n\n"
        "In: folders or embedded drawings. Out: images/train and images/validation (MDS shards with a manifest). "
        "If the stage is killed and run again, input shards that were finished are not read again. In a SLURM array or a Kubernetes Indexed Job, or with "
        "--share I/N, independent launchers divide the shards; the last one merges. --dry-run shows what the filters do to 1,000 records.",
        shared=True,
        gpus="none",
        preview="train.stages.prepare_preview",
        makes=("images",),
    ),
    "tokenizer": Stage(
        "train.stages.tokenizer",
        "The BPE tokenizer",
        "Train the sentencepiece BPE tokenizer on the captions of the training split.\n\nIn: images/train. Out: tokenizer/ (model and manifest).",
        parallel=False,
        gpus="none",
        needs=("prepare",),
        makes=("tokenizer",),
    ),
    "dvae": Stage(
        "train.stages.dvae",
        "The dVAE",
        "Stage 1: train the discrete VAE with the logit-Laplace ELB (paper 2.1, A.2).\n\n"
        "In: image shards. Out: dvae/checkpoints, averaged weights in dvae/export. Resumes from its last checkpoint.",
        needs=("prepare",),
        makes=("dvae/export",),
        trains=True,
    ),
    "encode": Stage(
        "train.stages.encode",
        "Code tokens",
        "Write code tokens: the argmax codes of the averaged encoder, on crops that are made as in Listing 2 of the paper.\n\n"
        "In: image shards, dVAE. Out: codes/crop-<k>/<split>, one output part for each input part. Divided among launchers like prepare.",
        shared=True,
        gpus="one",
        needs=("dvae",),
        makes=("codes",),
    ),
    "dalle": Stage(
        "train.stages.dalle",
        "The transformer",
        "Stage 2: train the transformer on text and image tokens with DeepSpeed ZeRO (paper 2.2, B).\n\n"
        "In: code shards, tokenizer. Out: dalle/checkpoints, averaged weights in dalle/export. Resumes from its last checkpoint.",
        needs=("tokenizer", "encode"),
        makes=("dalle/export",),
        trains=True,
    ),
    "align": Stage(
        "train.stages.align",
        "The transformer, aligned",
        "Fine-tune the trained transformer so that captions count for more: condition contrastive alignment (docs/small_data.md).\n\n"
        "In: code shards, tokenizer, dalle/export. Out: align/checkpoints, averaged weights in align/export, which the run draws with from then on; those of stage dalle "
        "stay. Without align_fit.steps: about 1 % of the computing time of stage dalle, at least 50 updates. Resumes from its last checkpoint.",
        needs=("dalle",),
        makes=("align/export",),
        trains=True,
        optional=True,
    ),
    "clip": Stage(
        "train.stages.clip",
        "The contrastive model",
        "Train the contrastive model that ranks pictures by how well they match their caption (paper 2.6).\n\nIn: image shards, tokenizer. Out: clip/export.",
        needs=("tokenizer",),
        makes=("clip/export",),
        trains=True,
    ),
    "generate": Stage(
        "train.stages.generate",
        "Ranked pictures",
        "Draw generate.candidates pictures for each caption, rank them with the contrastive model, and find each one's nearest training image.\n\n"
        "In: exports of dalle or align, dvae and clip. Out: generate/index.json and PNG files. Divided among launchers like prepare, by captions.",
        shared=True,
        gpus="one",
        needs=("align", "clip"),
        makes=("generate/index.json", "generate/grid.png"),
    ),
    "evaluate": Stage(
        "train.stages.evaluate",
        "Figures on the validation split",
        "Measure on the validation split: reconstruction, codebook use, cross-entropies under right and shuffled captions, retrieval.\n\n"
        "In: exports, code and image shards. Out: evaluate/metrics.json.",
        gpus="one",
        needs=("align", "clip"),
        makes=("evaluate/metrics.json",),
    ),
    "report": Stage(
        "train.stages.report",
        "report.html",
        "Write report.html: a self-contained page with curves, reconstructions, pictures, timings and credits of the run.",
        parallel=False,
        gpus="none",
        repeats=True,
        needs=("generate", "evaluate"),
        makes=("report.html",),
    ),
}


def used(steps: Callable[[str], int]) -> dict[str, Stage]:
    """The stages that a run has, each with those of its needs that the run has.

    Args:
        steps: how many updates the run's configuration gives a stage; asked of optional ones only.
    """
    without = {name for name, stage in STAGES.items() if stage.optional and not steps(name)}
    return {
        name: replace(stage, needs=tuple(part for need in stage.needs for part in (STAGES[need].needs if need in without else (need,))))
        for name, stage in STAGES.items()
        if name not in without
    }


def used_by(cfg: RunConfig) -> dict[str, Stage]:
    """The stages that a run with this configuration has."""
    return used(lambda name: int(getattr(cfg, f"{name}_fit").steps))


TRAINED = tuple(name for name, stage in STAGES.items() if stage.trains)
"""Stages that train, in the order of the table."""
