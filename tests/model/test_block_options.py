"""Options of the attention resblock (norms of queries and keys, rotary positions): off they leave no trace, on they are what their formulas say in every engine and in drawing."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from model.attention_engines import make_engine
from model.config import StreamShape, TransformerConfig
from model.decoder import DrawingWeights, Texts
from model.flex import FlexAttention
from model.offsets import Kind
from model.queries import RotaryAttention, turn, turn_table, turned
from model.sampling import Rule, sample
from model.transformer import Transformer, parameter_tags
from tests.model import test_decoder
from tests.model.test_decoder import CODES, LENGTHS, SHAPE, TEXT, in_windows, one_by_one, wanted
from tests.model.test_transformer import batch, gradients
from train.drawing.cpu_drawer import CpuWeights

OPTIONS: list[dict[str, Any]] = [{"qk_norm": True}, {"rotary_positions": True, "qk_norm": True, "base_width": 16, "base_heads": 2}]
CPU = torch.device("cpu")


def build(options: dict[str, Any], **more: Any) -> Transformer:
    """With gains that differ from each other and between layers, as after training."""
    model = test_decoder.build(**({"layers": 3} | options | more))
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    return model


def read_by_attention(model: Transformer, block: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a resblock's branch reads, and the queries, keys and values that it gives to the engine."""
    seen: list[Tensor] = []

    def attend(q_BHSK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, kind: Kind) -> Tensor:
        seen.extend((q_BHSK, k_BHSK, v_BHSK))
        return v_BHSK

    h_BSD = torch.randn(2, SHAPE.states, 32, generator=torch.Generator().manual_seed(1))
    model.resblocks[block].branch(h_BSD, attend)  # type: ignore[operator]
    return h_BSD, seen[0], seen[1], seen[2]


def test_off_there_is_nothing_more_and_on_every_other_weight_is_as_it_was() -> None:
    plain = Transformer(TransformerConfig(layers=2, width=32, heads=2, conv_kernel=3), SHAPE)
    assert not any("_norm" in name for name in plain.state_dict() if name != "final_norm.weight" and name != "final_norm.bias")
    torch.manual_seed(0)
    plain = Transformer(TransformerConfig(layers=2, width=32, heads=2, conv_kernel=3), SHAPE)
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(layers=2, width=32, heads=2, conv_kernel=3, qk_norm=True, rotary_positions=True), SHAPE)
    more = set(model.state_dict()) - set(plain.state_dict())
    assert more == {f"resblocks.{block}.{name}_norm.weight" for block in (0, 2) for name in "qk"}
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in plain.state_dict().items())
    assert all(torch.equal(model.state_dict()[name], torch.ones(16)) for name in more)
    tags = parameter_tags(model)
    for name in more:
        assert tags[name].resblock == int(name.split(".")[1]) and not tags[name].decays and not tags[name].is_block_matrix


def test_queries_and_keys_of_each_head_have_mean_0_and_variance_1_before_the_gain_and_values_stay() -> None:
    model = build({"qk_norm": True})
    block: Any = model.resblocks[2]
    h_BSD, q_BHSK, k_BHSK, v_BHSK = read_by_attention(model, 2)
    for projection, norm, found_BHSK in ((block.q, block.q_norm, q_BHSK), (block.k, block.k_norm, k_BHSK)):
        x_BHSK = projection(h_BSD).unflatten(2, (2, 16)).transpose(1, 2)
        centred_BHSK = x_BHSK - x_BHSK.mean(3, keepdim=True)
        by_hand_BHSK = centred_BHSK / (centred_BHSK.square().mean(3, keepdim=True) + 1e-5).sqrt() * norm.weight
        torch.testing.assert_close(found_BHSK, by_hand_BHSK, rtol=1e-4, atol=1e-5)
    assert v_BHSK.equal(block.v(h_BSD).unflatten(2, (2, 16)).transpose(1, 2))


def test_scores_do_not_grow_with_the_matrices_of_queries_and_keys() -> None:
    model = build({"qk_norm": True})
    before_BIN = wanted(model)
    for block in list(model.resblocks)[::2]:
        for projection in (block.q, block.k):
            projection.weight.mul_(1000), projection.bias.mul_(1000)  # type: ignore[union-attr,operator]
    torch.testing.assert_close(wanted(model), before_BIN, rtol=1e-3, atol=1e-3)


