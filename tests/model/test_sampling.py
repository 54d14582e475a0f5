"""Drawn pictures follow the model, the seed, and nothing else."""

from typing import Any

import pytest
import torch

from model.config import StreamShape, TransformerConfig
from model.sampling import CodePredictor, sample
from model.transformer import Transformer

SHAPE = StreamShape(text_tokens=5, text_vocab=40, grid=4, image_vocab=24)
TEXT = torch.arange(20).view(4, 5)
LENGTHS = torch.tensor([3, 0, 5, 2])


def build() -> Transformer:
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(layers=5, width=32, heads=2, conv_kernel=3), SHAPE)
    # Wide logits, so that a wrong one shows.
    with torch.no_grad():
        model.image_unembedding.weight.mul_(10)
        for block in model.resblocks:
            for parameter in block.parameters():
                parameter.mul_(2)
    return model


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_cached_logits_equal_those_of_the_whole_stream() -> None:
    model = build()
    codes_BI = torch.randint(0, 24, (4, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted_BIN = model.logits(TEXT, LENGTHS, codes_BI)[1]
        one_by_one, in_leaps = CodePredictor(model, TEXT, LENGTHS), CodePredictor(model, TEXT, LENGTHS)
        for position in range(16):
            torch.testing.assert_close(one_by_one(codes_BI[:, :position]), wanted_BIN[:, position], rtol=1e-4, atol=1e-4)
        for position in (3, 4, 11, 15):
            torch.testing.assert_close(in_leaps(codes_BI[:, :position]), wanted_BIN[:, position], rtol=1e-4, atol=1e-4)


def test_a_picture_depends_on_its_seed_and_not_on_its_neighbours() -> None:
    model = build()
    together_BI = sample(model, TEXT, LENGTHS, generators(5, 6, 7, 8))
    alone_BI = sample(model, TEXT[2:3], LENGTHS[2:3], generators(7))
    assert together_BI.shape == (4, 16)
    assert together_BI[2].equal(alone_BI[0])
    assert not together_BI[2].equal(sample(model, TEXT[2:3], LENGTHS[2:3], generators(9))[0])


def test_given_codes_are_kept_and_the_rest_is_drawn_as_if_they_had_been_drawn() -> None:
    model = build()
    whole_BI = sample(model, TEXT, LENGTHS, generators(1, 2, 3, 4))
    assert sample(model, TEXT, LENGTHS, generators(1, 2, 3, 4), prefix_codes=whole_BI[:, :7]).equal(whole_BI)
    assert sample(model, TEXT, LENGTHS, generators(1, 2, 3, 4), prefix_codes=whole_BI).equal(whole_BI)
    other_BI = (whole_BI[:, :7] + 1) % 24
    drawn_BI = sample(model, TEXT, LENGTHS, generators(1, 2, 3, 4), prefix_codes=other_BI)
    assert drawn_BI[:, :7].equal(other_BI)
    assert not drawn_BI[:, 7:].equal(whole_BI[:, 7:])


def test_first_codes_are_drawn_in_proportion_to_their_probabilities() -> None:
    model = build()
    many = 1500
    text_BT, lengths_B = TEXT[:1].expand(many, -1), LENGTHS[:1].expand(many)
    prefix_BP = torch.full((many, 15), 3)
    drawn_B = sample(model, text_BT, lengths_B, generators(*range(many)), temperature=2.0, prefix_codes=prefix_BP)[:, -1]
    share_N = drawn_B.bincount(minlength=24) / many
    with torch.no_grad():
        wanted_N = (model.logits(TEXT[:1], LENGTHS[:1], torch.full((1, 16), 3))[1][0, -1] / 2).softmax(0)
    assert wanted_N.max() > 0.08
    assert float((share_N - wanted_N).abs().max()) < 0.045


def test_top_k_draws_among_the_likeliest_codes_only() -> None:
    model = build()
    greedy_BI = sample(model, TEXT, LENGTHS, generators(1, 2, 3, 4), top_k=1)
    assert greedy_BI.equal(sample(model, TEXT, LENGTHS, generators(9, 8, 7, 6), top_k=1))
    drawn_BI = sample(model, TEXT, LENGTHS, generators(1, 2, 3, 4), top_k=3, temperature=5.0)
    with torch.no_grad():
        rank_BIN = model.logits(TEXT, LENGTHS, drawn_BI)[1].argsort(2, descending=True).argsort(2)
    ranks = rank_BIN.gather(2, drawn_BI[..., None])
    assert int(ranks.max()) == 2
    assert int(ranks.min()) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generators": generators(1)}, "1 generators for 4 captions"),
        ({"temperature": 0.0}, "generate.temperature = 0.0: must be above 0"),
        ({"top_k": 25}, "top_k = 25: accepted are 1 to dvae.vocab = 24"),
        ({"prefix_codes": torch.zeros(4, 17, dtype=torch.long)}, r"prefix_codes have shape \(4, 17\): expected \[4, at most 16\]"),
        ({"prefix_codes": torch.zeros(3, 2, dtype=torch.long)}, r"prefix_codes have shape \(3, 2\)"),
    ],
)
def test_what_cannot_be_drawn_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(build(), TEXT, LENGTHS, **({"generators": generators(1, 2, 3, 4)} | options))
