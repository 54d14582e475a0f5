"""Stage dvae: image shards -> trained dVAE (``launcher.py dvae PRESET``). In: images/train. Out: dvae/checkpoints, dvae/export (averaged weights)."""

from __future__ import annotations

import json
import math

import torch

from data_pipeline.loaders import SequentialReader, ShardLoader, image_collate
from data_pipeline.transforms import dvae_transform, view_transform
from infra.config import to_json
from infra.run_folder import RunFolder
from infra.seeds import derive
from infra.signals import StopFlag
from infra.world import World
from model.dvae import DVAE
from train import places
from train.common import finish_training, loader_options, micro_batch
from train.config import RunConfig
from train.device import branch_dtype, set_up, wait_for_all
from train.dvae_task import DvaeTask
from train.engine import ReplicatedEngine
from train.fit import Fit
from train.lineage import open_images


def run(cfg: RunConfig, run: RunFolder, world: World, stop: StopFlag) -> None:
    """Train to dvae_fit.steps, export the averaged weights and mark the stage done."""
    places.require(run, "prepare")
    device = set_up(world)
    fit = cfg.dvae_fit
    training = open_images(cfg, run, "train")
    validation = open_images(cfg, run, "validation")
    torch.manual_seed(derive(cfg.run.seed, "init"))  # the same initial weights on every rank
    floor = -math.inf if fit.min_ln_b is None else fit.min_ln_b
    model = DVAE(cfg.dvae, branch_dtype(fit.precision, device, run, world), floor).to(device)
    clip_norm = math.inf if fit.clip_norm is None else fit.clip_norm
    engine = ReplicatedEngine(model, world, betas=(0.9, 0.999), weight_decay=fit.weight_decay, ema=fit.ema, clip_norm=clip_norm)
    loader = ShardLoader(
        [training],
        run.url,
        world,
        micro_batch(cfg, "dvae_fit", world),
        cfg.run.seed,
        transform=dvae_transform(cfg.dvae.image_size, fit.scale_min, fit.scale_max, cfg.run.seed, cfg.data.decode),
        collate=image_collate,
        batch_key="dvae_fit.batch",
        **loader_options(cfg.data),
    )
    reader = SequentialReader(validation, world, fit.eval_samples, cfg.evaluate.batch, view_transform(cfg.dvae.image_size), image_collate)
    lineage = {"images": training.content_hash}
    meta = {"config": json.loads(to_json(cfg)), "parents": lineage}
    task = DvaeTask(cfg, run, world, device, reader)
    outcome = Fit("dvae", task, engine, loader, fit, run, world, stop, device, meta).run_to_end()
    finish_training("dvae", cfg.dvae, engine, outcome, "images/s", lineage, run, world)
    wait_for_all()
