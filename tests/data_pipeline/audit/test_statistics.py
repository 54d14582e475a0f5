"""Statistics of captions and codes, and how they are printed."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.audit import statistics
from data_pipeline.audit.statistics import printable, quantiles


def test_quantiles_are_values_that_occur() -> None:
    assert quantiles(list(range(101))) == {"least": 0, "5 %": 5, "median": 50, "95 %": 95, "most": 100, "mean": 50.0}
    assert quantiles([1, 2]) == {"least": 1, "5 %": 1, "median": 1, "95 %": 2, "most": 2, "mean": 1.5}
    assert quantiles([]) == {}
    assert quantiles([0.5]) == {"least": 0.5, "5 %": 0.5, "median": 0.5, "95 %": 0.5, "most": 0.5, "mean": 0.5}


def test_captions_are_measured_in_words_characters_and_tokens() -> None:
    rows = statistics.caption_rows([["a red-brown fox", "don't!"], ["日本 2"]], tokens=[3, 5, 9], max_tokens=4)
    found = {row["captions"]: row for row in rows}
    assert found["per record"]["most"] == 2 and found["words"] == {"captions": "words", **quantiles([4, 1, 2])}
    assert found["characters"] == {"captions": "characters", **quantiles([15, 6, 4])}
    assert found["truncated at 4 tokens"]["mean"] == "66.67 %"
    assert len(statistics.caption_rows([["a"]])) == 3


def test_words_count_once_for_a_caption() -> None:
    assert statistics.frequent_words([["The cat, the CAT", "a dog"], ["the_dog"]], 3) == [("dog", 2), ("the", 2), ("a", 1)]


def test_code_statistics_are_those_of_the_histogram() -> None:
    codes = [np.array([0, 1, 2, 3], np.uint16), np.array([0, 0, 40, 3], np.uint16)]
    found = {row["codes"]: row["value"] for row in statistics.code_rows(codes, 32)}
    counts = np.array([3, 1, 1, 2, 1]) / 8
    assert found["codes in use"] == "5 of 32 (15.6 %)" and found["records x codes"] == "2 x 4"
    assert found["perplexity"] == f"{np.exp(-(counts * np.log(counts)).sum()):.1f}"
    assert str(found["most frequent"]).startswith("0: 37.50 %, 3: 25.00 %, 1: 12.50 %")
    assert found["different codes per record (mean)"] == "3.5"
    assert found["outside the codebook"] == "1 codes of 32 and above: not made by this dVAE"
    assert "outside the codebook" not in {row["codes"] for row in statistics.code_rows(codes, 64)}
    assert {row["codes"]: row["value"] for row in statistics.code_rows(codes, 0)}["codes in use"] == "5, the largest is 40"
    assert statistics.code_rows([], 32) == []


def test_rare_words_are_summed_up() -> None:
    rows = statistics.share_rows(["a"] * 6 + ["b"] * 2 + list("cd"), "source", most=2)
    assert rows == [
        {"source": "a", "records": 6, "share": "60.0 %"},
        {"source": "b", "records": 2, "share": "20.0 %"},
        {"source": "2 others", "records": 2, "share": "20.0 %"},
    ]


@given(st.text(alphabet=st.characters(), max_size=60) | st.text(alphabet="a\n\t \x1b\x00\u202e\ud800\ue000", max_size=60), st.integers(1, 30))
def test_what_is_printed_is_one_clean_line(text: str, limit: int) -> None:
    clean = printable(text, limit)
    assert len(clean) <= limit and not set(clean) & set("\n\r\t\x1b\x00\u202e\u2028") and clean == clean.strip()
    clean.encode()
    assert printable(clean, limit) == clean


def test_printing_a_long_text_is_cut_and_a_huge_one_is_not_slow() -> None:
    assert printable("word " * 200_000, 20) == "word word word word…"
    assert printable("abc", 3) == "abc" and printable("abcd", 3) == "ab…" and printable("a\x1b[31m\nb") == "a\ufffd[31m b"
