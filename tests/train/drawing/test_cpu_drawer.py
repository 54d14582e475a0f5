"""Drawing on a CPU through compiled kernels: the model's logits, the same bits whatever is drawn beside. Seconds: about 6, and 30 where nothing is compiled yet."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from model.decoder import DrawingWeights, Texts, cache_bytes, text_bytes
from model.draw_cache import Window
from model.gumbel import gumbel_noise
from model.sampling import NotFiniteError, Rule, sample
from tests.model.test_decoder import CODES, LENGTHS, SHAPE, TEXT, build, in_windows, one_by_one, wanted
from tests.support.logits import logits
from train.drawing import cpu_drawer, cpu_kernels
from train.drawing.cpu_drawer import CpuDrawer, CpuWeights

MASKS = [{"layers": 6}, {"layers": 3, "conv_offsets": "causal"}, {"layers": 2, "conv_kernel": 1}, {"layers": 1, "conv_kernel": 7}]


@pytest.mark.parametrize("masks", MASKS)
def test_logits_one_at_a_time_are_those_of_the_whole_stream(masks: dict[str, Any]) -> None:
    model = build(**masks)
    drawer = CpuWeights(model).drawer([Texts(TEXT, LENGTHS, 1)])
    assert isinstance(drawer, CpuDrawer)
    torch.testing.assert_close(one_by_one(drawer, CODES), wanted(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("masks", MASKS)
def test_windows_at_places_of_their_own_give_bits_of_states_drawn_one_by_one(masks: dict[str, Any]) -> None:
    """Pictures go on by numbers of their own; what was not kept leaves no trace."""
    weights = CpuWeights(build(**masks), deterministic=True)
    alone_BIN = one_by_one(weights.drawer([Texts(TEXT, LENGTHS, 1)]), CODES)
    compared = 0
    for picture, places, got_QN in in_windows(weights.drawer([Texts(TEXT, LENGTHS, 1)]), CODES, 4, 4):
        assert got_QN.equal(alone_BIN[picture, places])
        compared += len(got_QN)
    assert compared == 64


def test_given_codes_and_groups_of_texts_are_read_as_torch_reads_them() -> None:
    model = build(layers=6)
    text_BT, lengths_B = TEXT[[0, 0, 2, 2]], LENGTHS[[0, 0, 2, 2]]
    captions_BIN = logits(model, text_BT, lengths_B, CODES)[1]
    empty_BIN = logits(model, torch.zeros_like(text_BT), torch.zeros_like(lengths_B), CODES)[1]
    groups = [Texts(TEXT[[0, 2]], LENGTHS[[0, 2]], 2), Texts(torch.zeros_like(TEXT[:1]), torch.zeros_like(LENGTHS[:1]), 4)]
    for given in (1, 4, 7, 15):
        drawer = CpuWeights(model).drawer(groups)
        drawer.fill(CODES.repeat(2, 1), given)
        got_BQN = drawer.logits(CODES.repeat(2, 1), Window(torch.full((8,), given), 1, given))
        torch.testing.assert_close(got_BQN[:, 0], torch.cat([captions_BIN, empty_BIN])[:, given], rtol=1e-5, atol=1e-5)


@pytest.fixture
def by_torch(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Products of several rows are torch's at this small size too. Counts the layers that were computed so."""
    monkeypatch.setattr(cpu_drawer, "FEW_PRODUCTS", 0)
    count, layer = [0], CpuDrawer._layer

    def counted(*args: Any) -> None:
        count[0] += 1
        layer(*args)

    monkeypatch.setattr(CpuDrawer, "_layer", counted)
    return count


