"""Statistics of captions, pictures and codes, as rows of tables for display. All functions are pure."""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Row = dict[str, object]

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_LONGEST = 100_000  # characters of a caption that are searched for words
_QUANTILES = {"least": 0.0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "most": 1.0}


def printable(text: str, limit: int = 200) -> str:
    """Text for a terminal or a picture: one line of at most ``limit`` characters, without control, bidi or surrogate characters."""
    words = " ".join(text[: 4 * limit].split())
    clean = "".join("\ufffd" if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn") else character for character in words)
    return clean if len(clean) <= limit and len(text) <= 4 * limit else clean[: limit - 1] + "…"


def quantiles(values: Sequence[float] | NDArray[np.generic]) -> Row:
    """Least, 5 %, median, 95 %, most and mean of some numbers, as integers if the numbers are. Empty if there are none."""
    array = np.asarray(values)
    if not array.size:
        return {}
    whole = np.issubdtype(array.dtype, np.integer)
    found = {name: float(np.quantile(array, share, method="inverted_cdf")) for name, share in _QUANTILES.items()}
    shown: Row = {name: int(value) if whole else value for name, value in found.items()}
    mean = float(array.mean())
    return shown | {"mean": round(mean) if abs(mean) >= 1000 else mean}


def caption_rows(captions: Sequence[Sequence[str]], tokens: Sequence[int] = (), max_tokens: int = 0) -> list[Row]:
    """How many captions records have, and how long they are.

    Args:
        captions: the captions of each record.
        tokens: number of tokens of each caption; empty without a tokenizer.
        max_tokens: longer captions are truncated.
    """
    flat = [caption for some in captions for caption in some]
    rows: list[Row] = [
        {"captions": "per record", **quantiles([len(some) for some in captions])},
        {"captions": "words", **quantiles([len(_WORD.findall(caption[:_LONGEST])) for caption in flat])},
        {"captions": "characters", **quantiles([len(caption) for caption in flat])},
    ]
    if tokens:
        cut = sum(count > max_tokens for count in tokens)
        rows.append({"captions": "tokens", **quantiles(tokens)})
        rows.append({"captions": f"truncated at {max_tokens} tokens", "mean": f"{100 * cut / len(tokens):.2f} %"})
    return rows


def frequent_words(captions: Iterable[Sequence[str]], count: int) -> list[tuple[str, int]]:
    """The ``count`` most frequent words (lower-case), each with the number of captions that contain it."""
    seen: Counter[str] = Counter()
    for some in captions:
        for caption in some:
            seen.update(set(_WORD.findall(caption[:_LONGEST].lower())))
    return sorted(seen.items(), key=lambda item: (-item[1], item[0]))[:count]


def picture_rows(sizes: Sequence[tuple[int, int]], sizes_bytes: Sequence[int]) -> list[Row]:
    """Width, height, aspect (width over height) and file size of pictures.

    Args:
        sizes: (width, height) in pixels.
        sizes_bytes: sizes of the image files.
    """
    return [
        {"pictures": "width (pixels)", **quantiles([width for width, _ in sizes])},
        {"pictures": "height (pixels)", **quantiles([height for _, height in sizes])},
        {"pictures": "shorter side (pixels)", **quantiles([min(size) for size in sizes])},
        {"pictures": "aspect (width / height)", **quantiles([width / max(1, height) for width, height in sizes])},
        {"pictures": "file (bytes)", **quantiles(list(sizes_bytes))},
    ]


def code_rows(codes: Sequence[NDArray[np.uint16]], vocab: int) -> list[Row]:
    """How records of codes use the codebook.

    Args:
        codes: uint16 [grid * grid] of each record.
        vocab: size of the codebook; 0 if unknown.
    """
    counts_N = np.bincount(np.concatenate(codes)) if codes else np.zeros(0, np.int64)
    used, total = int((counts_N > 0).sum()), int(counts_N.sum())
    if not total:
        return []
    shares = counts_N[counts_N > 0] / total
    top = np.argsort(-counts_N, kind="stable")[:5]
    rows: list[Row] = [
        {"codes": "records x codes", "value": f"{len(codes)} x {len(codes[0])}"},
        {
            "codes": "codes in use",
            "value": f"{used} of {vocab} ({100 * used / vocab:.1f} %)" if vocab else f"{used}, the largest is {len(counts_N) - 1}",
        },
        {"codes": "perplexity", "value": f"{math.exp(-float((shares * np.log(shares)).sum())):.1f}"},
        {
            "codes": "share of the most frequent tenth of those in use",
            "value": f"{100 * float(np.sort(shares)[::-1][: max(1, used // 10)].sum()):.1f} %",
        },
        {"codes": "most frequent", "value": ", ".join(f"{code}: {100 * counts_N[code] / total:.2f} %" for code in top)},
        {"codes": "different codes per record (mean)", "value": f"{float(np.mean([len(np.unique(some)) for some in codes])):.1f}"},
    ]
    if vocab and len(counts_N) > vocab:
        rows.append({"codes": "outside the codebook", "value": f"{int(counts_N[vocab:].sum())} codes of {vocab} and above: not made by this dVAE"})
    return rows


def share_rows(values: Iterable[str], name: str, most: int = 20) -> list[Row]:
    """Frequencies of values such as sources and licences, the most frequent first."""
    counts = Counter(values)
    total = sum(counts.values())
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rows: list[Row] = [{name: printable(value, 100), "records": count, "share": f"{100 * count / total:.1f} %"} for value, count in ordered[:most]]
    if len(ordered) > most:
        rest = sum(count for _, count in ordered[most:])
        rows.append({name: f"{len(ordered) - most} others", "records": rest, "share": f"{100 * rest / total:.1f} %"})
    return rows


def token_lengths(captions: Iterable[Sequence[str]], encode: Callable[[str], tuple[object, int]]) -> list[int]:
    """The number of tokens of each caption; ``encode`` must be one that does not truncate."""
    return [encode(caption)[1] for some in captions for caption in some]
