"""Stage generate: captions -> ranked pictures (``launcher.py generate PRESET``), divided among launchers. Out: generate/index.json, PNG files, grid.png."""

from __future__ import annotations

import hashlib
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.shards.shard_set import ShardSet
from infra import storage
from infra.progress import Progress
from infra.run_folder import RunFolder
from infra.signals import StopFlag
from infra.world import Share, World
from train.config import RunConfig
from train.ranks.device import branch_dtype, set_up, wait_for_all
from train.report.images import grid, png_bytes, to_array
from train.run import places
from train.run.inputs import Exports, open_exports, open_images
from train.stages import generate_drawing
from train.stages.finish import stop_together
from train.stages.generate_drawing import Prompt


def run(cfg: RunConfig, run: RunFolder, world: World, stop: StopFlag) -> None:
    """Draw this rank's captions; each is finished on its own. Once all are there, of other launchers too, write the index and the grid."""
    started = time.monotonic()
    places.require(run, "dvae", "clip")  # of the transformer an export is enough (launcher.py export)
    device = set_up(world)
    models = open_exports(cfg, run, device, branch_dtype(cfg.dalle_fit.precision, device, run, world))
    training, validation = (open_images(cfg, run, split) for split in places.SPLITS)
    wanted = generate_drawing.prompts(cfg, training, validation)
    share = Share.from_env()
    place = share.of(world)
    mine = [i for i in range(place.rank, len(wanted), place.size) if not _finished(run, i, wanted[i], models.lineage)]
    progress = Progress(len(mine), "generate", unit="captions", enabled=world.is_main)
    for done, index in enumerate(mine, 1):
        if stop:
            break
        pictures_C3YX, seeds = generate_drawing.draw(cfg, models, wanted[index], device)
        scores = _scores(models, wanted[index], pictures_C3YX)
        _write(cfg, run, index, wanted[index], pictures_C3YX, seeds, scores, training, models.lineage)
        progress.update(done)
    progress.finish()
    stop_together(stop, device, "generate")
    if world.is_main:
        left = sum(not _finished(run, i, prompt, models.lineage) for i, prompt in enumerate(wanted)) if share.count > 1 else 0
        if left:
            print(f"generate: this share is done; {left} of {len(wanted)} captions are left to others, and the last of them merges.", flush=True)
        else:
            _merge(cfg, run, len(wanted), models.lineage["dalle"])
            seconds = time.monotonic() - started
            run.finish(
                "generate",
                seconds=seconds,
                world_size=world.size,
                throughput={"value": len(mine) * world.size * cfg.generate.candidates / seconds, "unit": "pictures/s"},
                summary={"captions": len(wanted), "pictures": len(wanted) * cfg.generate.candidates},
                parents=models.lineage,
            )
    wait_for_all()


def _merge(cfg: RunConfig, run: RunFolder, captions: int, checkpoint: str) -> None:
    """Write the index and the grid; again writes the same bytes."""
    entries = [storage.read_json(run.at("generate", _name(index), "entry.json")) for index in range(captions)]
    storage.write_bytes(run.at("generate", "grid.png"), png_bytes(_sheet(cfg, run, entries)))
    listing = {"captions": entries, "temperature": cfg.generate.temperature, "candidates": cfg.generate.candidates, "checkpoint": checkpoint}
    storage.write_json(run.at("generate", "index.json"), listing)


def _name(index: int) -> str:
    return f"caption-{index:04d}"


def _key(prompt: Prompt, lineage: dict[str, str]) -> str:
    return hashlib.sha256(repr((prompt.caption, prompt.id, sorted(lineage.items()))).encode()).hexdigest()


def _finished(run: RunFolder, index: int, prompt: Prompt, lineage: dict[str, str]) -> bool:
    url = run.at("generate", _name(index), "entry.json")
    return storage.exists(url) and storage.read_json(url)["key"] == _key(prompt, lineage)


@torch.no_grad()
def _scores(models: Exports, prompt: Prompt, pictures_C3YX: Tensor) -> list[float]:
    ids, length = models.tokenizer.encode(prompt.caption)
    device = pictures_C3YX.device
    text_1E = models.clip.encode_text(torch.from_numpy(ids)[None].to(device), torch.tensor([length], device=device))
    return [float(score) for score in (models.clip.encode_image(pictures_C3YX) @ text_1E.T)[:, 0]]


def _write(
    cfg: RunConfig,
    run: RunFolder,
    index: int,
    prompt: Prompt,
    pictures_C3YX: Tensor,
    seeds: list[int],
    scores: list[float],
    training: ShardSet,
    lineage: dict[str, str],
) -> None:
    """Files of one caption, best picture first, its entry last."""
    order = np.argsort(scores)[::-1]
    arrays = np.stack([to_array(pictures_C3YX[i]) for i in order])
    close = generate_drawing.nearest(arrays, training.records(), cfg.dvae.image_size, cfg.generate.nearest_among)
    entry: dict[str, Any] = {
        "caption": prompt.caption,
        "id": prompt.id,
        "split": prompt.split,
        "truth": None,
        "pictures": [],
        "key": _key(prompt, lineage),
    }

    def put(name: str, data: bytes) -> str:
        storage.write_bytes(run.at("generate", _name(index), name), data)
        return f"generate/{_name(index)}/{name}"

    if prompt.truth is not None:
        entry["truth"] = put("truth.png", png_bytes(generate_drawing.view(prompt.truth, cfg.dvae.image_size)))
    for rank, i in enumerate(order):
        found = close[rank]
        near = {
            "id": found.id,
            "distance": found.distance,
            "file": put(f"{rank:03d}-nearest.png", png_bytes(generate_drawing.view(found.image, cfg.dvae.image_size))),
        }
        picture = {"file": put(f"{rank:03d}.png", png_bytes(arrays[rank])), "score": scores[i], "seed": seeds[i], "nearest": near}
        entry["pictures"].append(picture)
    storage.write_json(run.at("generate", _name(index), "entry.json"), entry)


def _sheet(cfg: RunConfig, run: RunFolder, entries: list[dict[str, Any]]) -> np.ndarray:
    """One row a caption: the best pictures, best first."""

    def pixels(file: str) -> np.ndarray:
        return generate_drawing.view(storage.read_bytes(run.at(file)), cfg.dvae.image_size)

    rows = [[pixels(picture["file"]) for picture in entry["pictures"][: cfg.generate.show]] for entry in entries]
    return grid(rows, labels=[entry["caption"] for entry in entries])
