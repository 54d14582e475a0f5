"""The masks are those of Figure 11 and paper B.1, and everything else derives from their one rule."""

from typing import Literal, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.config import StreamShape, TransformerConfig
from model.flex import block_mask, mask_mod
from model.masks import KINDS, Kind, allowed_offsets, dense_mask, layer_kinds
from model.offsets import MASKS, MaskKind, MaskRules, allowed_pairs, is_allowed, lines_before, transposed
from tests.support.mask_blocks import touched_blocks
from tests.support.peers import peer_file
from train.verbs import mask_picture

# Figure 11: 6 text states and a 4 x 4 image; the image part of the rows of the last query, and of one in the middle of the picture.
FIGURE = StreamShape(text_tokens=6, text_vocab=10, grid=4, image_vocab=10)
TOY = TransformerConfig(layers=4, width=8, heads=2, conv_kernel=3)
# The offsets that Figure 11 lights, read off its 22 x 22 cells (docs/paper.md 3.3).
FIGURE_OFFSETS = {"row": {0, 1, 2, 3, 4}, "column": {0, 4, 8, 12}, "conv": {0, 1, 3, 4, 5, 7}}
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


@pytest.mark.parametrize("kind", KINDS)
def test_every_cell_of_figure_11_is_as_drawn(kind: Kind) -> None:
    mask_SS = dense_mask(kind, FIGURE, TOY)
    assert mask_SS.shape == (22, 22)
    for query in range(22):
        for key in range(22):
            if key < 6:
                wanted = query >= 6 or key <= query
            else:
                wanted = query >= 6 and query - key in FIGURE_OFFSETS[kind]
            assert bool(mask_SS[query, key]) == wanted, (query, key)


def test_transposed_columns_are_triangles_on_the_diagonal_as_in_figure_11_c() -> None:
    order_S = torch.cat([torch.arange(6), 6 + transposed(torch.arange(16), 4)])
    mask_SS = dense_mask("column", FIGURE, TOY)[order_S][:, order_S]
    assert mask_SS[6:, 6:].equal(torch.block_diag(*[torch.ones(4, 4).tril()] * 4).bool())
    assert mask_SS[:, :6].equal(dense_mask("column", FIGURE, TOY)[:, :6])


@pytest.mark.parametrize("kind", KINDS)
def test_the_picture_in_the_documentation_shows_the_masks(kind: Kind) -> None:
    """Cell by cell; the transposed panel shows the transposed mask."""
    assert (mask_picture.TEXT, mask_picture.GRID, mask_picture.KERNEL) == (6, 4, 3)
    for column_by_column in {False, kind == "column"}:
        mask_SS = transposed_mask(kind, FIGURE, TOY) if column_by_column else dense_mask(kind, FIGURE, TOY)
        drawn = [[mask_picture.may_see(kind, q, k, column_by_column=column_by_column) for k in range(22)] for q in range(22)]
        assert torch.tensor([[cell != "none" for cell in row] for row in drawn]).equal(mask_SS)
    assert drawn[7][:8] == ["text"] * 6 + [drawn[7][6], "image"]
    assert mask_picture.svg().count("<rect") == 4 * 22**2 + 1


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
    figure, causal = set(allowed_offsets("conv", MaskRules(32, 11))), set(allowed_offsets("conv", MaskRules(32, 11, "causal")))
    assert (len(figure), len(causal)) == (66, 61)
    assert figure - causal == {187, 188, 189, 190, 191}
    assert causal < figure


@pytest.mark.parametrize("kernel", [3, 5, 9])
@pytest.mark.parametrize("rule", ["figure", "causal"])
def test_every_state_sees_itself_and_nothing_later_even_where_the_kernel_exceeds_the_grid(kernel: int, rule: Literal["figure", "causal"]) -> None:
    offsets = allowed_offsets("conv", MaskRules(4, kernel, rule))
    assert offsets[0] == 0
    assert all(0 <= d < 16 for d in offsets)


def test_an_unknown_kind_is_refused_with_the_accepted_ones() -> None:
    with pytest.raises(ValueError, match="attention kind 'diagonal': accepted are row, column, conv"):
        allowed_offsets(cast(Kind, "diagonal"), MaskRules(4, 3))


SHAPES = st.builds(lambda text, grid: StreamShape(text_tokens=text, text_vocab=9, grid=grid, image_vocab=9), st.integers(1, 9), st.integers(1, 7))
CONFIGS = st.builds(
    lambda kernel, rule: TransformerConfig(layers=4, width=8, heads=2, conv_kernel=kernel, conv_offsets=rule),
    st.sampled_from([1, 3, 5, 7, 11]),
    st.sampled_from(["figure", "causal"]),
)


@given(SHAPES, CONFIGS)
def test_the_causal_rule_is_the_upper_half_of_a_kernel_read_in_raster_order(shape: StreamShape, cfg: TransformerConfig) -> None:
    half = cfg.conv_kernel // 2
    kernel = {up * shape.grid + left for up in range(half + 1) for left in range(-half, half + 1)}
    assert set(allowed_offsets("conv", MaskRules(shape.grid, cfg.conv_kernel, "causal"))) == {d for d in kernel if 0 <= d < shape.image_tokens}


