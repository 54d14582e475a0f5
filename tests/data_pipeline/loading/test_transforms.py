"""Records into tensors: pictures, captions and codes as a batch holds them."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.images.crops import decode
from data_pipeline.loading import loaders
from data_pipeline.loading.loaders import SequentialReader, ShardLoader, code_collate, image_collate
from data_pipeline.loading.transforms import code_transform, dvae_transform, pair_transform, view_transform
from data_pipeline.shards.shard_set import IMAGE_SCHEMA, ImageRecord, ShardSet
from data_pipeline.shards.versions import write_set
from data_pipeline.tokenizer import Tokenizer, train_tokenizer
from infra.errors import DataError
from infra.world import World
from tests.support.code_sets import COUNT, code_set
from tests.support.crops import center

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # streaming leaves closing to the garbage collector


def png(seed: int, size: int = 40) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def image_set(url: str, count: int = 12) -> ShardSet:
    captions = ["a red apple", "an apple", "the redder of two apples"]
    return write_set(url, [[ImageRecord(f"id-{i}", captions, png(i), 40, 40, "s", "l", "g", "train") for i in range(count)]], IMAGE_SCHEMA)


def test_image_batches_are_floats_between_zero_and_one_made_from_their_counters_alone(tmp_path: Path) -> None:
    sets = [image_set(str(tmp_path))]
    batches = []
    for size in (1, 2):
        one = ShardLoader(sets, "", World.single(), 12 // size, 3, dvae_transform(16, 9 / 8, 12 / 8, 3), image_collate)
        drawn = [one.next() for _ in range(2 * size)]
        batches.append(
            {(name, k // size): pixels for k, batch in enumerate(drawn) for name, pixels in zip(batch["ids"], batch["pixels"], strict=True)}
        )
    assert batches[0].keys() == batches[1].keys() and all(torch.equal(batches[0][key], batches[1][key]) for key in batches[0])
    pixels = batches[0]["id-0", 0]
    assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.float32 and 0 <= pixels.min() < 0.3 and 0.7 < pixels.max() <= 1
    assert not torch.equal(pixels, batches[0]["id-0", 1]), "another epoch, another crop"


def test_colours_keep_their_channels(tmp_path: Path) -> None:
    picture = np.zeros((1, 2, 2, 3), np.uint8)
    picture[0, 0, 1] = (255, 51, 0)
    pixels = loaders.to_pixels(picture)
    assert pixels[0, :, 0, 1].tolist() == [1.0, pytest.approx(0.2), 0.0] and pixels.sum() == pytest.approx(1.2)


def test_pairs_carry_one_caption_drawn_anew_each_epoch(tmp_path: Path) -> None:
    sets = [image_set(str(tmp_path))]
    one = ShardLoader(sets, "", World.single(), 12, 3, pair_transform(16, 9 / 8, TOKENIZER, 3), image_collate)
    drawn: Counter[str] = Counter()
    for _ in range(8):
        batch = one.next()
        assert batch["text"].shape == (12, 16) and batch["text"].dtype == batch["lengths"].dtype == torch.int64
        drawn.update(TOKENIZER.decode(ids[:length]) for ids, length in zip(batch["text"], batch["lengths"], strict=True))
    assert set(drawn) == {"a red apple", "an apple", "the redder of two apples"}
    assert min(drawn.values()) > 96 / 3 / 2


def test_half_of_the_pictures_are_mirrored_and_nothing_else_changes() -> None:
    record = {"id": "", "image": png(1), "captions": ["a red apple"]}
    turned = 0
    for number in range(40):
        plain, mirrored = (pair_transform(16, 9 / 8, TOKENIZER, 3, mirror=mirror)(record | {"id": str(number)}, 0) for mirror in (False, True))
        is_turned = not np.array_equal(plain["pixels"], mirrored["pixels"])
        assert np.array_equal(plain["pixels"][:, ::-1] if is_turned else plain["pixels"], mirrored["pixels"])
        assert np.array_equal(plain["text"], mirrored["text"])
        turned += is_turned
    assert 10 < turned < 30


def test_code_batches_carry_codes_as_int64_and_captions_under_dropout(tmp_path: Path) -> None:
    sets = [code_set(str(tmp_path))]
    one = ShardLoader(sets, "", World.single(), COUNT, 0, code_transform(TOKENIZER, 0, dropout=0.5), code_collate)
    batch = one.next()
    assert batch["codes"].dtype == torch.int64 and batch["codes"].shape == (COUNT, 4)
    assert all(f"id-{codes[0]}" == name for name, codes in zip(batch["ids"], batch["codes"], strict=True))
    record = {"id": "x", "captions": ["redder apples", "apple"], "codes": np.zeros(4, np.uint16)}
    transform = code_transform(TOKENIZER, 0, dropout=0.5)
    assert np.array_equal(transform(record, 3)["text"], transform(record, 3)["text"])
    assert len({tuple(transform(record, epoch)["text"]) for epoch in range(30)}) > 5
    first = code_transform(TOKENIZER, 0, first_caption=True)
    assert {TOKENIZER.decode(first(record, epoch)["text"]) for epoch in range(30)} == {"redder apples"}


def test_the_view_of_evaluation_is_the_central_crop_and_the_first_caption(tmp_path: Path) -> None:
    reader = SequentialReader(image_set(str(tmp_path)), World.single(), 12, 12, view_transform(16, TOKENIZER), image_collate)
    (batch,) = reader
    expected, _ = center(decode(png(5)), 16)
    assert torch.equal(batch["pixels"][5], loaders.to_pixels(expected[None])[0])
    assert {TOKENIZER.decode(ids) for ids in batch["text"]} == {"a red apple"}
    (plain,) = SequentialReader(image_set(str(tmp_path)), World.single(), 12, 12, view_transform(16), image_collate)
    assert set(plain) == {"ids", "pixels"}


TOKENIZER = Tokenizer(train_tokenizer(["a red apple", "an apple", "the redder of two apples"], 400), 16)


@pytest.mark.parametrize(("more", "vocab"), [(1, 0), (-1, 0), (0, -1)])
def test_codes_that_the_model_does_not_have_are_refused_by_the_record(more: int, vocab: int, tmp_path: Path) -> None:
    record = list(code_set(str(tmp_path)).records())[-1]
    length, most = len(record["codes"]), int(record["codes"].max())
    assert code_transform(TOKENIZER, 0, positions=length, vocab=most + 1)(record, 0)["codes"].max() == most
    message = rf"record '{record['id']}' of the code set has {length} codes up to {most}; this run's dVAE makes .*launcher\.py encode"
    with pytest.raises(DataError, match=message):
        code_transform(TOKENIZER, 0, positions=length + more, vocab=most + 1 + vocab)(record, 0)
