"""Stage clip: image shards -> contrastive model that reranks pictures (``launcher.py clip PRESET``). In: images/, tokenizer/. Out: clip/export."""

from __future__ import annotations

import json
from collections.abc import Callable

import torch

from data_pipeline.loading.loaders import SequentialReader, ShardLoader, image_collate
from data_pipeline.loading.transforms import Record, Sample, pair_transform, view_transform
from data_pipeline.shards.shard_set import ShardSet
from data_pipeline.tokenizer import Tokenizer
from infra.config import to_json
from infra.run_folder import RunFolder
from infra.seeds import derive
from infra.signals import StopFlag
from infra.world import World
from model.clip import Clip
from model.frozen_clip import FrozenHeads
from train.config import ClipFit, RunConfig
from train.engines.replicated import ReplicatedEngine
from train.loop.trainer import Batch, Trainer
from train.ranks.device import branch_dtype, set_up, wait_for_all
from train.ranks.leaving import Batches
from train.run import places
from train.run.data_inputs import loader_options, open_images, open_tokenizer
from train.run.inputs import micro_batch
from train.stages import clip_features
from train.stages.clip_task import BothHeads, BothTowers, ClipTask
from train.stages.finish import finish_training
from train.weights import towers
from train.weights.contrastive import build


def run(cfg: RunConfig, run: RunFolder, world: World, stop: StopFlag) -> None:
    """Train until clip_fit.steps, export the averaged weights, and mark the stage as done."""
    frozen = cfg.clip.towers == "frozen"
    if frozen:
        towers.check()  # before anything is loaded
    places.require(run, "prepare", "tokenizer")
    device = set_up(world)
    fit = cfg.clip_fit
    training = open_images(cfg, run, "train")
    tokenizer, tokenizer_hash = open_tokenizer(cfg, run)
    torch.manual_seed(derive(cfg.run.seed, "init"))  # the same initial weights on every rank
    clip = build(cfg.clip, cfg.dvae.image_size, cfg.tokenizer.max_tokens, cfg.tokenizer.vocab).to(device)
    if fit.activation_checkpointing and isinstance(clip, Clip):
        clip.recompute_blocks()
    dtype = torch.float32 if fit.precision == "auto" and device.type == "cpu" else branch_dtype(fit.precision, device, run, world)
    engine = clip_engine(clip, fit, world, dtype)
    plain = view_transform(cfg.dvae.image_size, tokenizer)
    validation = open_images(cfg, run, "validation")
    reader = SequentialReader(validation, world, fit.eval_samples, cfg.evaluate.batch, plain, image_collate, mix_seed=cfg.run.seed)
    own_view = _pixels(cfg, tokenizer), image_collate, reader, {"tokenizer": tokenizer_hash}
    transform, collate, held_out, made_from = _of_features(cfg, run, training, reader, world, stop, device) if frozen else own_view
    loader = ShardLoader(
        [training],
        run.url,
        world,
        micro_batch(cfg.clip_fit, "clip_fit", world),
        cfg.run.seed,
        transform=transform,
        collate=collate,
        batch_key="clip_fit.batch",
        **loader_options(cfg.data),
    )
    lineage = {"images": training.content_hash} | made_from
    meta = {"config": json.loads(to_json(cfg)), "parents": lineage}
    outcome = Trainer("clip", ClipTask(cfg, world, device, held_out), engine, loader, fit, run, world, stop, device, meta).run_to_end()
    engine.average.values = {name.removeprefix("clip."): value for name, value in engine.average.values.items()}
    finish_training("clip", cfg.clip, engine, outcome, "images/s", lineage, run, world)
    wait_for_all()
    if frozen and world.is_main:
        clip_features.forget(run)


_Inputs = tuple[Callable[[Record, int], Sample], Callable[[list[Sample]], Batch], Batches[Batch], dict[str, str]]
"""The transform and collation of training records, the batches of the evaluation, and what the model is made from besides images."""


def _pixels(cfg: RunConfig, tokenizer: Tokenizer) -> Callable[[Record, int], Sample]:
    fit = cfg.clip_fit
    largest = clip_features.scale_max(cfg)
    return pair_transform(cfg.dvae.image_size, largest, tokenizer, cfg.run.seed, decoding=cfg.data.decode, mirror=fit.mirror)


def _of_features(
    cfg: RunConfig, run: RunFolder, training: ShardSet, reader: SequentialReader[Sample, Batch], world: World, stop: StopFlag, device: torch.device
) -> _Inputs:
    """What heads on frozen towers are trained and evaluated with; the towers themselves are let go of. Collective."""
    found = towers.open_towers(device)
    features = clip_features.features(cfg, run, training, found, world, stop)
    stop.phase("the features of validation pictures")
    held_out = clip_features.of_batches(iter(reader), found)
    return clip_features.feature_transform(features, cfg.run.seed), clip_features.feature_collate, held_out, found.lineage


def clip_engine(clip: Clip | FrozenHeads, fit: ClipFit, world: World, dtype: torch.dtype = torch.float32) -> ReplicatedEngine:
    """The engine of the contrastive model, whose large products are computed in ``dtype``. After each update, the model's scale is clipped to its limit."""
    module = BothTowers(clip, dtype) if isinstance(clip, Clip) else BothHeads(clip, dtype)
    return ReplicatedEngine(module, world, betas=(0.9, 0.98), weight_decay=fit.weight_decay, ema=fit.ema, clip_norm=1.0, after_step=clip.limit_scale)
