"""Crops of a picture: as many different ones as there are code sets, each drawn from the seed that is kept beside its codes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.audit.check_parts import Rules, record_problem
from data_pipeline.images.crops import CropBox, cut, decode, transformer_crop
from data_pipeline.shards.shard_set import CODES_SCHEMA
from tests.support.made_sets import as_dict, image, png
from train.config import RunConfig, load_run
from train.stages.encode import _settings
from train.stages.encode_records import CodeMaker

CFG = load_run("tiny", ["encode.batch=2"])
SIZE = CFG.dvae.image_size
CROPS = 4


class Mean:
    """Instead of a dVAE: one code that any other pixel would change."""

    def encode(self, pixels_B3YX: torch.Tensor) -> torch.Tensor:
        bytes_BN = (pixels_B3YX * 255).round().long().flatten(1)
        return (bytes_BN * torch.arange(1, bytes_BN.shape[1] + 1)).sum(1)[:, None, None] % 65521


def picture(number: int, **fields: Any) -> dict[str, Any]:
    return as_dict(image(number, image=png(number, 9 * SIZE, 7 * SIZE), width=9 * SIZE, height=7 * SIZE, **fields))


def codes_of(records: list[dict[str, Any]], cfg: RunConfig, crops: int = CROPS) -> list[list[Any]]:
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as decoders:
        maker = CodeMaker(cfg, Mean(), torch.device("cpu"), reader, decoders)  # type: ignore[arg-type]
        return [list(maker.codes(iter(records), crop)) for crop in range(crops)]


@pytest.fixture(scope="module")
def made() -> list[list[Any]]:
    """Code records of three pictures, for each crop."""
    return codes_of([picture(number) for number in range(3)], CFG)


def test_each_crop_of_a_picture_is_another_one(made: list[list[Any]]) -> None:
    for of_a_picture in zip(*made, strict=True):
        assert len({str(record.crop) for record in of_a_picture}) == len({int(record.codes[0]) for record in of_a_picture}) == CROPS
        assert [record.crop_index for record in of_a_picture] == list(range(CROPS))


def test_a_crop_is_drawn_from_the_seed_that_is_kept_beside_it(made: list[list[Any]]) -> None:
    for records in made:
        for record in records:
            rng = np.random.Generator(np.random.Philox(record.seed))
            assert record.crop == transformer_crop((9 * SIZE, 7 * SIZE), SIZE, CFG.encode.scale_max, rng).to_json()


MIRRORING = load_run("tiny", ["encode.batch=2", "encode.crops=2", "encode.mirror=true", 'encode.mirror_words=["bild"]'])


def test_every_second_crop_is_mirrored_half_of_the_pictures_begin_with_it_and_captions_and_validation_can_forbid_it() -> None:
    free, bound, held = (
        [picture(n, captions=[c, "x"], split=s) for n in range(24)] for c, s in (("a", "train"), ("Bild", "train"), ("a", "validation"))
    )
    plain, found = codes_of(free, CFG, 2), codes_of(free, MIRRORING, 2)
    flips = np.array([[record.crop["flip"] for record in records] for records in found])
    assert (flips[0] != flips[1]).all() and 4 < flips[0].sum() < 20
    for of_plain, of_found in zip(plain, found, strict=True):
        for source, before, after in zip(free, of_plain, of_found, strict=True):
            assert after.crop == before.crop | {"flip": after.crop["flip"]} and after.seed == before.seed
            pixels = cut(decode(source["image"]), CropBox.from_json(before.crop), SIZE)
            shown = np.ascontiguousarray(pixels[:, ::-1]) if after.crop["flip"] else pixels
            tensor = torch.from_numpy(shown)[None].permute(0, 3, 1, 2).float() / 255
            assert int(after.codes[0]) == int(Mean().encode(tensor)) and (int(before.codes[0]) != int(after.codes[0])) == after.crop["flip"]
    for kept in (bound, held):
        assert [[str(record) for record in records] for records in codes_of(kept, MIRRORING, 2)] == [
            [str(record) for record in records] for records in codes_of(kept, CFG, 2)
        ]


def test_the_settings_of_a_code_set_say_which_words_forbade_it_and_validate_asks_them() -> None:
    fp32 = torch.float32
    assert "unmirrored" not in _settings(CFG, 0, "train", fp32) | _settings(MIRRORING, 0, "validation", fp32)
    settings = _settings(MIRRORING, 1, "train", fp32)
    assert settings["unmirrored"] == list(MIRRORING.encode.unmirrored()) and {"bild", "left*"} <= set(settings["unmirrored"])
    rules, size = Rules(CODES_SCHEMA, settings), (9 * SIZE, 7 * SIZE)
    records = [as_dict(record) for record in codes_of([picture(n, captions=["a"]) for n in range(8)], MIRRORING, 2)[1]]
    assert {record["crop"]["flip"] for record in records} == {True, False}
    for record in records:
        assert record_problem(record, rules, size) == ""
        flip = record["crop"]["flip"]
        said = f"its crop is {'not ' if flip else ''}mirrored, against its id, its captions and the words in the settings of its set"
        assert record_problem(record | {"crop": record["crop"] | {"flip": not flip}}, rules, size) == said
        assert record_problem(record, Rules(CODES_SCHEMA, settings | {"unmirrored": 3}), size) == "its set names as unmirrored what are no words"
    plain = Rules(CODES_SCHEMA, {key: value for key, value in settings.items() if key != "unmirrored"})
    assert {record_problem(record, plain, size)[:20] for record in records} == {"", "its crop is mirrored"}