@given(SHAPES, CONFIGS, st.sampled_from(KINDS))
def test_the_rule_is_the_same_on_tensors_as_on_numbers_and_allows_nothing_later(shape: StreamShape, cfg: TransformerConfig, kind: Kind) -> None:
    distance_R = torch.arange(-shape.image_tokens, shape.image_tokens)
    allowed_R = is_allowed(kind, distance_R, MaskRules.of(cfg, shape))
    assert allowed_R.tolist() == [is_allowed(kind, d, MaskRules.of(cfg, shape)) for d in distance_R.tolist()]
    assert not allowed_R[distance_R < 0].any()


@given(SHAPES, CONFIGS, st.sampled_from(KINDS))
def test_counted_pairs_are_those_of_the_dense_mask(shape: StreamShape, cfg: TransformerConfig, kind: Kind) -> None:
    assert allowed_pairs(kind, shape, cfg) == int(dense_mask(kind, shape, cfg).sum())


def test_every_kind_of_mask_is_in_the_table_and_says_how_far_it_reaches_in_its_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(MASKS) == set(KINDS)
    rules = MaskRules(8, 3)
    assert [lines_before(kind, rules) for kind in KINDS] == [1, 0, 2]
    assert [lines_before("conv", MaskRules(2, 11)), lines_before("row", MaskRules(8))] == [1, 1]
    monkeypatch.setitem(MASKS, "column", MaskKind(MASKS["row"].allows, is_transposed=True))
    with pytest.raises(ValueError, match=r"'column' is laid out transposed, so it may allow only multiples of 8; it allows \(0, 1, 2"):
        lines_before("column", rules)


def transposed_mask(kind: Kind, shape: StreamShape, cfg: TransformerConfig) -> Tensor:
    mask_SS = dense_mask(kind, shape, cfg)
    if kind != "column":
        return mask_SS
    order_S = torch.cat([torch.arange(shape.text_tokens), shape.text_tokens + transposed(torch.arange(shape.image_tokens), shape.grid)])
    return mask_SS[order_S][:, order_S]


def blocks_of(mask_SS: Tensor, block: int) -> Tensor:
    """Which blocks of a mask hold anything, bool [blocks, blocks]."""
    blocks = -(-len(mask_SS) // block)
    padded = torch.zeros(blocks * block, blocks * block, dtype=torch.bool)
    padded[: len(mask_SS), : len(mask_SS)] = mask_SS
    return padded.unflatten(1, (blocks, block)).unflatten(0, (blocks, block)).any(3).any(1)


@settings(max_examples=25)
@given(SHAPES, CONFIGS, st.sampled_from(KINDS), st.sampled_from([2, 4, 16]))
def test_block_masks_and_their_counts_are_the_dense_mask_seen_in_blocks(shape: StreamShape, cfg: TransformerConfig, kind: Kind, block: int) -> None:
    wanted = blocks_of(transposed_mask(kind, shape, cfg), block)
    assert block_mask(kind, shape, cfg, "cpu", block).to_dense()[0, 0].bool().equal(wanted)
    assert touched_blocks(kind, shape, cfg, block) == int(wanted.sum())


@given(SHAPES, CONFIGS, st.sampled_from(KINDS))
def test_the_mask_inside_a_compiled_kernel_is_the_dense_mask_in_the_kernels_layout(shape: StreamShape, cfg: TransformerConfig, kind: Kind) -> None:
    state_S = torch.arange(shape.states)
    zero = torch.zeros((), dtype=torch.long)
    inside_SS = mask_mod(kind, shape, cfg)(zero, zero, state_S[:, None], state_S[None, :])
    assert inside_SS.equal(transposed_mask(kind, shape, cfg))


def test_a_row_layer_touches_0_62_of_the_causal_blocks_of_128_and_half_of_those_of_64() -> None:
    shape, cfg = StreamShape(text_tokens=256, text_vocab=9, grid=32, image_vocab=9), TransformerConfig()
    share = {block: touched_blocks("row", shape, cfg, block) / (1280 // block * (1280 // block + 1) / 2) for block in (128, 64)}
    assert share[128] == pytest.approx(0.62, abs=0.005)
    assert share[64] == 0.5


@pytest.mark.parametrize(("text_tokens", "grid"), [(6, 4), (256, 32)])
def test_row_and_column_masks_are_those_of_an_independent_implementation(text_tokens: int, grid: int) -> None:
    """ru-dalle; its convolution is not the paper's: it is a window without wrap-around."""
    theirs = peer_file("rudalle", "dalle/image_attention.py")
    shape = StreamShape(text_tokens=text_tokens, text_vocab=9, grid=grid, image_vocab=9)
    cfg = TransformerConfig(layers=4, width=8, heads=2, conv_kernel=3)
    assert dense_mask("row", shape, cfg).equal(theirs.get_row_mask(text_tokens, grid, is_bool_mask=True))
    assert dense_mask("column", shape, cfg).equal(theirs.get_col_mask(text_tokens, grid, is_bool_mask=True))
