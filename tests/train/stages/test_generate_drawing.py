"""Candidates of a caption: each another picture, whatever is drawn beside it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from model.config import DVAEConfig, StreamShape, TransformerConfig
from model.dvae import DVAE
from model.transformer import Transformer
from train.config import load_run
from train.stages.generate_drawing import Prompt, draw

CANDIDATES = 5
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def models() -> Any:
    """An untrained transformer and dVAE of 2 x 2 codes."""
    torch.manual_seed(0)
    dvae = DVAE(DVAEConfig(image_size=8, downsample=4, groups=2, blocks_per_group=1, width=8, init_width=8, vocab=64))
    shape = StreamShape(text_tokens=4, text_vocab=10, grid=2, image_vocab=64)
    dalle = Transformer(TransformerConfig(layers=2, width=16, heads=2, conv_kernel=3), shape)
    tokenizer = SimpleNamespace(encode=lambda caption: (np.arange(4), len(caption) % 4))
    return SimpleNamespace(dvae=dvae, dalle=dalle, tokenizer=tokenizer)


def drawn(models: Any, caption: str, batch: int, candidates: int = CANDIDATES) -> tuple[torch.Tensor, list[int]]:
    words = [f"generate.candidates={candidates}", f"generate.batch={batch}", "dvae.image_size=8", "dvae.downsample=4"]
    with torch.no_grad():
        return draw(load_run("tiny", [*words, "clip.patch=4"]), models, Prompt(caption), CPU)


def test_every_candidate_is_another_picture_whatever_is_drawn_at_once(models: Any) -> None:
    pictures_BCYX, seeds = drawn(models, "a caption", CANDIDATES)
    assert len(set(seeds)) == len(pictures_BCYX.flatten(1).unique(dim=0)) == CANDIDATES
    for batch in (1, 2, 4):
        some_BCYX, same = drawn(models, "a caption", batch)
        assert same == seeds
        torch.testing.assert_close(some_BCYX, pictures_BCYX)


def test_a_candidate_depends_on_its_caption_and_its_number_alone(models: Any) -> None:
    pictures_BCYX, seeds = drawn(models, "a caption", 2)
    fewer_BCYX, first = drawn(models, "a caption", 2, candidates=3)
    torch.testing.assert_close(fewer_BCYX, pictures_BCYX[:3])
    assert first == seeds[:3] and not set(drawn(models, "another", 2)[1]) & set(seeds)
