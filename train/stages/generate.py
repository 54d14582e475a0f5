"""Stage generate: captions -> ranked pictures (``launcher.py generate PRESET``), divided among launchers. Out: generate/index.json, PNG files, grid.png."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.shards.shard_set import ShardSet
from infra import storage, stored
from infra.progress import Progress
from infra.run_folder import RunFolder
from infra.signals import StopFlag
from infra.world import Share, World
from model.decoder import DrawingWeights
from train.config import RunConfig
from train.drawing.cpu_drawer import ready
from train.drawing.draw import draw, score
from train.drawing.learned import PictureFile
from train.drawing.settings import Settings, key, of_stage
from train.drawing.source import Models
from train.ranks.device import branch_dtype, set_up, wait_for_all
from train.report.images import grid, png_bytes
from train.run import places
from train.run.data_inputs import open_images
from train.run.inputs import open_exports
from train.stages import generate_learned
from train.stages.finish import stop_together
from train.stages.generate_nearest import nearest, thumbs, view
from train.stages.generate_prompts import Prompt, prompts

_SEARCHED = 1 << 14
"""For so many pictures the nearest training images are searched in one pass over the set. Takes 50 MB for the coarse pictures, and memory for at most as many image
files of the set."""


class _Picture(stored.Stored):
    file: PictureFile


class _Entry(stored.Stored):
    """The content of drawn.json and entry.json of a caption. The pattern allows only files in the stage's folder."""

    caption: str
    pictures: list[_Picture]


@dataclass(frozen=True)
class _Task:
    """What is to be drawn, and with which models and settings. The name of a caption's folder depends on everything that its pictures depend on, so other settings
    give other folders."""

    cfg: RunConfig
    run: RunFolder
    wanted: Sequence[Prompt]
    settings: Settings
    models: Models

    def key(self, index: int) -> str:
        prompt = self.wanted[index]
        return key(prompt.caption, self.settings, self.models.lineage, [], self.models.lineage["clip"], id=prompt.id)

    def folder(self, index: int) -> str:
        """The caption's folder, relative to the run folder."""
        return f"generate/caption-{index:04d}-{self.key(index)[:12]}"

    def entry_url(self, index: int) -> str:
        return self.run.at(self.folder(index), "entry.json")

    def drawn_url(self, index: int) -> str:
        """URL of the entry without the nearest training images. It is written first, so that nothing is drawn twice if the stage is stopped during their search."""
        return self.run.at(self.folder(index), "drawn.json")

    def is_finished(self, index: int) -> bool:
        return storage.exists(self.entry_url(index))

    def put(self, index: int, name: str, data: bytes) -> str:
        """Write a file of a caption, and return its name in the run folder."""
        storage.write_bytes(self.run.at(self.folder(index), name), data)
        return f"{self.folder(index)}/{name}"


def run(cfg: RunConfig, run: RunFolder, world: World, stop: StopFlag) -> None:
    """Draw this rank's captions; each one that is finished is kept. Once all exist, those of other launchers included, write the index and the grid."""
    started = time.monotonic()
    settings = of_stage(cfg)
    settings.check(cfg)  # before anything is loaded
    settings.check_search(is_ranked=True)
    places.require(run, "dvae", "clip")  # of the transformer an export is enough (launcher.py export): its stage need not have finished
    device = set_up(world)
    models = open_exports(cfg, run, world, device, branch_dtype(cfg.dalle_fit.precision, device, run, world))
    training, validation = (open_images(cfg, run, split) for split in places.SPLITS)
    weights = ready(models.dalle, DrawingWeights.dtype_of(models.dalle))
    drawing = Models(run.url, cfg, models.dvae, weights, models.tokenizer, models.clip, models.lineage, "exported weights")
    task = _Task(cfg, run, prompts(cfg, training, validation), settings, drawing)
    share = Share.from_env()
    place = share.of(world)
    mine = [index for index in range(place.rank, len(task.wanted), place.size) if not task.is_finished(index)]
    stop.orderly("the choice of captions")
    _draw(task, mine, world, stop)
    stop.doing("the search for the nearest images")
    _search(task, mine, training, world, stop)
    learned = generate_learned.plan(run, [prompt.caption for prompt in task.wanted], task.settings, models.lineage, cfg.generate.checkpoints)
    for step in learned.steps[place.rank :: place.size]:
        stop.phase("the drawing of what was learned")  # of one checkpoint after the other; finished ones are kept
        learned.draw(drawing, step)
    stop_together(stop, device, "generate")
    stop.phase("the merging of the pictures")  # if it is stopped, the next start repeats it
    if world.is_main:
        left = sum(not task.is_finished(index) for index in range(len(task.wanted))) if share.count > 1 else 0
        if left:
            print(f"generate: this share is done; {left} of {len(task.wanted)} captions are left to others, and the last of them merges.", flush=True)
        else:
            for step in learned.steps:
                learned.draw(drawing, step)  # draws only those that the launcher of another share has not drawn yet
            _merge(task, learned.entries())
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


