"""Transforms of loaders: (record, epoch) -> sample. Random numbers depend only on (seed, purpose, epoch, id), so any sample can be made again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.images import crops
from data_pipeline.tokenizer import UNKNOWN, Tokenizer
from infra import shown
from infra.digests import id_hash
from infra.errors import DataError
from infra.seeds import derive, generator

Record = Mapping[str, Any]
"""One record of a shard set: its columns by name. A column is decoded only when it is read."""
Sample = dict[str, Any]
"""The input of collation: id, and some of pixels (uint8 [H, W, 3]), caption (string), text (int64 [T]), length (int), codes (int64 [I]), and what a model reads in
place of the last and of text: read_codes, read_text."""


def dvae_transform(
    image_size: int, scale_min: float, scale_max: float, seed: int, decoding: crops.Decoding = "exact"
) -> Callable[[Record, int], Sample]:
    """For the dVAE: image records cropped by Listing 1. Samples have pixels (uint8 [H, W, 3]) and id."""

    def transform(record: Record, epoch: int) -> Sample:
        rng = generator(seed, "crop", epoch, record["id"])
        draw = partial(crops.dvae_crop, target=image_size, scale_min=scale_min, scale_max=scale_max, rng=rng)
        picture, _ = crops.picture(record["image"], draw, image_size, decoding)
        return {"id": record["id"], "pixels": picture}

    return transform


def pair_transform(
    image_size: int, scale_max: float, tokenizer: Tokenizer, seed: int, dropout: float = 0.0, decoding: crops.Decoding = "exact", mirror: bool = False
) -> Callable[[Record, int], Sample]:
    """For the contrastive model: image records cropped by Listing 2, with one of their captions. Samples have pixels, text, length and id.

    With ``mirror`` half of the pictures, drawn by (seed, epoch, id), are mirrored.
    """
    cut, encode = crop_transform(image_size, scale_max, seed, decoding, mirror), caption_transform(tokenizer, seed, dropout)
    return lambda record, epoch: cut(record, epoch) | encode(record, epoch)


def crop_transform(
    image_size: int, scale_max: float, seed: int, decoding: crops.Decoding = "exact", mirror: bool = False
) -> Callable[[Record, int], Sample]:
    """The picture of ``pair_transform`` alone. Samples have pixels and id."""

    def transform(record: Record, epoch: int) -> Sample:
        rng = generator(seed, "crop", epoch, record["id"])
        draw = partial(crops.transformer_crop, target=image_size, scale_max=scale_max, rng=rng)
        picture, _ = crops.picture(record["image"], draw, image_size, decoding)
        if mirror and rng.random() < 0.5:
            picture = np.ascontiguousarray(picture[:, ::-1])
        return {"id": record["id"], "pixels": picture}

    return transform


def caption_transform(tokenizer: Tokenizer, seed: int, dropout: float = 0.0, first_caption: bool = False) -> Callable[[Record, int], Sample]:
    """One caption of a record (drawn by (seed, epoch, id), or the first one), encoded with BPE dropout. Samples have text (int64 [T]) and length."""

    def choose(record: Record, epoch: int) -> Sample:
        choice = 0 if first_caption else _choice(seed, epoch, record)
        text, length = tokenizer.encode(record["captions"][choice], dropout, derive(seed, "bpe", epoch, record["id"]) if dropout else None)
        return {"text": text, "length": length}

    return choose


def _choice(seed: int, epoch: int, record: Record) -> int:
    return derive(seed, "caption", epoch, record["id"]) % len(record["captions"])


def code_transform(
    tokenizer: Tokenizer,
    seed: int,
    dropout: float = 0.0,
    first_caption: bool = False,
    caption_dropout: float = 0.0,
    replace_codes: float = 0.0,
    replace_pieces: float = 0.0,
    positions: int = 0,
    vocab: int = 0,
    caption_keys: bool = False,
) -> Callable[[Record, int], Sample]:
    """For the transformer: code records with one of their captions (or the first). Samples have text, length, codes (int64 [I]) and id.

    A share ``caption_dropout`` of the samples, drawn by (seed, epoch, id), gets a caption of length 0, for classifier-free guidance.
    With shares of codes or pieces that are replaced, drawn alike, samples also have read_codes (int64 [I]) and read_text (int64 [T]): what the model is to read,
    while codes and text stay what it is to predict.

    Args:
        replace_codes: share of the codes that are replaced by one of ``vocab``, which must be given then.
        replace_pieces: share of the pieces of captions that are replaced by one of the tokenizer.
        positions: number of codes of a picture, which each record must have; 0: any.
        vocab: codes must be below this, as a model would look up what it does not have; 0: any.
        caption_keys: samples also have own_keys, a number for each of the record's captions (``caption_key``), and caption_key, that of the chosen one; 0 where it is
            dropped.
    """
    encode = caption_transform(tokenizer, seed, dropout, first_caption)

    def transform(record: Record, epoch: int) -> Sample:
        codes = record["codes"]
        if (positions and len(codes) != positions) or (vocab and len(codes) and int(codes.max()) >= vocab):
            raise DataError(
                f"record {shown.value(record['id'], 80)} of the code set has {len(codes)} codes up to {int(codes.max(initial=0))}; this run's dVAE makes "
                f"{positions} codes below {vocab}. The set was not written by its stage encode: delete it and run 'launcher.py encode' again."
            )
        sample: Sample = {"id": record["id"], "codes": codes.astype(np.int64)} | encode(record, epoch)
        if caption_dropout and generator(seed, "caption_dropout", epoch, record["id"]).random() < caption_dropout:
            sample |= {"text": np.zeros_like(sample["text"]), "length": 0}
        if replace_codes or replace_pieces:
            codes_rng, text_rng = (generator(seed, "replace", what, epoch, record["id"]) for what in ("codes", "pieces"))
            sample["read_codes"] = replaced(sample["codes"], replace_codes, (0, vocab), codes_rng)
            sample["read_text"] = replaced(sample["text"], replace_pieces, (UNKNOWN + 1, tokenizer.size), text_rng)
        if caption_keys:
            own = [caption_key(tokenizer, caption) for caption in record["captions"]]
            sample |= {"own_keys": own, "caption_key": own[0 if first_caption else _choice(seed, epoch, record)] if sample["length"] else 0}
        return sample

    return transform


def caption_key(tokenizer: Tokenizer, caption: str) -> int:
    """A number that captions share if the tokenizer, without dropout, makes the same ids of them: up to its normalisation, and cut to its length. 63 bits; 0 for a caption
    without pieces."""
    text, length = tokenizer.encode(caption)
    return id_hash(text[:length].tobytes().hex()) >> 1 if length else 0


def replaced(ids: NDArray[np.int64], share: float, among: tuple[int, int], rng: np.random.Generator) -> NDArray[np.int64]:
    """The ids with a share of them replaced by ids drawn evenly from a range, which may be the same ones. As many numbers are drawn whatever the share is."""
    draws, others = rng.random(len(ids)), rng.integers(*among, len(ids))
    return np.where(draws < share, others, ids)


def view_transform(image_size: int, tokenizer: Tokenizer | None = None) -> Callable[[Record, int], Sample]:
    """For evaluation: the central crop, and the first caption if there is a tokenizer. Nothing is random."""

    def transform(record: Record, epoch: int) -> Sample:
        picture, _ = crops.picture(record["image"], partial(crops.center_crop, target=image_size), image_size)
        sample: Sample = {"id": record["id"], "pixels": picture}
        if tokenizer is not None:
            sample["caption"] = record["captions"][0]
            sample["text"], sample["length"] = tokenizer.encode(sample["caption"])
        return sample

    return transform
