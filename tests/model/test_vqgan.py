"""VQGANs compute what their publishers' programs compute: numbers recorded from these, and a second implementation (tests/support/published_vqgans.py). 5 s."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from infra.config import load
from model.config import DVAEConfig
from model.tokenizer_kinds import image_tokenizer
from model.vqgan import Vqgan
from tests.support.published_vqgans import FACTORS, Published
from tests.support.root import ROOT
from train.config import RunConfig
from train.verbs.import_dvae import read_published
from train.weights.vqgan_files import read_vqgan

SIZE = 32
RECORDED = json.loads((ROOT / "tests" / "golden" / "vqgans.json").read_text())
"""Codes and every 13th by 17th value of the decoder, of ``pictures()``, by the modules of taming-transformers (3ba01b2) and LlamaGen (ce98ec4) with torch 2.15."""


def pictures(count: int = 2) -> Tensor:
    return torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))


def sizes(published: Published) -> DVAEConfig:
    return load(RunConfig, {}, "test", [*published.words(SIZE), "clip.patch=8"]).dvae


@pytest.fixture(scope="module", params=FACTORS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Published, Vqgan]:
    published = Published(request.param)
    path = published.write(tmp_path_factory.mktemp("weights") / "model.ckpt")
    return published, read_published(path, sizes(published)).eval()


def test_codes_and_pictures_are_those_of_the_publishers_programs(both: tuple[Published, Vqgan]) -> None:
    published, model = both
    codes, values = RECORDED[published.layout]["codes"], RECORDED[published.layout]["values"]
    found_BYX = model.encode(pictures())
    assert found_BYX.flatten().tolist() == codes and len(set(codes)) > len(codes) // 3
    drawn_B3YX = model.decode(found_BYX)[:, :, ::13, ::17].flatten()
    assert torch.allclose(drawn_B3YX, (torch.tensor(values) + 1).div(2).clamp(0, 1), atol=1e-5)
    assert torch.equal(published.encode(pictures()), found_BYX)
    assert torch.allclose(model.decode(found_BYX), published.decode(found_BYX).clamp(0, 1), atol=1e-5)


def test_a_file_shows_its_sizes_and_a_safetensors_file_holds_the_same(both: tuple[Published, Vqgan], tmp_path: Path) -> None:
    published, model = both
    found = read_vqgan(published.write(tmp_path / "model.safetensors"))
    assert found.shape(DVAEConfig(image_size=SIZE)) == sizes(published) == model.cfg
    assert found.tensors.keys() == model.state_dict().keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in model.state_dict().items())


def test_the_protocol_of_image_tokenizers(both: tuple[Published, Vqgan]) -> None:
    _, model = both
    assert (model.vocab, model.grid) == (512, SIZE // model.cfg.downsample)
    with pytest.raises(ValueError, match=r"pictures of shape \[1, 3, 16, 16\]: expected \[batch, 3, 32, 32\]"):
        model.encode(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match=r"codes from 0 to 512: dvae\.vocab = 512 accepts 0 to 511"):
        model.decode(torch.full((1, model.grid, model.grid), 512).tril())
    with pytest.raises(ValueError, match=r"codes of shape \[1, 9, 9\] and torch\.int64: expected integers"):
        model.decode(torch.zeros(1, 9, 9, dtype=torch.int64))


def test_bf16_changes_pictures_little_and_blocks_of_distances_change_no_code(both: tuple[Published, Vqgan], monkeypatch: pytest.MonkeyPatch) -> None:
    _, model = both
    codes_BYX = model.encode(pictures())
    half = image_tokenizer(model.cfg, torch.bfloat16)
    half.load_state_dict(model.state_dict())
    difference = (half.decode(codes_BYX) - model.decode(codes_BYX)).abs().max()
    assert 0 < difference < 0.1
    monkeypatch.setattr("model.vqgan._DISTANCES_AT_ONCE", 3 * model.vocab)
    assert torch.equal(model.encode(pictures()), codes_BYX)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factors": (1, 2)}, r"groups = 4, factors = \[1, 2\] and downsample = 8: it has one factor for each group"),
        ({"downsample": 4}, r"downsample = 4: it has one factor for each group, and downsample = 2\*\*\(groups - 1\)"),
        ({"latent": 0}, "latent = 0: must be positive"),
        ({"width": 24}, "width = 24 times factor 1: the channels of a group must be a positive multiple of 32"),
        ({"attention": (4,)}, r"attention = \[4\]: groups are counted from 0 to 3"),
        ({"codebook": "gumbel"}, "codebook = 'gumbel' with latent = 16 and init_width = 8: they must be equal"),
        ({"kind": "dvae"}, r"factors = \[1, 2, 2, 4\], attention = \[3\], latent = 16: only for kind = 'vqgan'"),
    ],
)
def test_sizes_that_are_no_vqgan_are_refused(change: dict[str, Any], message: str) -> None:
    good = vars(sizes(Published("taming f8")))
    with pytest.raises(ValueError, match=message):
        DVAEConfig(**good | change)
