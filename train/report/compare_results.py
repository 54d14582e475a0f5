"""Comparison: what each run measured, took and was made by."""

from __future__ import annotations

from collections.abc import Mapping

from infra.progress import duration, three_digits
from train.report.markup import Child, el, join, note, table
from train.report.view import RunView, Section
from train.run.stage_table import STAGES, TRAINED

MEASURED: tuple[tuple[str, str, str, str, bool], ...] = (
    ("reconstruction, PSNR (dB)", "psnr_db", "dvae", "eval/psnr", True),
    ("codes in use (share)", "code_use", "dvae", "eval/code_use", True),
    ("image loss (nats per code)", "image_ce_nats", "dalle", "eval/loss_image", False),
    ("text loss (nats per token)", "text_ce_nats", "dalle", "eval/loss_text", False),
    ("worth of the caption (nats per code)", "caption_gain_nats", "dalle", "eval/caption_gain", True),
    ("retrieval at first rank (share)", "clip_recall_at_1", "clip", "eval/recall_at_1", True),
)
"""Words, key of evaluate/metrics.json, stage and metric where the run was not evaluated, and whether more is better."""


def section(runs: Mapping[str, RunView]) -> Section | None:
    """A row for each figure, a column for each run; the best is in bold type where runs differ."""
    rows: list[list[Child]] = []
    for words, key, stage, metric, more in MEASURED:
        values = [run.measured(key, stage, metric) for run in runs.values()]
        if any(value is not None for value in values):
            rows.append([words, *_marked(values, more)])
    for stage in TRAINED:
        if any(run.series(stage) for run in runs.values()):
            rows.append([f"{stage}: updates", *(_updates(run, stage) for run in runs.values())])
    rows.append(["time of finished stages", *(duration(sum(float(run.done(s).get("seconds") or 0) for s in STAGES)) for run in runs.values())])
    rows.append(["commit", *(str(run.provenance.get("commit", ""))[:10] for run in runs.values())])
    words = "Of the evaluate stage; of a run that has not come to it, the newest of its training logs, on fewer samples (*)."
    return Section("results", "Results", join(table(["", *runs], rows, numbers=range(1, 1 + len(runs))), note(words)))


def _marked(values: list[tuple[float, bool] | None], more: bool) -> list[Child]:
    known = [value for value in values if value is not None]
    best = (max if more else min)(value for value, _ in known)
    differ = len({value for value, _ in known}) > 1
    cells: list[Child] = []
    for found in values:
        text = "" if found is None else f"{three_digits(found[0]) if found[0] > 0 else f'{found[0]:.3g}'}{'' if found[1] else '*'}"
        cells.append(el("b", text) if found is not None and differ and found[0] == best else text)
    return cells


def _updates(run: RunView, stage: str) -> str:
    steps = [points[-1].step for points in run.series(stage).values()]
    return f"{max(steps):,}{'' if run.done(stage) else ' so far'}" if steps else ""
