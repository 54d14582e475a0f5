"""Encodes image records into code records. Threads read and decode the next batch while the model encodes the present one.

Shapes: B batch, Y X rows and columns of pixels, I code positions of a picture in raster order.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from data_pipeline.images.crops import CropBox, Pixels, picture, transformer_crop
from data_pipeline.images.mirroring import is_mirrored
from data_pipeline.shards.shard_set import CodeRecord
from infra.seeds import derive, generator
from model.image_tokenizer import ImageTokenizer
from train.config import RunConfig

T = TypeVar("T")


@dataclass(frozen=True)
class _Batch:
    records: list[dict[str, Any]]
    boxes: list[CropBox]
    pictures_BYXC: Pixels
    """Padded with black pictures if there are fewer records than a batch has."""


@dataclass(frozen=True)
class CodeMaker:
    """Encodes the records of parts, one part after the other."""

    cfg: RunConfig
    model: ImageTokenizer
    device: torch.device
    reader: Executor
    """One thread, which reads records and passes them to the decoders."""
    decoders: Executor
    """Threads that decode and crop images."""

    @cached_property
    def never(self) -> tuple[str, ...] | None:
        """Words that keep a training picture as it is; None: all stay as they are."""
        return self.cfg.encode.unmirrored() if self.cfg.encode.mirror else None

    def codes(self, records: Iterator[dict[str, Any]], crop: int) -> Iterator[CodeRecord]:
        """The code records of a part's image records, in order. How records are batched depends only on the part, and the last batch is padded, so the result is the
        same for any number of ranks.

        Raises:
            DataError: an image cannot be decoded or is too small, or the part is damaged.
        """
        waiting: tuple[_Batch, Tensor] | None = None
        for batch in _one_ahead(self._batches(records, crop), self.reader):
            codes_BI = self._encode(batch.pictures_BYXC)  # on a GPU this does not wait for the result
            if waiting is not None:
                yield from self._records(*waiting, crop)
            waiting = batch, codes_BI
        if waiting is not None:
            yield from self._records(*waiting, crop)

    def _batches(self, records: Iterator[dict[str, Any]], crop: int) -> Iterator[_Batch]:
        size = self.cfg.dvae.image_size
        while chunk := list(islice(records, self.cfg.encode.batch)):
            pictures_BYXC = np.zeros((self.cfg.encode.batch, size, size, 3), dtype=np.uint8)
            boxes = []
            for row, (pixels_YXC, box) in enumerate(self.decoders.map(partial(self._cut, crop=crop), chunk)):
                pictures_BYXC[row] = pixels_YXC
                boxes.append(box)
            yield _Batch(chunk, boxes, pictures_BYXC)

    def _cut(self, record: dict[str, Any], crop: int) -> tuple[Pixels, CropBox]:
        """The cropped picture of a record, as in Listing 2 of the paper or mirrored, and its crop box."""
        size, seed = self.cfg.dvae.image_size, self.cfg.run.seed
        rng = generator(seed, "crop", crop, record["id"])
        flip = self.never is not None and record["split"] == "train" and is_mirrored(seed, record["id"], crop, record["captions"], self.never)

        def draw(found: tuple[int, int]) -> CropBox:
            return replace(transformer_crop(found, size, self.cfg.encode.scale_max, rng), flip=flip)

        return picture(record["image"], draw, size, self.cfg.data.decode)

    def _encode(self, pictures_BYXC: Pixels) -> Tensor:
        bytes_BYXC = torch.from_numpy(pictures_BYXC)
        if self.device.type == "cuda":
            bytes_BYXC = bytes_BYXC.pin_memory()
        pixels_B3YX = bytes_BYXC.to(self.device, non_blocking=True).permute(0, 3, 1, 2).float() / 255
        return self.model.encode(pixels_B3YX).flatten(1).to(torch.int32)

    def _records(self, batch: _Batch, codes_BI: Tensor, crop: int) -> Iterator[CodeRecord]:
        found_BI = codes_BI.cpu().numpy().astype(np.uint16)
        for record, box, codes_I in zip(batch.records, batch.boxes, found_BI, strict=False):
            seed = derive(self.cfg.run.seed, "crop", crop, record["id"])
            yield CodeRecord(id=record["id"], captions=record["captions"], codes=codes_I, crop=box.to_json(), crop_index=crop, seed=seed)


def _one_ahead(items: Iterator[T], pool: Executor) -> Iterator[T]:
    """Yield the items. The next one is made in the pool while the caller uses the present one."""
    end = object()
    coming = pool.submit(next, items, end)
    while (item := coming.result()) is not end:
        coming = pool.submit(next, items, end)
        yield item  # type: ignore[misc]
