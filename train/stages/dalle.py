"""Stage dalle: code shards -> trained transformer (``launcher.py dalle PRESET``). In: codes/, tokenizer/. Out: dalle/checkpoints, dalle/export (averaged weights)."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
import torch.distributed as dist

from infra import storage
from infra.config import to_json
from infra.errors import ConfigError
from infra.run_folder import RunFolder
from infra.seeds import derive
from infra.signals import StopFlag
from infra.world import World
from train.config import DalleFit, RunConfig
from train.drawing.while_training import Samples
from train.engines.zero.construction import sharded_construction
from train.engines.zero.engine import ZeroEngine
from train.loop.plateau import Plateau
from train.loop.trainer import RESTORE_PATIENCE, Trainer
from train.optimizer import apex_parts
from train.planning.flops import update_flops
from train.ranks import watchdog
from train.ranks.device import branch_dtype, matrix_peak, patient_group, set_up, wait_for_all
from train.run import attention_engine, places
from train.run.data_inputs import open_tokenizer
from train.run.inputs import build_dalle, micro_batch
from train.stages import dalle_batches, dalle_contrast, dalle_init_from
from train.stages.dalle_contrast import ContrastTask
from train.stages.dalle_task import DalleTask
from train.stages.finish import finish_training
from train.weights import checkpoint


def run(cfg: RunConfig, run: RunFolder, world: World, stop: StopFlag) -> None:
    """Train until dalle_fit.steps, export the averaged weights, and mark the stage as done."""
    places.require(run, "tokenizer", "encode")
    train("dalle", cfg, cfg, run, world, stop, {})


def train(stage: str, cfg: RunConfig, stored: RunConfig, run: RunFolder, world: World, stop: StopFlag, parents: Mapping[str, str]) -> None:
    """Train the transformer as one of the two stages that do, with section dalle_fit of ``cfg``.

    Args:
        stored: the run's configuration as its checkpoints name it.
        parents: content hashes of what it is made from besides codes, dVAE and tokenizer.
    """
    device = set_up(world)
    fit = cfg.dalle_fit
    tokenizer, tokenizer_hash = open_tokenizer(cfg, run)
    loader = dalle_batches.training(cfg, run, world, tokenizer, micro_batch(fit, f"{stage}_fit", world), f"{stage}_fit.batch")
    reader = dalle_batches.validation(cfg, run, world, tokenizer, fit.eval_samples)
    torch.manual_seed(derive(cfg.run.seed, "init"))  # the same initial weights on every rank
    dtype = branch_dtype(fit.precision, device, run, world)
    norm = apex_parts.layer_norm("dalle_fit.norm") if fit.norm == "apex" else None
    attend = attention_engine.of_run(cfg, run, world, device, dtype)
    with sharded_construction(fit, cfg.zero, world):
        model = build_dalle(
            cfg, device, dtype, attend, checkpoint_every=fit.checkpoint_every if fit.activation_checkpointing else 0, norm=norm, z_loss=fit.z_loss
        )
    codes = loader.sets[0]
    lineage = {"codes": codes.content_hash, "dvae": codes.manifest["parents"]["dvae"], "tokenizer": tokenizer_hash, **parents}
    engine = ZeroEngine(model, fit, cfg.zero, world, cfg.scales, cfg.compression, cfg.run.seed)
    with watchdog.expecting(RESTORE_PATIENCE):
        # Only at the very start: a checkpoint holds later weights, and names the export that they started from.
        if fit.init_from and not checkpoint.any_complete(run.at(stage), world):
            if world.is_main:
                dalle_init_from.say_differences(fit.init_from, cfg.dalle, "dalle_fit.init_from")
            if fit.contrasts:
                dalle_init_from.refuse_another_language(fit.init_from, cfg.dalle, lineage, "dalle_fit.init_from")
            began = dalle_init_from.load(engine, fit.init_from, "dalle_fit.init_from")
            lineage["init_from" if stage == "dalle" else "dalle"] = began
    if world.is_main:
        storage.write_json(run.at(stage, "deepspeed.json"), engine.config)  # only for people to read
    meta = {"config": json.loads(to_json(stored)), "parents": lineage}
    task = ContrastTask(cfg, device, model, reader, world) if fit.contrasts else DalleTask(cfg, device, model, reader)
    plateau = make_plateau(fit, run, world) if fit.schedule == "plateau" else None
    # On a CPU, fp16 has no meaningful peak: its rate differs by a factor of ten with the memory layout of the matrices.
    peak = matrix_peak(dtype, device) if world.is_main and (device.type == "cuda" or dtype != torch.float16) else 0.0
    flops = update_flops(cfg.dalle, model.shape, contrasts=fit.contrasts) / model.shape.states
    onlooker = None
    if cfg.samples.every and stage == "dalle" and world.is_main:
        onlooker = Samples(cfg, run, world, stop, gpu=device.type == "cuda", threads=torch.get_num_threads())
    outcome = Trainer(stage, task, engine, loader, fit, run, world, stop, device, meta, flops, peak, plateau, onlooker).run_to_end()
    if fit.contrasts and world.is_main:
        print(dalle_contrast.described(outcome.evaluation), flush=True)
    # The averaged weights are read back from the checkpoint of the last update. To gather the shards instead would also need one process that holds the whole model.
    url = run.at(stage)
    averaged = checkpoint.StoredTensors(checkpoint.folder(url, checkpoint.complete(url)[-1]), "average") if world.is_main else None
    finish_training(stage, cfg.dalle, engine, outcome, "tokens/s", lineage, run, world, averaged)
    wait_for_all()


def make_plateau(fit: DalleFit, run: RunFolder, world: World) -> Plateau:
    """The detector of plateaus. If ``<run>/dalle/halve_at.json`` exists, its list of updates replaces dalle_fit.halve_at; it is read at each start. Collective.

    Raises:
        ConfigError: the file does not hold a list of distinct updates.
    """
    at: list[tuple[int, ...] | None] = [fit.halve_at or None]
    url = run.at("dalle", "halve_at.json")
    if world.is_main and storage.exists(url):
        at = [_read_halvings(url)]  # an empty list means that nothing is halved
    if world.size > 1:
        dist.broadcast_object_list(at, group=patient_group())  # over gloo, which notices at once if the main rank has failed
    return Plateau(fit.plateau_window, fit.plateau_patience, fit.plateau_threshold, fit.halvings, fit.warmup_steps, at[0])


def _read_halvings(url: str) -> tuple[int, ...]:
    given = storage.read_json(url)
    if not isinstance(given, list) or not all(type(update) is int and update > 0 for update in given) or len(set(given)) < len(given):
        raise ConfigError(f"{url} holds {given!r}; expected a list of updates after which to halve the step size, each once, such as [20000, 50000].")
    return tuple(given)
