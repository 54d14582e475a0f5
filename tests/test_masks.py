"""The masks are those of Figure 11 and paper B.1."""

from typing import Literal, cast

import pytest
import torch

from model.config import StreamShape, TransformerConfig
from model.masks import KINDS, Kind, allowed_offsets, dense_mask, layer_kinds

# Figure 11: 6 text states and a 4 x 4 image; the image part of the rows of the last query, and of one in the middle of the picture.
FIGURE = StreamShape(text_tokens=6, text_vocab=10, grid=4, image_vocab=10)
TOY = TransformerConfig(layers=4, width=8, heads=2, conv_kernel=3)
LAST_ROW = {"row": "...........#####", "column": "...#...#...#...#", "conv": "........#.###.##"}
SIXTH_ROW = {"row": ".#####..........", "column": ".#...#..........", "conv": "###.##.........."}


def test_first_four_layers_are_row_column_row_row_and_the_last_is_convolutional() -> None:
    assert layer_kinds(5) == ["row", "column", "row", "row", "conv"]
    assert layer_kinds(1) == ["conv"]


def test_sixty_four_layers_have_47_row_16_column_and_1_convolutional_mask() -> None:
    kinds = layer_kinds(64)
    assert [kinds.count(k) for k in KINDS] == [47, 16, 1]
    assert [i for i, kind in enumerate(kinds, start=1) if kind == "column"] == list(range(2, 63, 4))


@pytest.mark.parametrize("kind", ["row", "column", "conv"])
def test_rows_of_the_mask_are_drawn_as_in_figure_11(kind: Kind) -> None:
    mask_SS = dense_mask(kind, FIGURE, TOY)
    assert "".join(".#"[v] for v in mask_SS[-1, 6:].tolist()) == LAST_ROW[kind]
    assert "".join(".#"[v] for v in mask_SS[6 + 5, 6:].tolist()) == SIXTH_ROW[kind]


@pytest.mark.parametrize("kind", ["row", "column", "conv"])
def test_text_is_causal_and_blind_to_images_while_images_see_all_text(kind: Kind) -> None:
    mask_SS = dense_mask(kind, FIGURE, TOY)
    assert mask_SS[:6, :6].equal(torch.ones(6, 6).tril().bool())
    assert not mask_SS[:6, 6:].any()
    assert mask_SS[6:, :6].all()


def test_counts_at_32_by_32_are_those_of_the_fact_sheet() -> None:
    shape = StreamShape(text_tokens=256, text_vocab=10, grid=32, image_vocab=10)
    full = {kind: dense_mask(kind, shape, TransformerConfig()) for kind in KINDS}
    assert {kind: int(m[256:, 256:].sum()) for kind, m in full.items()} == {"row": 33_264, "column": 16_896, "conv": 61_344}
    triangle = 1280 * 1281 / 2
    assert [round(100 * float(full[k].sum()) / triangle, 1) for k in KINDS] == [40.0, 38.0, 43.5]


def test_the_plain_causal_half_has_61_offsets_and_the_figure_adds_five() -> None:
    figure, causal = set(allowed_offsets("conv", 32, 11, "figure")), set(allowed_offsets("conv", 32, 11, "causal"))
    assert (len(figure), len(causal)) == (66, 61)
    assert figure - causal == {187, 188, 189, 190, 191}
    assert causal < figure


@pytest.mark.parametrize("kernel", [3, 5, 9])
@pytest.mark.parametrize("rule", ["figure", "causal"])
def test_every_state_sees_itself_and_nothing_later_even_where_the_kernel_exceeds_the_grid(kernel: int, rule: Literal["figure", "causal"]) -> None:
    offsets = allowed_offsets("conv", 4, kernel, rule)
    assert offsets[0] == 0
    assert all(0 <= d < 16 for d in offsets)


def test_an_unknown_kind_is_refused_with_the_accepted_ones() -> None:
    with pytest.raises(ValueError, match="attention kind 'diagonal': accepted are row, column, conv"):
        allowed_offsets(cast(Kind, "diagonal"), 4, 3, "figure")
