"""Small sound shard sets for the tests of ``inspect`` and ``validate``."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.images.crops import transformer_crop
from data_pipeline.shards.part_writer import write_part
from data_pipeline.shards.shard_set import CODES_SCHEMA, IMAGE_SCHEMA, CodeRecord, ImageRecord, Record, ShardSet, part_done
from data_pipeline.shards.versions import Part, collect, merge
from infra.digests import digest
from infra.seeds import derive, generator

SIDE = 16
GRID = 4
VOCAB = 32


def png(number: int, width: int = 24, height: int = 20) -> bytes:
    """A picture of random pixels."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def image(number: int, split: str = "train", **fields: Any) -> ImageRecord:
    """A sound record of an image set."""
    values: dict[str, Any] = {
        "id": f"id-{number}",
        "captions": [f"a picture of number {number}", "ein Bild"],
        "image": png(number),
        "width": 24,
        "height": 20,
    }
    values |= {"source": ("photos", "emoji")[number % 2], "license": "CC-BY-4.0", "group": f"group-{number}", "split": split}
    return ImageRecord(**values | fields)


def code(number: int, crop_index: int = 0, **fields: Any) -> CodeRecord:
    """A sound record of a code set of the same image."""
    crop = transformer_crop((24, 20), SIDE, 9 / 8, generator(0, "crop", crop_index, f"id-{number}")).to_json()
    codes = np.random.default_rng(number).integers(0, VOCAB, GRID**2).astype(np.uint16)
    seed = derive(0, "crop", crop_index, f"id-{number}")
    values: dict[str, Any] = {
        "id": f"id-{number}",
        "captions": [f"a picture of number {number}"],
        "codes": codes,
        "crop": crop,
        "crop_index": crop_index,
        "seed": seed,
    }
    return CodeRecord(**values | fields)


def make_images(url: str, parts: Sequence[Sequence[ImageRecord]], excluded: Sequence[int] = (), split: str = "train") -> ShardSet:
    """An image set of the given parts, without the records at the positions ``excluded``."""
    return make_set(url, IMAGE_SCHEMA, parts, {"split": split, "seed": 0}, {}, excluded)


def make_codes(url: str, parts: Sequence[Sequence[CodeRecord]], parents: Mapping[str, str], excluded: Sequence[int] = ()) -> ShardSet:
    """A code set of the given parts."""
    return make_set(url, CODES_SCHEMA, parts, {"image_size": SIDE, "scale_max": 9 / 8, "crop_index": 0, "seed": 0}, parents, excluded)


def make_set(
    url: str, schema: str, parts: Sequence[Sequence[Any]], settings: Mapping[str, Any], parents: Mapping[str, str], excluded: Sequence[int] = ()
) -> ShardSet:
    """A set of the given parts, the first from 'photos', the second from 'emoji', and so on."""
    named = [Part(digest([schema, len(records), number]), ("photos", "emoji")[number % 2]) for number, records in enumerate(parts)]
    for part, records in zip(named, parts, strict=True):
        if not part_done(url, part.inputs):
            write_part(url, part.inputs, records, shard_bytes=6000)
    producer = {"commit": "c" * 40, "versions": {"python": "3.11"}}
    return merge(url, named, collect(url, named, "prepare"), schema, settings, parents, producer, np.array(excluded, np.int64))


def as_dict(record: Record) -> dict[str, Any]:
    """The columns of a record, as reading it back gives them."""
    return {field.name: getattr(record, field.name) for field in dataclasses.fields(record) if field.name in record.columns()}
