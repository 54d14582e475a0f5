"""Markup, plots and pictures of the report."""

from __future__ import annotations

import re

import numpy as np
import pytest

from tests.support.fake_run import disc
from train.report.images import data_uri, grid, grid_png, png_bytes, read_grid, read_png
from train.report.markup import Html, el, table
from train.report.plots import Line, lines, ranked, running_mean, thin
from train.report.section_codebook import perplexity


def test_markup_escapes_strings_and_attributes_and_keeps_html() -> None:
    assert el("a", "<&>", Html("<b>x</b>"), 3, None, class_='q"', hidden=True, title=None) == '<a class="q&#34;" hidden>&lt;&amp;&gt;<b>x</b>3</a>'
    assert el("img", src="x") == '<img src="x">'
    assert '<td class="n">1</td>' in table(["a", "b"], [["x", 1]], numbers=(1,))


def test_plots_take_their_colours_and_font_from_the_page_and_keep_words_as_text() -> None:
    noisy = Line("training", [(i, 1 + (i % 7)) for i in range(2000)])
    text = lines("k", 'loss "a" <b>', [noisy, Line("validation", [(0, 2.0), (1000, float("nan")), (1999, 1.0)])], reference=(1.5, "unigram"))
    assert ">validation</text>" in text and ">unigram</text>" in text and ">updates</text>" in text
    assert "currentColor" in text and "var(--s0)" in text and "var(--s1)" in text
    assert not re.search(r"#[0-9a-f]{6}\b|font-family|<style|<metadata|nan", text)
    assert 'aria-label="loss &quot;a&quot; &lt;b&gt;"' in text
    assert len(text) < 60_000


def test_names_of_curves_are_shown_as_they_are() -> None:
    """matplotlib would set what stands between dollars as a formula, leave out what begins with an underscore, and write what no XML may hold."""
    names = ("a$\\frac{$b", "_hidden", "two\x1b[2J", "$5$")
    text = lines("k", "x", [Line(name, [(0, 1.0), (1, float(place))]) for place, name in enumerate(names)], reference=(1.5, "$x$"))
    for shown in ("a$\\frac{$b", "\u200a_hidden", "two\\x1b[2J", "$5$", "$x$"):
        assert f">{shown}</text>" in text


def test_the_numbers_of_an_axis_are_not_cut() -> None:
    assert ">0.1005</text>" in lines("k", "x", [Line("a", [(0, 0.1), (1, 0.105)])])


def test_a_plot_is_the_same_bytes_every_time_and_its_identifiers_carry_its_key() -> None:
    a, b = (ranked("one", "x", [5, 3, 0, 1]) for _ in range(2))
    assert a == b
    assert all(name.startswith("one-") for name in re.findall(r'\bid="([^"]*)', a))


def test_a_logarithmic_axis_is_used_only_where_all_values_are_positive() -> None:
    positive = lines("k", "x", [Line("a", [(0, 1e-3), (1, 1e3)])], log=True)
    zero = lines("k", "x", [Line("a", [(0, 0.0), (1, 1e3)])], log=True)
    assert "mathdefault" in positive or "10" in positive
    assert positive != zero and zero == lines("k", "x", [Line("a", [(0, 0.0), (1, 1e3)])])


def test_thinning_keeps_the_mean_and_smoothing_the_ends() -> None:
    points = [(float(i), float(i * i)) for i in range(1000)]
    few = thin(points, 100)
    assert len(few) == 100
    assert abs(sum(y for _, y in few) / 100 - sum(y for _, y in points) / 1000) < 1e-6
    smooth = running_mean([5.0, *[1.0] * 98, 7.0])
    assert (smooth[0], smooth[50], smooth[-1]) == (5.0, 1.0, 7.0)
    assert running_mean([2.0] * 10) == [2.0] * 10


def test_perplexity_is_the_number_of_codes_when_all_are_used_equally() -> None:
    assert abs(perplexity([7] * 64 + [0] * 10) - 64) < 1e-9
    assert perplexity([3, 0]) == 1.0


def test_a_grid_can_be_taken_apart_again() -> None:
    rows = [[disc(i) for i in range(3)], [disc(i) for i in range(5, 7)]]
    found = read_grid(grid_png(rows, pad=3, labels=["first", "a label far too long to fit into this narrow grid of pictures"]))
    assert found is not None and found.labels[0] == "first"
    assert [len(row) for row in found.rows] == [3, 2]
    assert all(np.array_equal(a, b) for got, row in zip(found.rows, rows, strict=True) for a, b in zip(got, row, strict=True))
    assert read_grid(png_bytes(disc(0))) is None


def test_a_long_label_takes_three_lines_and_a_short_one_a_line() -> None:
    tile, inked = np.full((4, 6, 3), 255, np.uint8), []
    for label in ("a cat", "a cat on a mat " * 3, "a cat on a mat " * 30):
        sheet = grid([[tile]], labels=[label])
        assert sheet.shape[1] == 200, "wide enough for words, however small the picture"
        dark = (sheet < 200).any((1, 2))
        inked.append(int((dark[1:] & ~dark[:-1]).sum()))
    assert inked[0] == 1 and inked[1] in (2, 3) and inked[2] == 3
    rows = [[disc(0)], [disc(1)]]
    found = read_grid(grid_png(rows, labels=["a cat on a mat " * 3, "b"]))
    assert found is not None and all((got[0] == row[0]).all() for got, row in zip(found.rows, rows, strict=True))


def test_a_grid_without_labels_has_only_white_between_its_pictures() -> None:
    black = np.zeros((4, 6, 3), np.uint8)
    canvas = grid([[black, black], [black, black]], pad=2)
    assert canvas.shape == (14, 18, 3)
    assert int((canvas == 0).all(-1).sum()) == 4 * 24
    assert (canvas[:2] == 255).all() and (canvas[:, 8:10] == 255).all()


def test_pictures_survive_png_and_large_ones_travel_as_webp() -> None:
    assert np.array_equal(read_png(png_bytes(disc(3))), disc(3))
    assert data_uri(png_bytes(disc(3))).startswith("data:image/png;base64,")
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    assert data_uri(png_bytes(noise)).startswith("data:image/webp;base64,")


def test_wrong_pictures_are_refused_with_what_was_given() -> None:
    with pytest.raises(ValueError, match=r"float64, shape \[4, 4\]: expected uint8 of shape \[H, W, 3\]"):
        png_bytes(np.zeros((4, 4)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="4 bytes are not a picture"):
        read_png(b"junk")
    with pytest.raises(ValueError, match=r"pictures of one size, given: \[\(4, 4, 3\), \(5, 5, 3\)\]"):
        grid([[np.zeros((4, 4, 3), np.uint8), np.zeros((5, 5, 3), np.uint8)]])
    with pytest.raises(ValueError, match="given: no pictures"):
        grid([])
    with pytest.raises(ValueError, match="1 labels for 2 rows"):
        grid([[disc(0)], [disc(1)]], labels=["a"])
