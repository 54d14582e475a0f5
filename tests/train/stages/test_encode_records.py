"""Crops of a picture: as many different ones as there are code sets, each drawn from the seed that is kept beside its codes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from data_pipeline.images.crops import transformer_crop
from tests.support.made_sets import as_dict, image, png
from train.config import load_run
from train.stages.encode_records import CodeMaker

CFG = load_run("tiny", ["encode.batch=2"])
SIZE = CFG.dvae.image_size
CROPS = 4


class Mean:
    """Instead of a dVAE: one code that any other pixel would change."""

    def encode(self, pixels_B3YX: torch.Tensor) -> torch.Tensor:
        bytes_BN = (pixels_B3YX * 255).round().long().flatten(1)
        return (bytes_BN * torch.arange(1, bytes_BN.shape[1] + 1)).sum(1)[:, None, None] % 65521


@pytest.fixture(scope="module")
def made() -> list[list[Any]]:
    """Code records of three pictures, for each crop."""
    records = [as_dict(image(number, image=png(number, 9 * SIZE, 7 * SIZE), width=9 * SIZE, height=7 * SIZE)) for number in range(3)]
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as decoders:
        maker = CodeMaker(CFG, Mean(), torch.device("cpu"), reader, decoders)  # type: ignore[arg-type]
        return [list(maker.codes(iter(records), crop)) for crop in range(CROPS)]


def test_each_crop_of_a_picture_is_another_one(made: list[list[Any]]) -> None:
    for of_a_picture in zip(*made, strict=True):
        assert len({str(record.crop) for record in of_a_picture}) == len({int(record.codes[0]) for record in of_a_picture}) == CROPS
        assert [record.crop_index for record in of_a_picture] == list(range(CROPS))


def test_a_crop_is_drawn_from_the_seed_that_is_kept_beside_it(made: list[list[Any]]) -> None:
    for records in made:
        for record in records:
            rng = np.random.Generator(np.random.Philox(record.seed))
            assert record.crop == transformer_crop((9 * SIZE, 7 * SIZE), SIZE, CFG.encode.scale_max, rng).to_json()
