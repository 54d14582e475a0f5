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
_MEASURED_ON = {
    "psnr_db": ("images",),
    "code_use": ("images",),
    "image_ce_nats": ("codes",),
    "text_ce_nats": ("images", "tokenizer"),
    "caption_gain_nats": ("codes",),
    "clip_recall_at_1": ("images",),
}
"""What has to be the same in all runs for a figure to be better than another."""
_CHANCE = {"clip_recall_at_1": "clip_chance"}


def section(runs: Mapping[str, RunView]) -> Section | None:
    """A row for each figure, a column for each run; the best is in bold type where runs differ."""
    rows: list[list[Child]] = []
    apart = False
    for words, key, stage, metric, more in MEASURED:
        values = [run.measured(key, stage, metric) for run in runs.values()]
        if any(value is not None for value in values):
            alike = _is_comparable(runs, key)
            apart |= not alike
            chances = [run.evaluation.get(_CHANCE.get(key, "")) for run in runs.values()]
            rows.append([f"{words}{'' if alike else ' ≠'}", *_marked(values, chances, more, alike=alike)])
    for stage in TRAINED:
        if any(run.series(stage) for run in runs.values()):
            rows.append([f"{stage}: updates", *(_updates(run, stage) for run in runs.values())])
    rows.append(["time of finished stages", *(duration(sum(float(run.done(s).get("seconds") or 0) for s in STAGES)) for run in runs.values())])
    rows.append(["commit", *(str(run.provenance.get("commit", ""))[:10] for run in runs.values())])
    words = "Of the evaluate stage; of a run that has not come to it, the newest of its training logs, on fewer samples (*)."
    other = " ≠: measured on other pictures, codes or pieces of text, so no run is better." if apart else ""
    old = [note(f"Out of date: {name}'s {stage} was {why}; run it again.") for name, run in runs.items() for stage, why in run.out_of_date.items()]
    return Section("results", "Results", join(table(["", *runs], rows, numbers=range(1, 1 + len(runs))), note(words, other), *old))


def _is_comparable(runs: Mapping[str, RunView], key: str) -> bool:
    """Whether all runs that were evaluated measured a figure on the same, and chance would give the same."""
    found = [run.evaluation for run in runs.values() if run.evaluation]
    chances = {each.get(_CHANCE.get(key, "")) for each in found}
    inputs = [{(each.get("parents") or {}).get(kind) for each in found} - {None} for kind in _MEASURED_ON[key]]
    return len(chances) <= 1 and all(len(each) <= 1 for each in inputs)


def _marked(values: list[tuple[float, bool] | None], chances: list[float | None], more: bool, *, alike: bool) -> list[Child]:
    known = [value for value in values if value is not None]
    best = (max if more else min)(value for value, _ in known)
    differ = alike and len({value for value, _ in known}) > 1
    cells: list[Child] = []
    for found, chance in zip(values, chances, strict=True):
        text = "" if found is None else f"{three_digits(found[0]) if found[0] > 0 else f'{found[0]:.3g}'}{'' if found[1] else '*'}"
        if found is not None and chance:
            text += f" (chance {chance:.2g})"
        cells.append(el("b", text) if found is not None and differ and found[0] == best else text)
    return cells


def _updates(run: RunView, stage: str) -> str:
    steps = [points[-1].step for points in run.series(stage).values()]
    return f"{max(steps):,}{'' if run.done(stage) else ' so far'}" if steps else ""
