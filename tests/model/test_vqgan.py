"""VQGANs compute what their publishers' programs compute: numbers recorded from these, and a second implementation (tests/support/published_vqgans.py). 5 s."""

from __future__ import annotations

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
from train.config import RunConfig
from train.verbs.import_dvae import read_published
from train.weights.vqgan_files import read_vqgan

SIZE = 32
RECORDED: dict[str, tuple[list[int], list[float]]] = {
    "taming f16": (
        [486, 65, 486, 457, 161, 325, 14, 383],
        [
            -0.292952,
            -1.023242,
            0.110598,
            -0.972354,
            -0.620634,
            -0.716173,
            -0.172148,
            -0.832214,
            0.365335,
            -0.370265,
            -0.140313,
            1.416692,
            0.114544,
            0.019093,
            -0.181233,
            0.694374,
            -0.100658,
            0.74729,
            -0.180174,
            -0.062672,
            0.705688,
            -0.739519,
            -0.337271,
            -0.345207,
            -0.013394,
            -0.187134,
            0.187524,
            -0.270064,
            0.20637,
            1.168411,
            -0.201139,
            0.084003,
            -0.596487,
            0.988465,
            -0.335872,
            -0.073209,
        ],
    ),
    "taming f8": (
        [
            354,
            370,
            246,
            300,
            358,
            352,
            491,
            84,
            443,
            387,
            383,
            323,
            417,
            244,
            323,
            464,
            491,
            403,
            246,
            244,
            139,
            286,
            358,
            300,
            491,
            323,
            451,
            426,
            223,
            434,
            434,
            318,
        ],
        [
            -0.033472,
            0.031906,
            -0.07746,
            -1.0379,
            0.118845,
            1.014741,
            0.033361,
            -0.074436,
            -0.215632,
            -0.511665,
            0.387561,
            -0.149414,
            0.096497,
            0.101141,
            0.44492,
            0.900522,
            -0.084201,
            -0.499541,
            -0.045917,
            -0.345118,
            0.051657,
            -1.343602,
            0.135586,
            0.631532,
            -0.027993,
            0.189447,
            0.247837,
            -0.484921,
            -0.012694,
            -0.872159,
            0.248383,
            0.282573,
            0.607023,
            -1.195309,
            0.270096,
            -0.542113,
        ],
    ),
    "taming gumbel f8": (
        [
            286,
            461,
            212,
            462,
            191,
            73,
            217,
            355,
            32,
            73,
            239,
            128,
            497,
            159,
            108,
            109,
            42,
            9,
            73,
            140,
            191,
            22,
            355,
            128,
            99,
            310,
            426,
            444,
            482,
            239,
            7,
            191,
        ],
        [
            0.709167,
            0.503583,
            0.530822,
            -2.789671,
            0.550446,
            -0.722107,
            -0.088056,
            0.26425,
            0.121865,
            -1.330647,
            0.178654,
            -1.240061,
            -0.213236,
            -0.383966,
            0.433759,
            0.622727,
            0.322979,
            0.76967,
            0.707921,
            0.317456,
            0.347525,
            -0.965561,
            0.178286,
            -0.914482,
            0.155991,
            -0.59969,
            0.143491,
            -1.216365,
            0.319073,
            0.321145,
            0.018455,
            -0.426744,
            0.325371,
            0.766922,
            0.071239,
            0.590525,
        ],
    ),
    "LlamaGen VQ-16": (
        [358, 494, 148, 93, 202, 87, 42, 250],
        [
            -0.297945,
            -0.836181,
            0.283065,
            -0.83989,
            -0.640498,
            0.252495,
            -0.221406,
            -1.125236,
            0.282954,
            0.303364,
            -0.182663,
            1.54582,
            0.241361,
            -0.109131,
            -0.296445,
            0.309317,
            -0.156431,
            0.542009,
            -0.275001,
            -0.688277,
            -0.275576,
            0.054467,
            -0.711402,
            -0.503376,
            -0.142474,
            -0.687071,
            0.162049,
            -0.48095,
            -0.060578,
            0.318613,
            -0.006577,
            -0.075999,
            -0.056077,
            0.067915,
            -0.123292,
            -0.076194,
        ],
    ),
    "LlamaGen VQ-8": (
        [
            154,
            26,
            285,
            300,
            358,
            502,
            26,
            84,
            279,
            242,
            383,
            444,
            274,
            389,
            363,
            200,
            205,
            255,
            137,
            93,
            113,
            30,
            358,
            358,
            491,
            426,
            451,
            426,
            394,
            274,
            108,
            116,
        ],
        [
            -0.428968,
            -0.600068,
            0.00817,
            -1.399897,
            -0.408948,
            1.408358,
            -0.057345,
            0.126751,
            0.206265,
            0.928585,
            0.249885,
            -0.223131,
            0.365129,
            0.413524,
            -0.06912,
            0.60493,
            0.546045,
            -0.19249,
            -0.451256,
            -0.514252,
            -0.321759,
            -0.823329,
            -0.134535,
            0.252028,
            -0.158588,
            -0.056892,
            -0.165101,
            0.055056,
            -0.247117,
            -0.583877,
            0.382856,
            0.592058,
            0.24282,
            -0.197777,
            0.0873,
            -0.565866,
        ],
    ),
}
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
    codes, values = RECORDED[published.layout]
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
