"""Stage encode: image shards + dVAE -> code shards (``launcher.py encode PRESET``). One output part for each input part, finished parts are skipped."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch

from data_pipeline.images import CropBox, Pixels, picture, transformer_crop
from data_pipeline.part_writer import write_part
from data_pipeline.shards import CODES_SCHEMA, CodeRecord, ShardSet, digest, part_done
from data_pipeline.versions import Part, collect, merge
from infra.errors import DataError
from infra.progress import Progress
from infra.run_folder import RunFolder, producer
from infra.seeds import derive, generator
from infra.signals import StopFlag
from infra.world import Share, World
from model.dvae import DVAE
from train import places
from train.common import stop_together
from train.config import RunConfig
from train.device import set_up, wait_for_all
from train.lineage import open_dvae, open_images


@dataclass(frozen=True)
class Unit:
    """One unit of work: a part of an image set becomes a part of a code set."""

    crop: int
    split: str
    images: ShardSet
    part: int
    url: str
    """Place of the code set."""
    inputs: str
    """Digest of everything that the codes depend on."""

    def target(self) -> Part:
        return Part(self.inputs, self.images.parts[self.part]["source"])


def run(cfg: RunConfig, run: RunFolder, world: World, stop: StopFlag) -> None:
    """Encode every part of both splits, ``encode.crops`` times; once all parts are there, of other launchers too, merge the sets."""
    started = time.monotonic()
    use = places.require(run, "prepare", "dvae")["dvae"]["summary"]["code_use"]
    if use < cfg.encode.min_code_use:
        raise DataError(
            f"the dVAE uses {use:.0%} of its codes on validation images, below encode.min_code_use = {cfg.encode.min_code_use:.0%}; train it further."
        )
    device, share = set_up(world), Share.from_env()
    model, weights = open_dvae(cfg, run, device)
    units = _units(cfg, run, weights)
    place = share.of(world)
    mine = units[place.rank :: place.size]
    progress = Progress(len(mine), "encode", unit="parts", enabled=world.is_main)
    images = 0
    for done, unit in enumerate(mine, 1):
        if stop:
            break
        if not part_done(unit.url, unit.inputs):
            write_part(unit.url, unit.inputs, _codes(cfg, model, unit.images.read_part(unit.part), unit.crop, device), cfg.data.shard_bytes)
            images += unit.images.parts[unit.part]["count"]
        progress.update(done)
    progress.finish()
    stop_together(stop, device, "encode")
    if world.is_main:
        left = sum(not part_done(unit.url, unit.inputs) for unit in units) if share.count > 1 else 0
        if left:
            print(f"encode: this share is done; {left} of {len(units)} parts are left to others, and the last of them merges.", flush=True)
        else:
            sets = _merge(cfg, units, weights)
            seconds = time.monotonic() - started
            run.finish(
                "encode",
                seconds=seconds,
                world_size=world.size,
                throughput={"value": images * world.size / seconds, "unit": "images/s"},
                summary={"images": sum(sets[f"0/{split}"].count for split in places.SPLITS), "crops": cfg.encode.crops},
                parents={"dvae": weights},
                versions={name: code_set.content_hash for name, code_set in sets.items()},
            )
    wait_for_all()


def _units(cfg: RunConfig, run: RunFolder, weights: str) -> list[Unit]:
    """All units, in the order of the sets' parts. The inputs are the bytes of the images, not the names of their parts: data that were prepared
    again to the same bytes, or that others appended to, are not encoded again."""
    units = []
    for split in places.SPLITS:
        images = open_images(cfg, run, split)
        for crop in range(cfg.encode.crops):
            url = places.code_set(cfg, run, crop, split)
            for part, entry in enumerate(images.parts):
                inputs = [weights, entry["files"], images.removed_rows(part).tolist(), _settings(cfg, crop), cfg.data.shard_bytes]
                units.append(Unit(crop, split, images, part, url, digest(inputs)))
    return units


def _merge(cfg: RunConfig, units: list[Unit], weights: str) -> dict[str, ShardSet]:
    """Merge every code set; returns them by 'crop/split'."""
    sets = {}
    for name, group in groupby(units, key=lambda unit: f"{unit.crop}/{unit.split}"):
        chosen = list(group)
        parts = [unit.target() for unit in chosen]
        markers = collect(chosen[0].url, parts, "encode")
        parents = {"dvae": weights, "images": chosen[0].images.content_hash}
        sets[name] = merge(chosen[0].url, parts, markers, CODES_SCHEMA, _settings(cfg, chosen[0].crop), parents, producer())
    return sets


def _settings(cfg: RunConfig, crop: int) -> dict[str, object]:
    return {
        "augmentation": "listing 2",
        "decode": cfg.data.decode,
        "image_size": cfg.dvae.image_size,
        "scale_max": cfg.encode.scale_max,
        "crop_index": crop,
        "seed": cfg.run.seed,
        "batch": cfg.encode.batch,
    }


def _codes(cfg: RunConfig, model: DVAE, records: Iterator[dict[str, Any]], crop: int, device: torch.device) -> Iterator[CodeRecord]:
    """Code records of image records. Batches depend on the part alone, and the last is padded, so that bytes repeat on any number of ranks."""
    batch: list[tuple[dict[str, Any], CropBox]] = []
    size = cfg.dvae.image_size
    pictures_BYXC = np.zeros((cfg.encode.batch, size, size, 3), dtype=np.uint8)
    for record in records:
        rng = generator(cfg.run.seed, "crop", crop, record["id"])
        draw = partial(transformer_crop, target=size, scale_max=cfg.encode.scale_max, rng=rng)
        pictures_BYXC[len(batch)], box = picture(record["image"], draw, size, cfg.data.decode)
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
