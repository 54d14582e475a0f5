"""Contact sheets: pictures above their captions."""

from __future__ import annotations

import numpy as np
import pytest

from train.report.contact_sheet import TILE, contact_sheet, thumbnail
from train.report.labels import font, wrap


def test_a_contact_sheet_shows_each_picture_undistorted_above_its_caption() -> None:
    red, wide = np.full((TILE, TILE, 3), (200, 0, 0), np.uint8), np.full((100, 400, 3), (0, 0, 200), np.uint8)
    sheet = contact_sheet([red, wide, None], ["red", "wide", "gone"], columns=2)
    reds, blues = (sheet == (200, 0, 0)).all(2), (sheet == (0, 0, 200)).all(2)
    assert reds.sum() == TILE**2 and blues.sum() == TILE * (TILE // 4)
    rows, columns = np.nonzero(blues)
    assert (
        columns.min() > np.nonzero(reds)[1].max() and (rows.min() + rows.max()) // 2 == (np.nonzero(reds)[0].min() + np.nonzero(reds)[0].max()) // 2
    )
    below = sheet[TILE + 8 : TILE + 30, : TILE + 8]
    assert (below < 150).any(), "the caption stands below its picture"
    assert sheet.dtype == np.uint8 and np.array_equal(sheet, contact_sheet([red, wide, None], ["red", "wide", "gone"], columns=2))


def test_small_pictures_are_enlarged_by_whole_factors_and_any_shape_fits() -> None:
    small = np.arange(24 * 20 * 3, dtype=np.uint8).reshape(20, 24, 3)
    big = thumbnail(small)
    assert big.shape == (120, 144, 3) and np.array_equal(big[::6, ::6], small)
    for shape in ((1, 4000), (4000, 1), (161, 160), (1, 1)):
        found = thumbnail(np.zeros((*shape, 3), np.uint8))
        assert max(found.shape) == TILE or max(shape) < TILE, shape
        assert found.shape[0] <= TILE and found.shape[1] <= TILE


def test_captions_of_any_kind_fit_under_a_picture() -> None:
    for text in ("", "short", "word " * 90, "x" * 500, "日本語" * 40, "\ufffd"):
        lines = wrap(text, TILE, 3)
        assert len(lines) <= 3 and all(font(11).getlength(line) <= TILE for line in lines)
    assert wrap("word " * 90, TILE, 3)[-1].endswith("…") and " ".join(wrap("one two", TILE, 3)) == "one two"


def test_a_sheet_without_pictures_or_with_other_captions_is_refused() -> None:
    with pytest.raises(ValueError, match="0 pictures and 0 captions: give one caption for each picture"):
        contact_sheet([], [])
    with pytest.raises(ValueError, match="1 pictures and 2 captions"):
        contact_sheet([None], ["a", "b"])
