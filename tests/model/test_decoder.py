"""The cached arithmetic of drawing is that of the whole stream, whatever is kept, shared and computed together."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from model.attention_engines import EngineName, make_engine
from model.config import StreamShape, TransformerConfig
from model.decoder import Drawer, DrawingWeights, Texts, cache_bytes, text_bytes
from model.draw_cache import PastCache, Window
from model.offsets import layer_kinds
from model.transformer import Transformer
from tests.support.logits import logits

SHAPE = StreamShape(text_tokens=5, text_vocab=40, grid=4, image_vocab=24)
TEXT = torch.arange(20).view(4, 5)
LENGTHS = torch.tensor([3, 0, 5, 2])
CODES = torch.randint(0, 24, (4, 16), generator=torch.Generator().manual_seed(1))


def build(engine: EngineName = "dense", shape: StreamShape = SHAPE, **options: Any) -> Transformer:
    torch.manual_seed(0)
    cfg = TransformerConfig(**({"layers": 5, "width": 32, "heads": 2, "conv_kernel": 3} | options))
    model = Transformer(cfg, shape, attend=make_engine(engine, cfg, shape, torch.device("cpu")))
    with torch.no_grad():  # wide logits, so that a wrong one shows
        model.image_unembedding.weight.mul_(3)
        for block in model.resblocks:
            for parameter in block.parameters():
                parameter.mul_(2)
    return model.requires_grad_(False)


def wanted(model: Transformer) -> torch.Tensor:
    return logits(model, TEXT, LENGTHS, CODES)[1]


def one_by_one(drawer: Drawer, codes_BI: torch.Tensor) -> torch.Tensor:
    firsts = [torch.full((len(codes_BI),), first) for first in range(16)]
    return torch.cat([drawer.logits(codes_BI, Window(first_B, 1, first)) for first, first_B in enumerate(firsts)], dim=1)


def in_windows(drawer: Drawer, codes_BI: torch.Tensor, length: int, most: int) -> Iterator[tuple[int, slice, torch.Tensor]]:
    """Logits of windows at places of their own, as (picture, its places, logits): pictures go on by random numbers of up to ``most`` codes, and of the drafts beyond
    those that are kept all are wrong, which must leave no trace."""
    pictures, codes = codes_BI.shape
    known_B, draw = torch.zeros(pictures, dtype=torch.int64), torch.Generator().manual_seed(3)
    while int(known_B.min()) < codes:
        counts_B = torch.randint(1, most + 1, (pictures,), generator=draw).minimum(codes - known_B)
        drafts_BI = codes_BI.where(torch.arange(codes) < (known_B + counts_B - 1)[:, None], (codes_BI + 5) % 24)
        got_BQN = drawer.logits(drafts_BI, Window(known_B, length))
        for picture, count in enumerate(counts_B.tolist()):
            first = int(known_B[picture])
            yield picture, slice(first, first + count), got_BQN[picture, :count]
        drawer.keep(counts_B)
        known_B = known_B + counts_B


@pytest.mark.parametrize("engine", ["dense", "structured"])
@pytest.mark.parametrize(
    "masks",
    [
        {"layers": 2},  # row, convolution
        {"layers": 3},  # row, column, convolution
        {"layers": 6},
        {"layers": 3, "conv_offsets": "causal"},
        {"layers": 3, "conv_kernel": 5},
        {"layers": 2, "conv_kernel": 1},
        {"layers": 1, "conv_kernel": 7},
    ],
)
def test_logits_one_at_a_time_are_those_of_the_whole_stream_under_every_mask_and_engine(masks: dict[str, Any], engine: EngineName) -> None:
    model = build(engine, **masks)
    drawer = Drawer(DrawingWeights(model), [Texts(TEXT, LENGTHS, 1)])
    torch.testing.assert_close(one_by_one(drawer, CODES), wanted(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "masks", [{"layers": 6}, {"layers": 3, "conv_offsets": "causal"}, {"layers": 3, "conv_kernel": 5}, {"layers": 2, "conv_kernel": 1}]
)
def test_windows_at_places_of_their_own_give_the_logits_of_the_whole_stream(masks: dict[str, Any]) -> None:
    """Each picture goes on by another number of states, as drafts are accepted; what was not kept leaves no trace."""
    model = build(**masks)
    wanted_BIN = wanted(model)
    drawer = Drawer(DrawingWeights(model), [Texts(TEXT, LENGTHS, 1)])
    known_B, draw = torch.zeros(4, dtype=torch.int64), torch.Generator().manual_seed(3)
    compared = 0
    while int(known_B.min()) < 16:
        window = Window(known_B, 4)
        got_BQN = drawer.logits(CODES, window)
        for picture in range(4):
            for step in range(min(4, 16 - int(known_B[picture]))):
                torch.testing.assert_close(got_BQN[picture, step], wanted_BIN[picture, known_B[picture] + step], rtol=1e-5, atol=1e-5)
                compared += 1
        counts_B = torch.randint(1, 5, (4,), generator=draw).minimum(16 - known_B)
        drawer.keep(counts_B)
        known_B = known_B + counts_B
    assert compared > 64


def test_wrong_drafts_leave_no_trace() -> None:
    model = build()
    drawer = Drawer(DrawingWeights(model), [Texts(TEXT, LENGTHS, 1)])
    drafts_BI = CODES.clone()
    for first in range(16):
        drafts_BI[:, : first + 1], drafts_BI[:, first:] = CODES[:, : first + 1], (CODES[:, first:] + 5) % 24
        got_BQN = drawer.logits(drafts_BI, Window(torch.full((4,), first), 4))
        torch.testing.assert_close(got_BQN[:, 0], wanted(model)[:, first], rtol=1e-5, atol=1e-5)
        drawer.keep(torch.ones(4, dtype=torch.int64))


def test_given_codes_are_taken_in_passes_of_a_row_and_drawing_goes_on_after_them() -> None:
    model = build(layers=6)
    for given in (1, 4, 7, 15):
        drawer = Drawer(DrawingWeights(model), [Texts(TEXT, LENGTHS, 1)])
        drawer.fill(CODES, given)
        for first in range(given, 16):
            got_BQN = drawer.logits(CODES, Window(torch.full((4,), first), 1, first))
            torch.testing.assert_close(got_BQN[:, 0], wanted(model)[:, first], rtol=1e-5, atol=1e-5)


def test_pictures_share_their_captions_and_groups_have_texts_of_their_own() -> None:
    model = build(layers=6)
    text_BT, lengths_B = TEXT[[0, 0, 2, 2]], LENGTHS[[0, 0, 2, 2]]
    captions_BIN = logits(model, text_BT, lengths_B, CODES)[1]
    empty_BIN = logits(model, torch.zeros_like(text_BT), torch.zeros_like(lengths_B), CODES)[1]
    groups = [Texts(TEXT[[0, 2]], LENGTHS[[0, 2]], 2), Texts(torch.zeros_like(TEXT[:1]), torch.zeros_like(LENGTHS[:1]), 4)]
    got_BIN = one_by_one(Drawer(DrawingWeights(model), groups), CODES.repeat(2, 1))
    torch.testing.assert_close(got_BIN, torch.cat([captions_BIN, empty_BIN]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [1, 3])
def test_what_is_held_is_the_closed_form_of_the_masks(window: int) -> None:
    """Row: a row and the present state; convolution: its furthest offset and that; column: all. Text once for each caption. By counting storages."""
    model = build(layers=6)
    weights = DrawingWeights(model)
    drawer = Drawer(weights, [Texts(TEXT[:2], LENGTHS[:2], 3)])
    drawer.logits(CODES[[0] * 6], Window(torch.zeros(6, dtype=torch.int64), window))
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in drawer.storages()}
    fused = 4 * 6 * window * 3 * 32 * 6  # the pass's own states lie in storages with their queries: a third of these bytes
    text, past = 2 * text_bytes(model.cfg, SHAPE, 4), 6 * cache_bytes(model.cfg, SHAPE, 4, window)
    assert sum(held.values()) == text + past + fused // 3
    kinds = layer_kinds(6)
    assert kinds == ["row", "column", "row", "row", "row", "conv"]
    furthest = 1 * 4 + 3  # 'figure', 3 x 3: one row up, and the wrapped half of it
    assert cache_bytes(model.cfg, SHAPE, 4, 1) == 2 * 4 * 32 * (4 * (4 + 1) + (16 + 1) + (furthest + 1))


def test_a_ring_keeps_the_last_states_of_a_window_that_is_longer() -> None:
    cfg = TransformerConfig(layers=1, width=2, heads=1, conv_kernel=1)
    past = PastCache("row", dataclasses.replace(SHAPE, grid=2), cfg, 1, torch.float32, torch.device("cpu"))
    new_BHQK = torch.arange(3.0).view(1, 1, 3, 1).expand(-1, -1, -1, 2) + 1
    past.keep(Window(torch.tensor([0]), 3), torch.tensor([3]), new_BHQK, new_BHQK)
    assert past.keys_BHRK[0, 0, :, 0].tolist() == [3.0, 2.0]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.12), (torch.float16, 0.02)])
def test_products_of_sixteen_bits_are_the_models_own(dtype: torch.dtype, tolerance: float) -> None:
    model = build(layers=3)
    exact_BIN = wanted(model)
    for block in model.resblocks:
        block.branch_dtype = dtype  # type: ignore[assignment]
    drawer = Drawer(DrawingWeights(model), [Texts(TEXT, LENGTHS, 1)])
    assert drawer.storages()[0].dtype == dtype
    difference = (one_by_one(drawer, CODES) - exact_BIN).abs().max()
    assert 0 < float(difference) < tolerance * float(exact_BIN.std())