def turned_queries_and_keys(q_SK: Tensor, k_SK: Tensor, shape: StreamShape = SHAPE) -> tuple[Tensor, Tensor]:
    """What an engine is given of queries and keys."""
    seen: list[Tensor] = []
    cfg = TransformerConfig(layers=1, width=2 * q_SK.shape[1], heads=2, conv_kernel=3, rotary_positions=True)

    def attend(q_BHSK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, kind: Kind) -> Tensor:
        seen.extend((q_BHSK[0, 0], k_BHSK[0, 0]))
        return v_BHSK

    RotaryAttention(cfg, shape, attend)(q_SK[None, None], k_SK[None, None], v := torch.zeros(1, 1, *q_SK.shape), "row").equal(v)
    return seen[0], seen[1]


def test_a_pair_of_elements_turns_as_a_complex_number_by_its_rate_and_place() -> None:
    """By hand: heads of 8, two rates of wavelength 2 pi and 20 pi, rows in the first half and columns in the second; keys stand one code before queries."""
    q_SK, k_SK = torch.randn(2, SHAPE.states, 8, generator=torch.Generator().manual_seed(2))
    found = turned_queries_and_keys(q_SK, k_SK)
    places = [[(j, j) for j in range(5)] + [(5 + p // 4, 5 + p % 4) for p in range(16)], [(j - 1, j - 1) for j in range(5)] + [(5, 4)]]
    places[1] += places[0][5:-1]
    for x_SK, found_SK, place in zip((q_SK, k_SK), found, places, strict=True):
        for half in (0, 1):
            pair_SK = torch.complex(x_SK[:, 4 * half : 4 * half + 4 : 2], x_SK[:, 4 * half + 1 : 4 * half + 4 : 2])
            angle_SK = torch.tensor([at[half] for at in place], dtype=torch.float32)[:, None] * torch.tensor([1.0, 0.1])
            wanted_SK = pair_SK * torch.polar(torch.ones_like(angle_SK), angle_SK)
            torch.testing.assert_close(
                found_SK[:, 4 * half : 4 * half + 4], torch.stack([wanted_SK.real, wanted_SK.imag], 2).flatten(1), rtol=1e-4, atol=1e-5
            )


def test_scores_of_alike_states_depend_on_the_way_from_one_code_to_the_other_alone() -> None:
    """Also across the ends of rows, where the distance in raster order says something else."""
    alike_2SK = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(2)).expand(-1, SHAPE.states, -1)
    q_SK, k_SK = turned_queries_and_keys(alike_2SK[0], alike_2SK[1])
    by_way: dict[tuple[str, int, int], list[float]] = {}
    for code in range(16):
        for before in range(code):
            score = float(q_SK[5 + code] @ k_SK[5 + before + 1])  # the state after a code holds it
            by_way.setdefault(("image", code // 4 - before // 4, code % 4 - before % 4), []).append(score)
    for token in range(5):
        for before in range(token):
            by_way.setdefault(("text", token - before, 0), []).append(float(q_SK[token] @ k_SK[before + 1]))
    assert sum(len(scores) > 1 for scores in by_way.values()) > 15
    assert all(max(scores) - min(scores) < 1e-4 for scores in by_way.values())
    means = {way: scores[0] for way, scores in by_way.items() if way[0] == "image"}
    assert len({round(score, 4) for score in means.values()}) == len(means), "every way is another one"


def test_heads_that_hold_no_whole_pairs_for_both_axes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rotary_positions = true with width / heads = 6: .* so it must be a multiple of 4"):
        TransformerConfig(layers=1, width=12, heads=2, rotary_positions=True)
    assert TransformerConfig(layers=1, width=12, heads=2).width == 12


def test_turning_has_the_gradient_of_its_formula_and_keeps_lengths() -> None:
    x_BHSK = torch.randn(1, 2, SHAPE.states, 8, dtype=torch.float64, requires_grad=True)
    turn_SK = torch.view_as_complex(turn_table(TransformerConfig(layers=1, width=16, heads=2), SHAPE)[1])
    assert torch.autograd.gradcheck(lambda x: turn(x, turn_SK), x_BHSK, atol=1e-4)
    (expanded,) = torch.autograd.grad(turn(x_BHSK, turn_SK).sum(), x_BHSK)
    torch.testing.assert_close(expanded, turned(torch.ones_like(x_BHSK), turn_SK.conj()))
    torch.testing.assert_close(turn(x_BHSK, turn_SK).norm(dim=3), x_BHSK.norm(dim=3), rtol=1e-5, atol=1e-6)


def test_a_picture_whose_codes_change_places_is_another_only_where_places_are_told() -> None:
    """Without learned positions a full mask (one row of codes over two columns) cannot tell the order of codes; with rotary ones it can."""
    shape = StreamShape(text_tokens=1, text_vocab=4, grid=2, image_vocab=8)
    for rotary in (False, True):
        torch.manual_seed(0)
        model = Transformer(TransformerConfig(layers=1, width=32, heads=2, conv_kernel=3, rotary_positions=rotary), shape)
        for table in (model.image_rows, model.image_columns):
            table.weight.data.zero_()
        text_BT, lengths_B = torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
        text_BTD, image_BID = model.predicting_states(text_BT, lengths_B, torch.tensor([[1, 2, 5, 0], [1, 5, 2, 0]]))
        _, swapped_BID = model.predicting_states(text_BT, lengths_B, torch.tensor([[2, 1, 5, 0], [5, 1, 2, 0]]))
        torch.testing.assert_close(text_BTD[0], text_BTD[1])
        differs = (image_BID[:, 3] - swapped_BID[:, 3]).abs().max() > 1e-3
        assert bool(differs) == rotary


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_all_engines_agree_and_so_do_gradients_that_are_recomputed(options: dict[str, Any]) -> None:
    cfg, shape = (
        TransformerConfig(layers=3, width=32, heads=2, conv_kernel=3, **options),
        StreamShape(text_tokens=5, text_vocab=40, grid=4, image_vocab=24),
    )
    warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
    engines = {"flex": FlexAttention(cfg, shape, block=16, compiled=False)} | {
        name: make_engine(name, cfg, shape, CPU) for name in ("dense", "structured")
    }  # type: ignore[arg-type]
    made = {}
    for name, attend in engines.items():
        for every in (0, 1):
            torch.manual_seed(0)
            made[name, every] = Transformer(cfg, shape, attend=attend, checkpoint_every=every)
    with torch.no_grad():
        for name in ("structured", "flex"):
            torch.testing.assert_close(made[name, 0](*batch()), made["dense", 0](*batch()), rtol=1e-5, atol=1e-5)
    found = {key: gradients(made[key], batch()) for key in (("dense", 0), ("dense", 1), ("structured", 0))}
    torch.testing.assert_close(found["structured", 0], found["dense", 0], rtol=1e-4, atol=1e-6)
    assert all(grad.equal(found["dense", 1][name]) for name, grad in found["dense", 0].items())
    assert all(grad.any() for name, grad in found["dense", 0].items() if "_norm.weight" in name)


@pytest.mark.parametrize("cpu", [False, True], ids=["torch", "kernels"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_drawing_gives_the_logits_of_the_whole_stream(options: dict[str, Any], cpu: bool) -> None:
    """One state at a time, and in windows at places of their own, half of whose drafts are wrong."""
    model = build(options)
    weights = CpuWeights(model) if cpu else DrawingWeights(model)
    wanted_BIN, texts = wanted(model), [Texts(TEXT, LENGTHS, 1)]
    torch.testing.assert_close(one_by_one(weights.drawer(texts), CODES), wanted_BIN, rtol=1e-5, atol=2e-5)
    for picture, places, got_QN in in_windows(weights.drawer(texts), CODES, 3, 3):
        torch.testing.assert_close(got_QN, wanted_BIN[picture, places], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_codes_are_the_same_whichever_way_they_are_drawn(options: dict[str, Any]) -> None:
    model, rule, prefix_BP = build(options), Rule(guidance=2.0, top_k=9), CODES[:, :3]
    torchs_BI = sample(DrawingWeights(model), TEXT, LENGTHS, list(range(4)), rule, prefix_BP=prefix_BP).codes_BI
    for window in (1, 4):
        for deterministic in (False, True):
            weights = CpuWeights(model, deterministic=deterministic)
            assert sample(weights, TEXT, LENGTHS, list(range(4)), rule, prefix_BP=prefix_BP, window=window).codes_BI.equal(torchs_BI)
        assert sample(DrawingWeights(model), TEXT, LENGTHS, list(range(4)), rule, prefix_BP=prefix_BP, window=window).codes_BI.equal(torchs_BI)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.12), (torch.float16, 0.02)])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_sixteen_bits_are_near_and_drawing_has_the_models_own(options: dict[str, Any], dtype: torch.dtype, tolerance: float) -> None:
    model = build(options)
    exact_BIN = wanted(model)
    for block in model.resblocks:
        block.branch_dtype = dtype  # type: ignore[assignment]
    whole_BIN, drawn_BIN = wanted(model), one_by_one(DrawingWeights(model).drawer([Texts(TEXT, LENGTHS, 1)]), CODES)
    for found_BIN in (whole_BIN, drawn_BIN):
        assert 0 < float((found_BIN - exact_BIN).abs().max()) < tolerance * float(exact_BIN.std())
