"""Comparison: the curves of all runs, one metric in a plot, each run in its colour."""

from __future__ import annotations

import math
from collections.abc import Mapping

from train.loop.panels import PANELS, TITLES
from train.report.markup import Html, el, join, note
from train.report.plots import Line, few, lines
from train.report.view import RunView, Section
from train.run.stage_table import TRAINED

_OPEN = 4


def section(runs: Mapping[str, RunView]) -> Section | None:
    """For each training stage a plot for each metric that a run has; the first are shown, the others can be unfolded."""
    parts: list[Html] = []
    for stage in TRAINED:
        plots = [
            plot
            for number, panel in enumerate(PANELS[stage])
            for place, (metric, label) in enumerate(panel.curves)
            if (plot := _plot(runs, stage, f"{stage}{number}-{place}", metric, f"{panel.title}, {label}", log=panel.log))
        ]
        if plots:
            parts += [el("h3", TITLES[stage]), el("div", plots[:_OPEN], class_="plots")]
        if len(plots) > _OPEN:
            parts.append(el("details", el("summary", f"{len(plots) - _OPEN} more"), el("div", plots[_OPEN:], class_="plots")))
    if not parts:
        return Section("curves", "Curves", note("None of the runs has logged anything yet."))
    words = "Over updates, whatever the size of a batch. A run without a metric is not in its plot."
    return Section("curves", "Curves", join(note(words), *parts))


def _plot(runs: Mapping[str, RunView], stage: str, key: str, metric: str, title: str, *, log: bool) -> Html | None:
    found = [Line(name, [(point.step, point.value) for point in run.series(stage).get(metric, [])]) for name, run in runs.items()]
    if not any(math.isfinite(value) for line in found for _, value in line.points):
        return None
    there = [line for line in found if line.points]
    alone = f" – {there[0].label} alone" if len(there) < len(found) and len(there) == 1 else ""
    return el("figure", el("figcaption", title, alone, few(there)), lines(key, title, found, log=log, keep_colours=True), class_="plot")
