"""Stage generate: captions -> ranked pictures (``launcher.py generate PRESET``), divided among launchers. Out: generate/index.json, PNG files, grid.png."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from data_pipeline.shards.shard_set import ShardSet
from infra import storage, stored
from infra.progress import Progress
from infra.run_folder import RunFolder
from infra.signals import StopFlag
from infra.world import Share, World
from model.decoder import DrawingWeights
from train.config import RunConfig
from train.drawing.draw import Picture, draw, score
from train.drawing.settings import Settings, key, of_stage
from train.drawing.source import Models
from train.ranks.device import branch_dtype, set_up, wait_for_all
from train.report.images import grid, png_bytes
from train.run import places
from train.run.inputs import open_exports, open_images
from train.stages import generate_drawing
from train.stages.finish import stop_together
from train.stages.generate_drawing import Prompt


class _Picture(stored.Stored):
    file: Annotated[str, Field(pattern=r"^generate/[A-Za-z0-9_-]{1,200}/[0-9]{1,9}\.png$")]


class _Entry(stored.Stored):
    """entry.json of a caption: its files lie in the stage's folder, and nowhere else."""

    caption: str
    pictures: list[_Picture]


@dataclass(frozen=True)
class _Task:
    """What is to be drawn, and with what. A caption's folder is named by all that shapes its pictures: other values draw anew beside it."""

    cfg: RunConfig
    run: RunFolder
    wanted: Sequence[Prompt]
    settings: Settings
    models: Models

    def key(self, index: int) -> str:
        prompt = self.wanted[index]
        return key(prompt.caption, self.settings, self.models.lineage, [], self.models.lineage["clip"], id=prompt.id)

    def folder(self, index: int) -> str:
        """Relative to the run."""
        return f"generate/caption-{index:04d}-{self.key(index)[:12]}"

    def entry_url(self, index: int) -> str:
        return self.run.at(self.folder(index), "entry.json")

    def is_finished(self, index: int) -> bool:
        return storage.exists(self.entry_url(index))


def run(cfg: RunConfig, run: RunFolder, world: World, stop: StopFlag) -> None:
    """Draw this rank's captions; each is finished on its own. Once all are there, of other launchers too, write the index and the grid."""
    started = time.monotonic()
    places.require(run, "dvae", "clip")  # of the transformer an export is enough (launcher.py export)
    device = set_up(world)
    models = open_exports(cfg, run, world, device, branch_dtype(cfg.dalle_fit.precision, device, run, world))
    training, validation = (open_images(cfg, run, split) for split in places.SPLITS)
    drawing = Models(run.url, cfg, models.dvae, DrawingWeights(models.dalle), models.tokenizer, models.clip, models.lineage, "exported weights")
    task = _Task(cfg, run, generate_drawing.prompts(cfg, training, validation), of_stage(cfg), drawing)
    share = Share.from_env()
    place = share.of(world)
    mine = [index for index in range(place.rank, len(task.wanted), place.size) if not task.is_finished(index)]
    progress = Progress(len(mine), "generate", unit="captions", enabled=world.is_main)
    for done, index in enumerate(mine, 1):
        if stop:
            break
        pictures = [picture for some in draw(drawing, [task.wanted[index].caption], task.settings) for picture in some]
        _write(task, index, pictures, training)
        progress.update(done)
    progress.finish()
    stop_together(stop, device, "generate")
    if world.is_main:
        left = sum(not task.is_finished(index) for index in range(len(task.wanted))) if share.count > 1 else 0
        if left:
            print(f"generate: this share is done; {left} of {len(task.wanted)} captions are left to others, and the last of them merges.", flush=True)
        else:
            _merge(task)
            seconds = time.monotonic() - started
            run.finish(
                "generate",
                seconds=seconds,
                world_size=world.size,
                throughput={"value": len(mine) * world.size * cfg.generate.candidates / seconds, "unit": "pictures/s"},
                summary={"captions": len(task.wanted), "pictures": len(task.wanted) * cfg.generate.candidates},
                parents=models.lineage,
                settings=cfg.generate.model_dump(mode="json"),
            )
    wait_for_all()


def _merge(task: _Task) -> None:
    """Write the index and the grid; again writes the same bytes."""
    run, cfg = task.run, task.cfg
    entries = [stored.read(task.entry_url(index), _Entry) for index in range(len(task.wanted))]
    storage.write_bytes(run.at("generate", "grid.png"), png_bytes(_sheet(cfg, run, entries)))
    checkpoint = task.models.lineage["dalle"]
    storage.write_json(
        run.at("generate", "index.json"), {"captions": entries, "candidates": task.settings.n, "checkpoint": checkpoint} | task.settings.shape()
    )


def _write(task: _Task, index: int, pictures: Sequence[Picture], training: ShardSet) -> None:
    """Files of one caption, best picture first, its entry last."""
    cfg, prompt, scores = task.cfg, task.wanted[index], score(task.models, pictures)
    order = np.argsort(scores)[::-1]
    arrays = np.stack([pictures[i].pixels_YXC for i in order])
    close = generate_drawing.nearest(arrays, training.records(), cfg.dvae.image_size, cfg.generate.nearest_among)
    entry: dict[str, Any] = {
        "caption": prompt.caption,
        "id": prompt.id,
        "split": prompt.split,
        "truth": None,
        "pictures": [],
        "key": task.key(index),
    }

    def put(name: str, data: bytes) -> str:
        storage.write_bytes(task.run.at(task.folder(index), name), data)
        return f"{task.folder(index)}/{name}"

    if prompt.truth is not None:
        entry["truth"] = put("truth.png", png_bytes(generate_drawing.view(prompt.truth, cfg.dvae.image_size)))
    for rank, i in enumerate(order):
        found = close[rank]
        near = {
            "id": found.id,
            "distance": found.distance,
            "file": put(f"{rank:03d}-nearest.png", png_bytes(generate_drawing.view(found.image, cfg.dvae.image_size))),
        }
        picture = {"file": put(f"{rank:03d}.png", png_bytes(arrays[rank])), "score": scores[i], "seed": pictures[i].seed, "nearest": near}
        entry["pictures"].append(picture)
    storage.write_json(task.entry_url(index), entry)


def _sheet(cfg: RunConfig, run: RunFolder, entries: list[dict[str, Any]]) -> np.ndarray:
    """One row a caption: the best pictures, best first."""

    def pixels(file: str) -> np.ndarray:
        return generate_drawing.view(storage.read_bytes(run.at(file)), cfg.dvae.image_size)

    rows = [[pixels(picture["file"]) for picture in entry["pictures"][: cfg.generate.show]] for entry in entries]
    return grid(rows, labels=[entry["caption"] for entry in entries])
