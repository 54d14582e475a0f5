"""Features of training pictures and captions by frozen towers (clip.towers = "frozen"). They are computed once, before the first update, and kept until the stage has
finished: 2,560 bytes for each view of a picture, and 768 for each caption.

    clip/features/<16 hex>/<part>-<chunk>/model.safetensors  config.json

Ranks divide the chunks, which depend on the images alone, so a start after a stop computes what is missing, by any number of ranks. A local run's files are mapped, so
that all processes of a machine share their memory; those of a run on an object store are downloaded to TMPDIR by each process.

Shapes: B samples, N records of a chunk, V views of a picture, M captions of a chunk, F features, C = 3 channels, Y X rows and columns.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_pipeline.loading.loaders import to_pixels
from data_pipeline.loading.transforms import Record, Sample, crop_transform
from data_pipeline.shards.shard_set import ShardSet
from infra import storage
from infra.digests import digest, id_hash
from infra.errors import DataError
from infra.progress import Progress
from infra.run_folder import RunFolder
from infra.seeds import derive
from infra.signals import StopFlag
from infra.world import World
from train.config import RunConfig
from train.loop.task import Batch
from train.stages.finish import stop_together
from train.weights import export
from train.weights.minilm import is_foreign
from train.weights.towers import Towers

log = logging.getLogger(__name__)

FOLDER = "features"
_CHUNK = 512
"""Records of a chunk: what a stop may lose."""
_BATCH = 16


class _Chunk(NamedTuple):
    """Some records of a part, by their numbers among those that are visible."""

    part: int
    begin: int
    end: int


class Features:
    """Features by id of record."""

    def __init__(self, chunks: Sequence[dict[str, Tensor]]) -> None:
        self._chunks = chunks
        hashes = [chunk["ids_N"].numpy() for chunk in chunks]
        ids = np.concatenate(hashes)
        self._order = np.argsort(ids, kind="stable")
        self._sorted = ids[self._order]
        self._starts = np.cumsum([0, *map(len, hashes)])
        self.views = int(chunks[0]["image_NVF"].shape[1])

    def of(self, name: str) -> tuple[Tensor, Tensor]:
        """Features of a record's views [V, F] and of its captions [M, F], fp16.

        Raises:
            DataError: there is no such record.
        """
        wanted = _signed(name)
        place = int(np.searchsorted(self._sorted, wanted))
        if place == len(self._sorted) or self._sorted[place] != wanted:
            raise DataError(f"record '{name[:80]}' has no features: delete the folder clip/{FOLDER} of the run, and run the stage 'clip' again.")
        row = int(self._order[place])
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        chunk, row = self._chunks[number], row - int(self._starts[number])
        first, last = chunk["ends_N"][row - 1] if row else 0, chunk["ends_N"][row]
        return chunk["image_NVF"][row], chunk["text_MF"][int(first) : int(last)]


def feature_transform(features: Features, seed: int) -> Callable[[Record, int], Sample]:
    """For training the heads: one view and one caption of a record, drawn by (seed, epoch, id). The picture is not read."""

    def transform(record: Record, epoch: int) -> Sample:
        name = record["id"]
        views_VF, captions_MF = features.of(name)
        view, caption = derive(seed, "view", epoch, name) % len(views_VF), derive(seed, "caption", epoch, name) % len(captions_MF)
        return {"id": name, "image_features": views_VF[view], "text_features": captions_MF[caption]}

    return transform


def feature_collate(samples: list[Sample]) -> Batch:
    """Collate them: ids (list), image_features and text_features fp32 [B, F]."""
    stacked = {key: torch.stack([sample[key] for sample in samples]).float() for key in ("image_features", "text_features")}
    return {"ids": [sample["id"] for sample in samples]} | stacked


@torch.no_grad()
def of_batches(batches: Iterator[Batch], towers: Towers) -> list[Batch]:
    """The same of batches of pictures and captions, as the evaluation has them; held in memory. Says if the encoder does not know the script of most captions."""
    found, foreign, count = [], 0, 0
    for batch in batches:
        foreign, count = foreign + sum(map(is_foreign, batch["captions"])), count + len(batch["captions"])
        image_BF, text_BF = _look(towers, batch["pixels"]), _in_bites(towers.text, batch["captions"])
        found.append({"ids": batch["ids"], "image_features": image_BF.float(), "text_features": text_BF.float()})
    if 2 * foreign > count:
        log.warning("%d of %d validation captions are in scripts that MiniLM does not know: clip.towers = 'own' learns them", foreign, count)
    return found


def features(cfg: RunConfig, run: RunFolder, images: ShardSet, towers: Towers, world: World, stop: StopFlag) -> Features:
    """Compute what is missing of the features of training pictures and captions, and open them all. Collective.

    Raises:
        StopRequested: a rank was asked to stop; finished chunks are kept.
    """
    folder = run.at("clip", FOLDER, _key(cfg, images, towers))
    chunks = _chunks(images)
    stop.orderly("the features of training pictures")
    _write(cfg, folder, images, towers, chunks[world.rank :: world.size], world, stop)
    stop_together(stop, towers.device, "clip")
    return Features([export.read_tensors(_url(folder, chunk))[1] for chunk in chunks])


def forget(run: RunFolder) -> None:
    """Delete all features: the stage has finished."""
    storage.delete_prefix(run.at("clip", FOLDER))


def scale_max(cfg: RunConfig) -> float:
    """Largest resize target of a training picture, divided by the image size."""
    return cfg.encode.scale_max if cfg.clip_fit.scale_max is None else cfg.clip_fit.scale_max


def _key(cfg: RunConfig, images: ShardSet, towers: Towers) -> str:
    """Names everything that features depend on."""
    fit = cfg.clip_fit
    removed = hashlib.sha256(images.removed.tobytes()).hexdigest()
    return digest(
        [
            images.content_hash,
            removed,
            towers.lineage,
            cfg.run.seed,
            cfg.dvae.image_size,
            cfg.data.decode,
            scale_max(cfg),
            fit.mirror,
            fit.views,
            _CHUNK,
        ]
    )[:16]


def _chunks(images: ShardSet) -> list[_Chunk]:
    counts = [entry["count"] - len(images.removed_rows(part)) for part, entry in enumerate(images.parts)]
    return [_Chunk(part, begin, min(begin + _CHUNK, count)) for part, count in enumerate(counts) for begin in range(0, count, _CHUNK)]


def _url(folder: str, chunk: _Chunk) -> str:
    return storage.join(folder, f"{chunk.part:05d}-{chunk.begin // _CHUNK:05d}")


def _write(cfg: RunConfig, folder: str, images: ShardSet, towers: Towers, mine: Sequence[_Chunk], world: World, stop: StopFlag) -> None:
    left = [chunk for chunk in mine if not storage.exists(storage.join(_url(folder, chunk), export.DESCRIPTION))]
    progress = Progress(len(left), "features", unit="chunks", timed=True, enabled=world.is_main and bool(left))
    done = 0
    for part, chunks in groupby(left, key=lambda chunk: chunk.part):
        records, read = images.read_part(part), 0
        for chunk in chunks:
            some = islice(records, chunk.begin - read, chunk.end - read)
            tensors = _computed(cfg, some, towers, stop)
            if tensors is None:
                return
            export.write(_url(folder, chunk), tensors, {"views": cfg.clip_fit.views}, parents=towers.lineage)
            read, done = chunk.end, done + 1
            progress.update(done)
    progress.finish()


@torch.no_grad()
def _computed(cfg: RunConfig, records: Iterator[dict[str, Any]], towers: Towers, stop: StopFlag) -> dict[str, Tensor] | None:
    """The tensors of a chunk; None if a stop came."""
    fit = cfg.clip_fit
    cut = crop_transform(cfg.dvae.image_size, scale_max(cfg), cfg.run.seed, cfg.data.decode, fit.mirror)
    names, counts, image_parts, text_parts = list[str](), list[int](), list[Tensor](), list[Tensor]()
    while some := list(islice(records, _BATCH)):
        if stop:
            return None
        names += [record["id"] for record in some]
        counts += [len(record["captions"]) for record in some]
        pixels = np.stack([cut(record, view)["pixels"] for record in some for view in range(fit.views)])
        image_parts.append(_look(towers, to_pixels(pixels)).unflatten(0, (len(some), fit.views)))
        text_parts.append(_in_bites(towers.text, [caption for record in some for caption in record["captions"]]))
    ids_N = torch.tensor([_signed(name) for name in names])
    return {"ids_N": ids_N, "image_NVF": torch.cat(image_parts), "text_MF": torch.cat(text_parts), "ends_N": torch.tensor(counts).cumsum(0)}


def _look(towers: Towers, pixels_BCYX: Tensor) -> Tensor:
    return torch.cat([towers.image(some.to(towers.device)).half().cpu() for some in pixels_BCYX.split(_BATCH)])


def _in_bites(read: Callable[[Sequence[str]], Tensor], captions: Sequence[str]) -> Tensor:
    """Features of captions; short and long ones are read apart, as those of a batch are padded to the longest."""
    order = sorted(range(len(captions)), key=lambda place: len(captions[place]))
    found = torch.cat([read([captions[place] for place in order[start : start + _BATCH]]).half().cpu() for start in range(0, len(order), _BATCH)])
    return found[torch.tensor(order).argsort()]


def _signed(name: str) -> int:
    """``id_hash`` as int64, which tensors hold."""
    return id_hash(name) - (1 << 63)
