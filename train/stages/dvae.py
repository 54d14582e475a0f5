"""Stage dvae: image shards -> trained dVAE (``launcher.py dvae PRESET``). In: images/train. Out: dvae/checkpoints, dvae/export (averaged weights)."""

from __future__ import annotations

import json
import math

import torch

from data_pipeline.loading.loaders import SequentialReader, ShardLoader, image_collate
from data_pipeline.loading.transforms import dvae_transform, view_transform
from infra.commands import launcher
from infra.config import to_json
from infra.errors import ConfigError
from infra.run_folder import RunFolder
from infra.seeds import derive
from infra.signals import StopFlag
from infra.world import World
from model.dvae import DVAE
from model.dvae_flops import train_flops
from train.config import RunConfig
from train.engines.replicated import ReplicatedEngine
from train.loop.trainer import Trainer
from train.optimizer.loss_scale import LossScale
from train.ranks.device import branch_dtype, matrix_peak, set_up, wait_for_all
from train.run import places
from train.run.data_inputs import loader_options, open_images
from train.run.inputs import micro_batch
from train.stages.dvae_task import DvaeTask
from train.stages.finish import finish_training


def run(cfg: RunConfig, run: RunFolder, world: World, stop: StopFlag) -> None:
    """Train until dvae_fit.steps, export the averaged weights, and mark the stage as done."""
    if cfg.dvae.kind != "dvae":
        raise ConfigError(
            f"dvae.kind = '{cfg.dvae.kind}' is imported, not trained: run '{launcher('import-vqgan', 'FILE', run.url)}' with its weights."
        )
    places.require(run, "prepare")
    device = set_up(world)
    fit = cfg.dvae_fit
    training = open_images(cfg, run, "train")
    validation = open_images(cfg, run, "validation")
    torch.manual_seed(derive(cfg.run.seed, "init"))  # the same initial weights on every rank
    floor = -math.inf if fit.min_ln_b is None else fit.min_ln_b
    dtype = branch_dtype(fit.precision, device, run, world)
    model = DVAE(cfg.dvae, dtype, floor).to(device)
    if fit.activation_checkpointing:
        model.recompute_blocks()
    if fit.compile:
        model.compile_groups()
    engine = ReplicatedEngine(
        model,
        world,
        betas=(0.9, 0.999),
        weight_decay=fit.weight_decay,
        ema=fit.ema,
        clip_norm=math.inf if fit.clip_norm is None else fit.clip_norm,
        loss_scale=LossScale() if dtype == torch.float16 else None,
    )
    loader = ShardLoader(
        [training],
        run.url,
        world,
        micro_batch(cfg.dvae_fit, "dvae_fit", world),
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
    peak = matrix_peak(dtype, device) if world.is_main else 0.0
    flops = train_flops(cfg.dvae)
    outcome = Trainer("dvae", task, engine, loader, fit, run, world, stop, device, meta, flops, peak).run_to_end()
    finish_training("dvae", cfg.dvae, engine, outcome, "images/s", lineage, run, world)
    wait_for_all()
