"""Section: how evenly the dVAE uses its codes."""

from __future__ import annotations

import math
from collections.abc import Sequence

from train.evaluation.collapse import collapse_warning
from train.report.markup import Child, el, join, note, number
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
    share = float(run.section("dvae_fit").get("warn_perplexity", 0))
    warning = collapse_warning({"code_use": used / len(counts), "perplexity": perplexity(counts)}, len(counts), share)
    return Section(
        "codebook",
        "Codebook use",
        join(
            el("p", f"Warning: {warning}", class_="error") if warning else None,
            note(words, f" The most frequent code takes {top:.1f} %."),
            _in_training(run, len(counts)),
            el("div", el("figure", ranked("codebook", "share of each code", counts), class_="plot"), class_="plots one"),
        ),
    )


def _in_training(run: RunView, vocab: int) -> Child:
    """The same figures for the newest training codes, which are more, so that rare codes are seen."""
    names = ("train_codes_counted", "train_code_use", "train_dead_codes", "train_perplexity")
    counted, use, dead, effective = (run.last("dvae", f"eval/{name}") for name in names)
    if counted is None or use is None or dead is None or effective is None:
        return None
    return note(
        f"Over the newest {number(counted)} codes of training pictures: {100 * use:.0f} % of {vocab} in use, {number(dead)} dead, perplexity {effective:.0f}."
    )


def perplexity(counts: Sequence[int]) -> float:
    """Exponential of the entropy of a histogram: between 1 and the number of codes in use."""
    total = sum(counts)
    return math.exp(-sum(count / total * math.log(count / total) for count in counts if count))