@pytest.mark.parametrize("eight_bits", [False, True])
@pytest.mark.parametrize("masks", [*MASKS, {"layers": 4, "qk_norm": True, "rotary_positions": True}])
def test_products_of_many_rows_give_the_same_logits(masks: dict[str, Any], eight_bits: bool, by_torch: list[int]) -> None:
    """One at a time and in windows at places of their own, of several captions, one of which has several pictures."""
    model = build(**masks)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    weights, texts = CpuWeights(model, eight_bits=eight_bits), [Texts(TEXT[[0, 2]], LENGTHS[[0, 2]], 2)]
    expected_BIN = one_by_one(DrawingWeights.drawer(weights, texts), CODES)
    torch.testing.assert_close(one_by_one(weights.drawer(texts), CODES), expected_BIN, rtol=1e-5, atol=1e-5)
    for picture, places, got_QN in in_windows(weights.drawer(texts), CODES, 4, 4):
        torch.testing.assert_close(got_QN, expected_BIN[picture, places], rtol=1e-5, atol=1e-5)
    assert by_torch[0] > 16 * masks["layers"]


def test_one_picture_and_small_passes_are_the_kernels_alone(by_torch: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    one_by_one(CpuWeights(build(layers=2)).drawer([Texts(TEXT[:1], LENGTHS[:1], 1)]), CODES[:1])
    monkeypatch.setattr(cpu_drawer, "FEW_PRODUCTS", 4 * 12 * 32**2)
    one_by_one(CpuWeights(build(layers=2)).drawer([Texts(TEXT, LENGTHS, 1)]), CODES)
    assert by_torch == [0]


def test_probabilities_are_those_of_numpy_and_a_nan_is_never_lost() -> None:
    scores_P = torch.randn(300, generator=torch.Generator().manual_seed(1)).numpy() * 5
    for unseen, factor, shift in ((0, 1, 0), (1, 1, 0), (289, 1, 0), (100, 50, -900)):  # the last ones far below 0 and far from each other
        wanted_P = (scores_P[:290] * factor + shift).astype("float64")
        wanted_P[:unseen] = -float("inf")
        got_P = wanted_P.astype("float32")
        cpu_kernels._softmax(got_P, 290)
        wanted_P = torch.from_numpy(wanted_P).softmax(0)
        torch.testing.assert_close(torch.from_numpy(got_P), wanted_P.float(), rtol=1e-5, atol=1e-8)
    for bad in (float("nan"), -float("nan"), float("inf")):
        got_P = scores_P.copy()
        got_P[7] = bad
        cpu_kernels._softmax(got_P, 290)
        assert torch.from_numpy(got_P[:290]).isnan().any()


@pytest.mark.parametrize("rule", [Rule(), Rule(guidance=3.0), Rule(temperature=0.7, top_k=5)])
def test_codes_are_those_that_torch_draws_at_any_window(rule: Rule) -> None:
    model, seeds = build(layers=3), list(range(4))
    torchs_BI = sample(DrawingWeights(model), TEXT, LENGTHS, seeds, rule).codes_BI
    for window in (1, 4):
        assert sample(CpuWeights(model, deterministic=True), TEXT, LENGTHS, seeds, rule, window=window).codes_BI.equal(torchs_BI)
        assert sample(CpuWeights(model), TEXT, LENGTHS, seeds, rule, window=window).codes_BI.equal(torchs_BI)


def test_alone_means_the_same_bits_at_any_split_of_a_batch() -> None:
    weights = CpuWeights(build(layers=6), deterministic=True)
    whole_BIN = one_by_one(weights.drawer([Texts(TEXT[[0, 2]], LENGTHS[[0, 2]], 5)]), CODES[[0, 1, 2, 3, 0, 1, 2, 3, 0, 1]])
    for picture in range(10):
        caption = [[0, 2][picture // 5]]
        alone_1IN = one_by_one(weights.drawer([Texts(TEXT[caption], LENGTHS[caption], 1)]), CODES[[picture % 4]])
        assert alone_1IN[0].equal(whole_BIN[picture])


def test_what_is_held_is_the_closed_form_of_the_masks() -> None:
    weights = CpuWeights(build(layers=6))
    for groups in ([Texts(TEXT[:2], LENGTHS[:2], 3)], [Texts(TEXT[:2], LENGTHS[:2], 2), Texts(TEXT[2:3], LENGTHS[2:3], 4)]):
        drawer = weights.drawer(groups)
        pictures, captions = drawer.pictures, sum(len(group.text_CT) for group in groups)
        drawer.logits(CODES[[0] * pictures], Window(torch.zeros(pictures, dtype=torch.int64), 1, 0))
        held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in drawer.storages()}
        # Of the present state, which one layer after the other writes over, queries lie beside keys and values.
        present = pictures * 3 * 32 * 4
        assert sum(held.values()) == captions * text_bytes(weights.cfg, SHAPE, 4) + pictures * cache_bytes(weights.cfg, SHAPE, 4, 0) + present


def test_eight_bits_are_near_and_both_ways_of_computing_see_the_same_values() -> None:
    model = build(layers=3)
    rounded = CpuWeights(model, eight_bits=True)
    kernels_BIN = one_by_one(rounded.drawer([Texts(TEXT, LENGTHS, 1)]), CODES)
    torchs_BIN = one_by_one(DrawingWeights.drawer(rounded, [Texts(TEXT, LENGTHS, 1)]), CODES)
    torch.testing.assert_close(kernels_BIN, torchs_BIN, rtol=1e-5, atol=1e-5)
    difference = float((kernels_BIN - wanted(model)).abs().max() / wanted(model).std())
    assert 0.001 < difference < 0.1
    assert {matrix[0].dtype.name for layer in rounded.matrices for matrix in layer} == {"int8"}


@pytest.mark.parametrize("name", ["q.weight", "k.bias", "v.weight", "post.weight"])
def test_logits_that_are_no_numbers_come_out_of_the_kernels(name: str) -> None:
    model = build(layers=2)
    torch.nn.Module.get_parameter(model.resblocks[0], name).fill_(float("nan"))
    for window in (1, 3):
        with pytest.raises(NotFiniteError, match="the logits of image position"):
            sample(CpuWeights(model), TEXT[:1], LENGTHS[:1], [1], window=window)


@pytest.mark.parametrize("name", ["mlp_1.weight", "mlp_2.weight", "norm.weight"])
def test_nor_are_those_of_the_mlp_swallowed(name: str) -> None:
    model = build(layers=2)
    torch.nn.Module.get_parameter(model.resblocks[3], name).view(-1)[0] = float("nan")
    with pytest.raises(NotFiniteError, match="the logits of image position 0"):
        sample(CpuWeights(model), TEXT[:1], LENGTHS[:1], [1])


def test_codes_are_chosen_by_the_noise_that_torch_makes() -> None:
    weights, draw = CpuWeights(build(layers=1)), torch.Generator().manual_seed(2)
    seeds_B, positions_BQ = torch.tensor([3, 2**62 + 1, 0]), torch.tensor([[0, 1, 1023], [5, 6, 7], [2**20, 3, 4]])
    scores_BQN = torch.randn(3, 3, 5000, generator=draw)
    scores_BQN[..., 100:200] = float("-inf")
    wanted_BQ, code_BQ = DrawingWeights.choose(weights, scores_BQN.clone(), seeds_B, positions_BQ)
    got_BQN = scores_BQN.clone()
    best_BQ, found_BQ = weights.choose(got_BQN, seeds_B, positions_BQ)
    assert found_BQ.equal(code_BQ) and found_BQ.unique().numel() == 9
    torch.testing.assert_close(best_BQ, wanted_BQ, rtol=1e-6, atol=2e-6)
    noise_BQN = gumbel_noise(seeds_B, positions_BQ, 5000)
    torch.testing.assert_close(got_BQN, scores_BQN + noise_BQN, rtol=1e-6, atol=2e-6)
    scores_BQN[1, 2, 77] = float("nan")
    assert weights.choose(scores_BQN, seeds_B, positions_BQ)[0].isnan().nonzero().tolist() == [[1, 2]]
