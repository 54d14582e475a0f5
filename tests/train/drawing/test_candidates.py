"""Candidates of a caption: each another picture, whatever is drawn beside it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from model.decoder import DrawingWeights
from model.dvae import DVAE
from model.transformer import Transformer
from train.config import load_run
from train.drawing.draw import Picture, draw
from train.drawing.memory import Room
from train.drawing.settings import Settings
from train.drawing.source import Models

CANDIDATES = 5


@pytest.fixture(scope="module")
def models() -> Models:
    """An untrained transformer and dVAE."""
    torch.manual_seed(0)
    cfg = load_run("tiny", [])
    tokens = cfg.tokenizer.max_tokens
    tokenizer: Any = SimpleNamespace(encode=lambda caption: (np.arange(tokens), len(caption) % tokens))
    weights = DrawingWeights(Transformer(cfg.dalle, cfg.stream_shape()))
    return Models("toy", cfg, DVAE(cfg.dvae), weights, tokenizer, None, {}, "untrained")


def drawn(models: Models, caption: str, batch: int, n: int = CANDIDATES) -> list[Picture]:
    with torch.no_grad():
        return [picture for some in draw(models, [caption], Settings(n=n, batch=batch, window=1)) for picture in some]


def test_every_candidate_is_another_picture_whatever_is_drawn_at_once(models: Models) -> None:
    whole = drawn(models, "a caption", CANDIDATES)
    assert len({picture.seed for picture in whole}) == len({picture.codes_hash for picture in whole}) == CANDIDATES
    for batch in (1, 2, 4):
        some = drawn(models, "a caption", batch)
        assert [(picture.candidate, picture.seed, picture.codes_hash) for picture in some] == [
            (picture.candidate, picture.seed, picture.codes_hash) for picture in whole
        ]


def test_a_candidate_depends_on_its_caption_and_its_number_alone(models: Models) -> None:
    whole, fewer = drawn(models, "a caption", 2), drawn(models, "a caption", 2, n=3)
    assert [picture.codes_hash for picture in fewer] == [picture.codes_hash for picture in whole[:3]]
    assert not {picture.seed for picture in drawn(models, "another", 2)} & {picture.seed for picture in whole}


@pytest.mark.parametrize(("width", "pictures", "windows"), [(128, 1, 1), (384, 1, 16), (512, 2, 8), (512, 8, 2), (512, 17, 1)])
def test_passes_compute_several_positions_where_reading_weights_takes_most_of_their_time(width: int, pictures: int, windows: int) -> None:
    cfg = load_run("demo", [f"dalle.width={width}"])
    assert Room(cfg, torch.device("cpu"), 4).window(Settings(), pictures) == windows
    assert Room(cfg, torch.device("cuda"), 4).window(Settings(), 512) == 8 and Room(cfg, torch.device("cpu"), 4).window(Settings(window=4), 1) == 4