def _merge(task: _Task, learned: list[dict[str, Any]]) -> None:
    """Write the index and the grid. Repeated, it writes the same bytes."""
    run, cfg = task.run, task.cfg
    entries = [stored.read(task.entry_url(index), _Entry) for index in range(len(task.wanted))]
    storage.write_bytes(run.at("generate", "grid.png"), png_bytes(_sheet(task, entries)))
    checkpoint = task.models.lineage["dalle"]
    facts = {"captions": entries, "learned": learned, "candidates": task.settings.n, "checkpoint": checkpoint}
    storage.write_json(run.at("generate", "index.json"), facts | task.settings.shape())
    stages = ("dalle", "align") if places.transformer(cfg, run) == "align" else ("dalle",)
    updates = sum(int((run.done(stage) or {}).get("updates", getattr(cfg, f"{stage}_fit").steps)) for stage in stages)
    generate_learned.to_tensorboard(run, entries, learned, cfg.generate.show, updates)


def _draw(task: _Task, mine: Sequence[int], world: World, stop: StopFlag) -> None:
    """The pictures of this rank's captions, best first, each caption's drawn.json last."""
    progress = Progress(len(mine), "generate", unit="captions", timed=True, enabled=world.is_main)
    for done, index in enumerate(mine, 1):
        if stop:
            break
        if not storage.exists(task.drawn_url(index)):
            stop.phase("the drawing of a caption")  # finished ones are kept
            _draw_one(task, index)
            stop.orderly("the end of a caption")
        progress.update(done)
    progress.finish()


def _draw_one(task: _Task, index: int) -> None:
    prompt = task.wanted[index]
    pictures = [picture for some in draw(task.models, [prompt.caption], task.settings) for picture in some]
    scores = score(task.models, pictures)
    entry: dict[str, Any] = {"caption": prompt.caption, "id": prompt.id, "split": prompt.split, "truth": None, "pictures": [], "key": task.key(index)}
    if prompt.truth is not None:
        entry["truth"] = task.put(index, "truth.png", png_bytes(view(prompt.truth, task.cfg.dvae.image_size)))
    for place, i in enumerate(np.argsort(scores)[::-1]):
        file = task.put(index, f"{place:03d}.png", png_bytes(pictures[i].pixels_YXC))
        entry["pictures"].append({"file": file, "score": scores[i], "seed": pictures[i].seed})
    storage.write_json(task.drawn_url(index), entry)


def _search(task: _Task, mine: Sequence[int], training: ShardSet, world: World, stop: StopFlag) -> None:
    """Find the nearest training images of this rank's pictures, for many captions in one pass over the set; each caption's entry.json is written last."""
    at_once = max(1, _SEARCHED // task.settings.n)
    for begin in range(0, len(mine), at_once):
        some = mine[begin : begin + at_once]
        if stop:
            return  # some captions may not have been drawn
        drawn = [stored.read(task.drawn_url(index), _Entry) for index in some]
        thumbs_BF = np.concatenate([thumbs(np.stack([_pixels(task, picture["file"]) for picture in entry["pictures"]])) for entry in drawn])
        progress = Progress(min(task.cfg.generate.nearest_among, training.count), "nearest images", unit="images", timed=True, enabled=world.is_main)

        def go_on(done: int, progress: Progress = progress) -> bool:
            progress.update(done)
            return not stop

        found = nearest(thumbs_BF, training, task.cfg.dvae.image_size, task.cfg.generate.nearest_among, go_on)
        if found is None:
            return
        progress.update(progress.total)
        progress.finish()
        images = iter(found)
        for index, entry in zip(some, drawn, strict=True):
            for place, (picture, image) in enumerate(zip(entry["pictures"], images, strict=False)):
                file = task.put(index, f"{place:03d}-nearest.png", png_bytes(view(image.image, task.cfg.dvae.image_size)))
                picture["nearest"] = {"id": image.id, "distance": image.distance, "file": file}
            storage.write_json(task.entry_url(index), entry)


def _pixels(task: _Task, file: str) -> np.ndarray:
    return view(storage.read_bytes(task.run.at(file)), task.cfg.dvae.image_size)


def _sheet(task: _Task, entries: list[dict[str, Any]]) -> np.ndarray:
    """A sheet with one row for each caption: its best pictures, from the best on."""
    rows = [[_pixels(task, picture["file"]) for picture in entry["pictures"][: task.cfg.generate.show]] for entry in entries]
    return grid(rows, labels=[entry["caption"] for entry in entries])
