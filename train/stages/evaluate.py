"""Stage evaluate: measures the exported models on the validation split (``launcher.py evaluate PRESET``). Out: evaluate/metrics.json, and with
evaluate.drawings also evaluate/drawings.json."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from data_pipeline.loading.loaders import SequentialReader, code_collate, image_collate
from data_pipeline.loading.transforms import code_transform, view_transform
from infra import storage
from infra.run_folder import RunFolder
from infra.signals import StopFlag
from infra.world import World
from train.config import RunConfig
from train.evaluation.codes import code_statistics
from train.evaluation.pixels import psnr
from train.ranks.device import branch_dtype, set_up, wait_for_all
from train.run import places
from train.run.data_inputs import open_images
from train.run.inputs import Exports, open_codes, open_exports
from train.stages import evaluate_drawings
from train.stages.clip_task import recall_at_1
from train.stages.dalle_task import cross_entropies


def run(cfg: RunConfig, run: RunFolder, world: World, stop: StopFlag) -> None:
    """Measure on all ranks; the main rank writes the figures."""
    started = time.monotonic()
    if cfg.evaluate.drawings:
        evaluate_drawings.check(cfg, run)  # before anything is loaded
    places.require(run, "encode", "dalle", "clip")
    device = set_up(world)
    models = open_exports(cfg, run, world, device, branch_dtype(cfg.dalle_fit.precision, device, run, world))
    images = open_images(cfg, run, "validation")
    codes = open_codes(cfg, run, 0, "validation")
    samples, batch = cfg.evaluate.samples, cfg.evaluate.batch
    pairs = SequentialReader(
        images, world, samples, batch, view_transform(cfg.dvae.image_size, models.tokenizer), image_collate, mix_seed=cfg.run.seed
    )
    tokens = SequentialReader(
        codes,
        world,
        samples,
        batch,
        code_transform(models.tokenizer, cfg.run.seed, first_caption=True, positions=cfg.dvae.grid**2, vocab=cfg.dvae.vocab),
        code_collate,
    )
    stop.phase("the evaluation")
    figures = _on_images(cfg, models, pairs, device) | _unigram(cfg, tokens, device)
    with torch.no_grad():
        ce = cross_entropies(models.dalle, tokens, device, models.dalle.text_counts, rows=cfg.dvae.grid)
    unigram = figures["unigram_entropy_nats"]
    figures |= {
        "image_ce_nats": ce["loss_image"],
        "image_ce_shuffled_nats": ce["loss_image_shuffled"],
        "caption_gain_nats": ce["caption_gain"],
        "text_ce_nats": ce["loss_text"],
        "ce_below_unigram_percent": 100 * (1 - ce["loss_image"] / unigram) if unigram else 0.0,
    }
    drawn = evaluate_drawings.measure(cfg, run, models, world, stop) if cfg.evaluate.drawings else {}
    if world.is_main:
        lineage = models.lineage | {"images": images.content_hash, "codes": codes.content_hash}
        by_row = {f"image_ce_row_{row:02d}_nats": ce[f"loss_image_row_{row:02d}"] for row in range(cfg.dvae.grid)}
        storage.write_json(run.at("evaluate", "metrics.json"), figures | by_row | {"parents": lineage})
        seconds = time.monotonic() - started
        settings = cfg.evaluate.model_dump(mode="json")
        run.finish("evaluate", seconds=seconds, world_size=world.size, summary=figures | drawn, parents=lineage, settings=settings)
    wait_for_all()


@torch.no_grad()
def _on_images(cfg: RunConfig, models: Exports, pairs: SequentialReader, device: torch.device) -> dict[str, float]:
    """Reconstruction from discrete codes, use of the codebook, and retrieval within batches."""
    sums = torch.zeros(5, dtype=torch.float64, device=device)
    counts_N = torch.zeros(cfg.dvae.vocab, dtype=torch.int64, device=device)
    for batch in pairs:
        pixels_B3YX = batch["pixels"].to(device)
        codes_BYX = models.dvae.encode(pixels_B3YX)
        counts_N += torch.bincount(codes_BYX.flatten(), minlength=len(counts_N))
        drawn_B3YX = models.dvae.decode(codes_BYX)
        error = (drawn_B3YX - pixels_B3YX).square().mean((1, 2, 3)).sum()
        found = recall_at_1(*models.clip.encode_batch(batch))
        row = (psnr(drawn_B3YX, pixels_B3YX).sum(), error, found, torch.tensor(float(len(pixels_B3YX))), torch.tensor(1.0))
        sums += torch.stack([value.double().to(device) for value in row])
    for part in (sums, counts_N):
        if dist.is_initialized():
            dist.all_reduce(part)
    total_psnr, error, found, images, batches = sums.tolist()
    use = code_statistics(counts_N)
    return {
        "psnr_db": total_psnr / images,
        "psnr_of_mean_error_db": -10 * float(torch.log10(torch.tensor(error / images))),
        "code_use": use["code_use"],
        "code_perplexity": use["perplexity"],
        "clip_recall_at_1": found / images,
        "clip_chance": batches / images,
        "samples": images,
    }


def _unigram(cfg: RunConfig, tokens: SequentialReader, device: torch.device) -> dict[str, float]:
    """Entropy of the validation codes' own distribution: the lowest cross-entropy of any model that ignores position and context."""
    counts_N = torch.zeros(cfg.dvae.vocab, dtype=torch.int64, device=device)
    for batch in tokens:
        counts_N += torch.bincount(batch["codes"].flatten().to(device), minlength=len(counts_N))
    if dist.is_initialized():
        dist.all_reduce(counts_N)
    return {"unigram_entropy_nats": code_statistics(counts_N)["entropy_nats"]}
