"""Stage encode: image shards + dVAE -> code shards (``launcher.py encode PRESET``). One output part for each input part, finished parts are skipped."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from data_pipeline.images import CropBox, Pixels, cut, decode, transformer_crop
from data_pipeline.shards import CODES_SCHEMA, IMAGE_SCHEMA, CodeRecord, ShardSet, digest, merge, open_set, part_done, read_part, write_part
from infra.errors import DataError
from infra.progress import Progress
from infra.run_folder import RunFolder, producer
from infra.seeds import derive, generator
from infra.signals import StopFlag
from infra.world import World
from model.dvae import DVAE
from train import places
from train.common import stop_together
from train.config import RunConfig
from train.device import set_up, wait_for_all
from train.lineage import open_dvae


def run(cfg: RunConfig, run: RunFolder, world: World, stop: StopFlag) -> None:
    """Encode every part of both splits, ``encode.crops`` times, then merge the sets."""
    started = time.monotonic()
    finished = places.require(run, "prepare", "dvae")
    use = finished["dvae"]["summary"]["code_use"]
    if use < cfg.encode.min_code_use:
        raise DataError(
            f"the dVAE uses {use:.0%} of its codes on validation images, below encode.min_code_use = {cfg.encode.min_code_use:.0%}; train it further."
        )
    device = set_up(world)
    model, weights = open_dvae(cfg, run, device)
    sets = {split: open_set(places.image_set(cfg, run, split), IMAGE_SCHEMA) for split in places.SPLITS}
    work = [(crop, split, part) for split in places.SPLITS for crop in range(cfg.encode.crops) for part in range(sets[split].num_parts)]
    mine = work[world.rank :: world.size]
    progress = Progress(len(mine), "encode", unit="parts", enabled=world.is_main)
    images = 0
    for done, (crop, split, part) in enumerate(mine, 1):
        if stop:
            break
        images += _encode_part(cfg, run, model, weights, sets[split], crop, split, part, device)
        progress.update(done)
    progress.finish()
    stop_together(stop, device, "encode")
    seconds = time.monotonic() - started
    if world.is_main:
        for crop in range(cfg.encode.crops):
            for split in places.SPLITS:
                parents = {"dvae": weights, "images": sets[split].content_hash}
                merge(places.code_set(cfg, run, crop, split), sets[split].num_parts, CODES_SCHEMA, _settings(cfg, crop), parents, producer())
        rate = images * world.size / seconds
        summary = {"images": sum(s.count for s in sets.values()), "crops": cfg.encode.crops}
        run.finish(
            "encode",
            seconds=seconds,
            world_size=world.size,
            throughput={"value": rate, "unit": "images/s"},
            summary=summary,
            parents={"dvae": weights},
        )
    wait_for_all()


def _settings(cfg: RunConfig, crop: int) -> dict[str, object]:
    return {
        "augmentation": "listing 2",
        "image_size": cfg.dvae.image_size,
        "scale_max": cfg.encode.scale_max,
        "crop_index": crop,
        "seed": cfg.run.seed,
        "batch": cfg.encode.batch,
    }


def _encode_part(
    cfg: RunConfig, run: RunFolder, model: DVAE, weights: str, images: ShardSet, crop: int, split: str, part: int, device: torch.device
) -> int:
    """Encode one part unless it is done for the same inputs; returns the number of images encoded."""
    url = places.code_set(cfg, run, crop, split)
    key = digest({"dvae": weights, "part": images.manifest["parts"][part], "settings": _settings(cfg, crop)})
    if part_done(url, part, key):
        return 0
    write_part(url, part, _codes(cfg, model, read_part(images.url, part), crop, device), key, cfg.data.shard_bytes)
    return int(images.manifest["parts"][part]["count"])


def _codes(cfg: RunConfig, model: DVAE, records: Iterator[dict[str, Any]], crop: int, device: torch.device) -> Iterator[CodeRecord]:
    """Code records of image records. Batches depend on the part alone, and the last is padded, so that bytes repeat on any number of ranks."""
    batch: list[tuple[dict[str, Any], CropBox]] = []
    pictures_BYXC = np.zeros((cfg.encode.batch, cfg.dvae.image_size, cfg.dvae.image_size, 3), dtype=np.uint8)
    for record in records:
        image = decode(record["image"])
        rng = generator(cfg.run.seed, "crop", crop, record["id"])
        box = transformer_crop((image.shape[1], image.shape[0]), cfg.dvae.image_size, cfg.encode.scale_max, rng)
        pictures_BYXC[len(batch)] = cut(image, box, cfg.dvae.image_size)
        batch.append((record, box))
        if len(batch) == cfg.encode.batch:
            yield from _encode_batch(cfg, model, pictures_BYXC, batch, crop, device)
            batch = []
    if batch:
        pictures_BYXC[len(batch) :] = 0
        yield from _encode_batch(cfg, model, pictures_BYXC, batch, crop, device)


def _encode_batch(
    cfg: RunConfig, model: DVAE, pictures_BYXC: Pixels, batch: list[tuple[dict[str, Any], CropBox]], crop: int, device: torch.device
) -> Iterator[CodeRecord]:
    pixels_B3YX = torch.from_numpy(pictures_BYXC).to(device).permute(0, 3, 1, 2).float() / 255
    codes_BI = model.encode(pixels_B3YX).flatten(1).to(torch.int32).cpu().numpy().astype(np.uint16)
    for (record, box), codes_I in zip(batch, codes_BI, strict=False):
        seed = derive(cfg.run.seed, "crop", crop, record["id"])
        yield CodeRecord(id=record["id"], captions=record["captions"], codes=codes_I, crop=box.to_json(), crop_index=crop, seed=seed)
