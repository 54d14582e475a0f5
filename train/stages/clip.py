"""Stage clip: image shards -> contrastive model that reranks pictures (``launcher.py clip PRESET``). In: images/, tokenizer/. Out: clip/export."""

from __future__ import annotations

import json

import torch

from data_pipeline.loading.loaders import SequentialReader, ShardLoader, image_collate
from data_pipeline.loading.transforms import pair_transform, view_transform
from infra.config import to_json
from infra.run_folder import RunFolder
from infra.seeds import derive
from infra.signals import StopFlag
from infra.world import World
from model.clip import Clip
from train.config import ClipFit, RunConfig
from train.engines.replicated import ReplicatedEngine
from train.loop.trainer import Trainer
from train.ranks.device import branch_dtype, set_up, wait_for_all
from train.run import places
from train.run.inputs import loader_options, micro_batch, open_images, open_tokenizer
from train.stages.clip_task import BothTowers, ClipTask
from train.stages.finish import finish_training


def run(cfg: RunConfig, run: RunFolder, world: World, stop: StopFlag) -> None:
    """Train until clip_fit.steps, export the averaged weights, and mark the stage as done."""
    places.require(run, "prepare", "tokenizer")
    device = set_up(world)
    fit = cfg.clip_fit
    training = open_images(cfg, run, "train")
    validation = open_images(cfg, run, "validation")
    tokenizer, tokenizer_hash = open_tokenizer(cfg, run)
    torch.manual_seed(derive(cfg.run.seed, "init"))  # the same initial weights on every rank
    clip = Clip(cfg.clip, cfg.dvae.image_size, cfg.tokenizer.max_tokens, cfg.tokenizer.vocab).to(device)
    if fit.activation_checkpointing:
        clip.recompute_blocks()
    dtype = torch.float32 if fit.precision == "auto" and device.type == "cpu" else branch_dtype(fit.precision, device, run, world)
    engine = clip_engine(clip, fit, world, dtype)
    scale_max = cfg.encode.scale_max if fit.scale_max is None else fit.scale_max
    view = pair_transform(cfg.dvae.image_size, scale_max, tokenizer, cfg.run.seed, decoding=cfg.data.decode, mirror=fit.mirror)
    loader = ShardLoader(
        [training],
        run.url,
        world,
        micro_batch(cfg, "clip_fit", world),
        cfg.run.seed,
        transform=view,
        collate=image_collate,
        batch_key="clip_fit.batch",
        **loader_options(cfg.data),
    )
    plain = view_transform(cfg.dvae.image_size, tokenizer)
    reader = SequentialReader(validation, world, fit.eval_samples, cfg.evaluate.batch, plain, image_collate, mix_seed=cfg.run.seed)
    lineage = {"images": training.content_hash, "tokenizer": tokenizer_hash}
    meta = {"config": json.loads(to_json(cfg)), "parents": lineage}
    outcome = Trainer("clip", ClipTask(cfg, world, device, reader), engine, loader, fit, run, world, stop, device, meta).run_to_end()
    engine.average.values = {name.removeprefix("clip."): value for name, value in engine.average.values.items()}
    finish_training("clip", cfg.clip, engine, outcome, "images/s", lineage, run, world)
    wait_for_all()


def clip_engine(clip: Clip, fit: ClipFit, world: World, dtype: torch.dtype = torch.float32) -> ReplicatedEngine:
    """The engine of the contrastive model, whose large products are computed in ``dtype``. After each update, the model's scale is clipped to its limit."""
    return ReplicatedEngine(
        BothTowers(clip, dtype), world, betas=(0.9, 0.98), weight_decay=fit.weight_decay, ema=fit.ema, clip_norm=1.0, after_step=clip.limit_scale
    )
