"""How evenly the dVAE uses its codes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from train.report.markup import el, join, note, number
from train.report.plots import ranked
from train.report.view import RunView, Section


def section(run: RunView) -> Section | None:
    """Frequencies of the codes on validation images."""
    found = run.json("dvae", "pictures", "codebook.json") or run.json("dvae", "codebook.json")
    counts = [int(count) for count in found.get("counts") or []]
    if not sum(counts):
        return Section("codebook", "Codebook use", note("The dvae stage has not counted its codes yet."))
    used = sum(count > 0 for count in counts)
    images = f" of {number(found['samples'])} validation images" if found.get("samples") else ""
    words = (
        f"{used} of {len(counts)} codes ({100 * used / len(counts):.0f} %) occur among {number(sum(counts))} codes{images}. "
        f"Perplexity {perplexity(counts):.0f}: as many codes would carry the same information if all were used equally (dashed line: all of them)."
    )
    top = 100 * max(counts) / sum(counts)
    return Section(
        "codebook",
        "Codebook use",
        join(
            note(words, f" The most frequent code takes {top:.1f} %."),
            el("div", el("figure", ranked("codebook", "share of each code", counts), class_="plot"), class_="plots one"),
        ),
    )


def perplexity(counts: Sequence[int]) -> float:
    """exp of the entropy of a histogram, in codes: between 1 and the number of codes in use."""
    total = sum(counts)
    return math.exp(-sum(count / total * math.log(count / total) for count in counts if count))
