"""Stage encode: image shards + dVAE -> code shards (``launcher.py encode PRESET``). Each input part gives one output part; finished parts are skipped."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import groupby

import torch

from data_pipeline.shards.part_writer import PartWriter
from data_pipeline.shards.shard_set import CODES_SCHEMA, CodeRecord, ShardSet, part_done
from data_pipeline.shards.versions import Part, collect, merge
from infra.digests import digest, id_hash
from infra.errors import DataError
from infra.progress import Progress
from infra.run_folder import RunFolder, producer
from infra.signals import StopFlag
from infra.world import Share, World
from model.image_tokenizer import ImageTokenizer
from train.config import RunConfig
from train.machine.rates import DTYPES, threads
from train.ranks.device import branch_dtype, set_up, wait_for_all
from train.run import places
from train.run.data_inputs import open_images
from train.run.inputs import open_dvae
from train.stages.encode_records import CodeMaker
from train.stages.finish import stop_together


@dataclass(frozen=True)
class Unit:
    """One unit of work: encodes a part of an image set into a part of a code set."""

    crop: int
    split: str
    images: ShardSet
    part: int
    url: str
    """URL of the code set."""
    inputs: str
    """Digest of everything on which the codes depend."""

    def target(self) -> Part:
        return Part(self.inputs, self.images.parts[self.part]["source"])


def run(cfg: RunConfig, run: RunFolder, world: World, stop: StopFlag) -> None:
    """Encode this rank's parts of both splits, ``encode.crops`` times. Once all parts exist, those of other launchers included, merge the sets."""
    started = time.monotonic()
    use = places.require(run, "prepare", "dvae")["dvae"]["summary"]["code_use"]
    if use < cfg.encode.min_code_use:
        raise DataError(
            f"the dVAE uses {use:.0%} of its codes on validation images, below encode.min_code_use = {cfg.encode.min_code_use:.0%}; train it further."
        )
    device, share = set_up(world), Share.from_env()
    dtype = branch_dtype(cfg.encode.precision, device, run, world)
    model, weights = open_dvae(cfg, run, device, dtype)
    units = _units(cfg, run, weights, dtype)
    place = share.of(world)
    stop.orderly("the encoding of a part")
    images = _write(cfg, model, units[place.rank :: place.size], device, stop, world)
    stop_together(stop, device, "encode")
    stop.phase("the merging of the parts")  # if it is stopped, the next start repeats it
    if world.is_main:
        left = sum(not part_done(unit.url, unit.inputs) for unit in units) if share.count > 1 else 0
        if left:
            print(f"encode: this share is done; {left} of {len(units)} parts are left to others, and the last of them merges.", flush=True)
        else:
            sets = _merge(cfg, units, weights, dtype)
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


def _write(cfg: RunConfig, model: ImageTokenizer, units: list[Unit], device: torch.device, stop: StopFlag, world: World) -> int:
    """Write the parts that are not there yet, each uploaded while the next is encoded; the number of images in them."""
    progress = Progress(len(units), "encode", unit="parts", timed=True, enabled=world.is_main)
    images = 0
    # The last bit of sums depends on the number of threads, so the codes do too: the number is a setting, not a property of the machine.
    with threads(cfg.encode.threads), _pool(1) as reader, _pool(cfg.encode.decoders) as decoders, _pool(1) as uploader:
        maker = CodeMaker(cfg, model, device, reader, decoders)
        upload: Future[None] | None = None
        for done, unit in enumerate(units, 1):
            if stop:
                break
            if not part_done(unit.url, unit.inputs):
                writer = PartWriter(unit.url, unit.inputs, cfg.data.shard_bytes)
                if not _fill(writer, _codes(maker, unit), upload, stop):
                    break
                upload = uploader.submit(_finish, writer)
                images += unit.images.parts[unit.part]["count"]
            progress.update(done)
        if upload is not None:
            upload.result()
    progress.finish()
    return images


def _codes(maker: CodeMaker, unit: Unit) -> Iterator[CodeRecord]:
    """The codes of a part, each with the ids of the further rows of its image, by which it may be taken down too."""
    further = defaultdict[int, list[int]](list)
    for record, row in unit.images.further_ids_of(unit.part).tolist():
        further[record].append(row)
    for code in maker.codes(unit.images.read_part(unit.part), unit.crop):
        yield replace(code, further=tuple(further[id_hash(code.id)])) if further else code


def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers, thread_name_prefix="encode")


def _fill(writer: PartWriter, records: Iterable[CodeRecord], before: Future[None] | None, stop: StopFlag) -> bool:
    """Add the records, and wait for the previous upload, so that at most one part waits on the local disk. False if a stop came: the part is started again later."""
    with ExitStack() as on_error:
        on_error.enter_context(writer)
        for record in records:
            if stop:
                return False
            writer.add(record)
        if before is not None:
            before.result()
        on_error.pop_all()
    return True


def _finish(writer: PartWriter) -> None:
    with writer:
        writer.finish()


def _units(cfg: RunConfig, run: RunFolder, weights: str, dtype: torch.dtype) -> list[Unit]:
    """All units, in the order of the sets' parts. ``Unit.inputs`` depends on the bytes of the images, not on the names of their parts: images that were prepared again
    with the same bytes, or to whose set others appended, are not encoded again."""
    units = []
    for split in places.SPLITS:
        images = open_images(cfg, run, split)
        for crop in range(cfg.encode.crops):
            url = places.code_set(cfg, run, crop, split)
            for part, entry in enumerate(images.parts):
                inputs = [weights, entry["files"], images.removed_rows(part).tolist(), _settings(cfg, crop, split, dtype), cfg.data.shard_bytes]
                units.append(Unit(crop, split, images, part, url, digest(inputs)))
    return units


def _merge(cfg: RunConfig, units: list[Unit], weights: str, dtype: torch.dtype) -> dict[str, ShardSet]:
    """Merge every code set, and return the sets by 'crop/split'."""
    sets = {}
    for name, group in groupby(units, key=lambda unit: f"{unit.crop}/{unit.split}"):
        chosen = list(group)
        parts = [unit.target() for unit in chosen]
        markers = collect(chosen[0].url, parts, "encode")
        parents = {"dvae": weights, "images": chosen[0].images.content_hash}
        # Take-down lists may name records in two spellings. The code set gets the bases of its images, so that both spellings are found in it too.
        bases = {key: value for key, value in chosen[0].images.manifest["settings"].items() if key == "bases"}
        settings = _settings(cfg, chosen[0].crop, chosen[0].split, dtype) | bases
        sets[name] = merge(chosen[0].url, parts, markers, CODES_SCHEMA, settings, parents, producer())
    return sets


def _settings(cfg: RunConfig, crop: int, split: str, dtype: torch.dtype) -> dict[str, object]:
    plain = {
        "augmentation": "listing 2",
        "decode": cfg.data.decode,
        "image_size": cfg.dvae.image_size,
        "scale_max": cfg.encode.scale_max,
        "crop_index": crop,
        "seed": cfg.run.seed,
        "batch": cfg.encode.batch,
        "precision": next(name for name, value in DTYPES.items() if value == dtype),
        "threads": cfg.encode.threads,
    }
    # Without it there is no entry, so that codes from before, and those of validation, are the same sets.
    return plain | ({"unmirrored": list(cfg.encode.unmirrored())} if cfg.encode.mirror and split == "train" else {})
