"""``launcher.py validate``: the records of images and codes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.audit import check_set
from data_pipeline.audit.check_parts import Rules, check_part, crop_problem, record_problem
from data_pipeline.images.crops import CropBox
from data_pipeline.shards.shard_set import CODES_SCHEMA, IMAGE_SCHEMA
from tests.support.made_sets import SIDE, VOCAB, as_dict, code, image, make_images


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, ""),
        ({"id": ""}, "the id is empty"),
        ({"captions": []}, r"captions are '\[\]', expected a list of at least one text"),
        ({"captions": ["a", " "]}, "captions are"),
        ({"captions": "a"}, "captions are"),
        ({"captions": [3]}, "captions are"),
        ({"width": 0}, "0 x 20 pixels"),
        ({"image": b""}, "the image has no bytes"),
        ({"split": "validation"}, "belongs to split 'validation', the set is 'train'"),
    ],
)
def test_records_of_images_keep_to_the_rules(fields: dict[str, Any], words: str) -> None:
    found = record_problem(as_dict(image(3, **fields)), IMAGES, None)
    assert re.match(words, found) if words else found == ""


def test_images_are_decoded_on_demand() -> None:
    rules = Rules(IMAGE_SCHEMA, {}, decode=True)
    assert record_problem(as_dict(image(3)), rules, None) == ""
    assert record_problem(as_dict(image(3, width=25)), rules, None) == "the image has 24 x 20 pixels, the record says 25 x 20"
    assert "cannot be decoded" in record_problem(as_dict(image(3, image=b"GIF89a")), rules, None)
    assert record_problem(as_dict(image(3, image=b"GIF89a")), IMAGES, None) == ""


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, ""),
        ({"codes": np.full(16, VOCAB, np.uint16)}, "holds code 32, the dVAE has 32"),
        ({"crop_index": 1}, "is of crop 1, the set of crop 0"),
        ({"seed": 1}, "its seed does not follow from the run's seed and its id"),
        ({"crop": {"box": [0, 1, 2]}}, r"the crop is no crop box \(ValueError"),
        ({"crop": {}}, r"the crop is no crop box \(KeyError"),
    ],
)
def test_records_of_codes_keep_to_the_rules(fields: dict[str, Any], words: str) -> None:
    found = record_problem(as_dict(code(3, **fields)), CODES, (24, 20))
    assert re.match(words, found) if words else found == ""


@pytest.mark.parametrize(
    ("box", "resize", "offset", "size", "words"),
    [
        ((2, 0, 22, 20), 16, (0, 0), (24, 20), ""),
        ((2, 0, 22, 20), 18, (2, 2), (24, 20), ""),
        ((2, 0, 22, 20), 16, (0, 0), (0, 0), "there is no image of this id"),
        ((2, 0, 22, 19), 16, (0, 0), None, r"the crop box \[2, 0, 22, 19\] is no square"),
        ((-1, 0, 19, 20), 16, (0, 0), None, "is no square in an image"),
        ((5, 0, 25, 20), 16, (0, 0), (24, 20), r"reaches out of its image of 24 x 20 pixels"),
        ((2, 1, 22, 21), 16, (0, 0), (24, 20), r"reaches out of its image of 24 x 20 pixels"),
        ((2, 0, 22, 20), 21, (0, 0), None, "the crop is resized to 21, outside 16 to 20"),
        ((2, 0, 22, 20), 15, (0, 0), None, "the crop is resized to 15, outside 16 to 20"),
        ((2, 0, 22, 20), 18, (0, 3), None, r"the crop at \[0, 3\] of 16 pixels reaches out of the resized 18"),
        ((2, 0, 22, 20), 18, (-1, 0), None, r"the crop at \[-1, 0\]"),
    ],
)
def test_crops_lie_in_their_images(
    box: tuple[int, int, int, int], resize: int, offset: tuple[int, int], size: tuple[int, int] | None, words: str
) -> None:
    found = crop_problem(CropBox(box, resize, offset), SIDE, size)
    assert re.search(words, found) if words else found == ""


def test_many_bad_records_of_a_file_are_told_in_four_lines(tmp_path: Path) -> None:
    make_images(str(tmp_path), [[image(number, width=0, image=b"x") for number in range(9)]])
    layout = check_set.read_layout(str(tmp_path))
    result = check_part(layout.jobs(Rules(IMAGE_SCHEMA, {}))[0])
    texts = [problem.what for problem in result.problems]
    assert texts == [*(f"record {number} ('id-{number}'): 0 x 20 pixels" for number in range(3)), "and 6 more records like these"]


IMAGES, CODES = Rules(IMAGE_SCHEMA, {"split": "train"}), Rules(CODES_SCHEMA, {"image_size": SIDE, "crop_index": 0, "seed": 0}, VOCAB)
