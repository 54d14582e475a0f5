"""What was trained on what: counts, filters, passes over the data."""

from __future__ import annotations

from typing import Any

from train.report.markup import Child, Html, el, join, note, number, table
from train.report.view import TRAINED, RunView, Section

_TITLES = {"dvae": "dVAE", "dalle": "Transformer", "clip": "CLIP"}
_READS = {"dvae": "images", "dalle": "captions and codes", "clip": "images and captions"}
_EXAMPLES = 5


def section(run: RunView) -> Section | None:
    """Splits, sources and dropped records of the prepare stage, and how often each training stage saw them."""
    summary = run.summary("prepare")
    if not summary:
        return Section("data", "What was trained on what", note("The prepare stage has not finished: nothing is known about the data."))
    parts: list[Child] = [_counts(summary), _passes(run, summary), _dropped(summary), _other(run)]
    return Section("data", "What was trained on what", join(parts))


def _counts(summary: dict[str, Any]) -> Html:
    splits, sources = summary.get("splits") or {}, summary.get("sources") or {}
    rows: list[list[Child]] = [[el("b", "split "), name, number(count)] for name, count in splits.items()]
    rows += [[el("b", "source "), name, number(count)] for name, count in sources.items()]
    groups = summary.get("groups")
    if isinstance(groups, dict):
        rows += [[el("b", "concepts "), name, number(value)] for name, value in groups.items() if isinstance(value, int | float)]
    words = "Images with captions. Validation holds out whole concepts: every style and variant of a name together."
    return join(note(words), table(["", "", "count"], rows, numbers=(2,)))


def _passes(run: RunView, summary: dict[str, Any]) -> Html | None:
    train = (summary.get("splits") or {}).get("train")
    rows: list[list[Child]] = []
    for stage in TRAINED:
        fit = run.section(f"{stage}_fit")
        if not train or not {"steps", "batch"} <= fit.keys():
            continue
        seen = int(fit["steps"]) * int(fit["batch"])
        finished = "" if run.done(stage) else " (planned)"
        size = run.summary(stage).get("parameters")
        row: list[Child] = [_TITLES[stage] + finished, _READS[stage], number(size) if isinstance(size, int) else "", number(fit["steps"])]
        rows.append([*row, number(fit["batch"]), f"{seen / train:.1f}"])
    if not rows:
        return None
    header = ["model", "reads", "parameters", "updates", "batch", "passes over training data"]
    if not any(row[2] for row in rows):
        header, rows = [header[i] for i in (0, 1, 3, 4, 5)], [[row[i] for i in (0, 1, 3, 4, 5)] for row in rows]
    return join(el("h3", "Training"), table(header, rows, numbers=range(2, len(header))))


def _dropped(summary: dict[str, Any]) -> Html:
    dropped = summary.get("dropped") or {}
    if not dropped:
        return join(el("h3", "Filters"), note("No record was dropped."))
    rows: list[list[Child]] = []
    for reason, what in sorted(dropped.items(), key=lambda item: -int(item[1].get("count", 0))):
        examples = [str(name) for name in what.get("examples") or []][:_EXAMPLES]
        rows.append([reason, number(what.get("count", 0)), el("span", ", ".join(examples), class_="mono")])
    return join(el("h3", "Filters"), note("Records that were not used, and why."), table(["reason", "count", "examples"], rows, numbers=(1,)))


def _other(run: RunView) -> Html | None:
    rows: list[list[Child]] = []
    for stage in ("tokenizer", "encode"):
        for name, value in run.summary(stage).items():
            # Words there are hashes and schemas: for programs.
            if isinstance(value, int | float) and not isinstance(value, bool):
                shown = number(value) if isinstance(value, int) else f"{value:.4g}"
                rows.append([stage, name.replace("_", " "), shown])
    return join(el("h3", "Tokenizer and codes"), table(["stage", "", ""], rows, numbers=(2,))) if rows else None
