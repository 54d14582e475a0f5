"""Section: curves of every training stage."""

from __future__ import annotations

import math
from itertools import pairwise

from train.evaluation import data_limit
from train.loop.panels import PANELS, TITLES, Panel
from train.report.markup import Html, el, join, note
from train.report.plots import FEW, Line, few, lines
from train.report.view import RunView, Section
from train.run import change_points
from train.run.stage_table import TRAINED

_OPEN = 3


def section(run: RunView) -> Section | None:
    """One group of plots for each training stage that has logged something; the first plots are shown, the others can be unfolded."""
    parts: list[Html | None] = []
    silent = []
    for stage in TRAINED:
        plots = [plot for number, panel in enumerate(PANELS[stage]) if (plot := _plot(run, stage, number, panel))]
        if timed := _against_time(run, stage):
            plots.insert(1, timed)
        if not plots:
            silent += [TITLES[stage]] if stage in run.stages else []
            continue
        parts.append(el("h3", TITLES[stage]))
        parts.append(el("div", plots[:_OPEN], class_="plots"))
        if len(plots) > _OPEN:
            parts.append(el("details", el("summary", f"{len(plots) - _OPEN} more"), el("div", plots[_OPEN:], class_="plots")))
        parts.append(_warning(run, stage))
        parts.append(_limit(run) if stage == "dalle" else None)
        parts += [note(f"Dotted line: {change_points.described(point)}.") for point in run.changes(stage)]
    if silent:
        parts.append(note(f"No metrics yet: {', '.join(silent)}."))
    return Section("curves", "Training curves", join(parts))


def _plot(run: RunView, stage: str, number: int, panel: Panel) -> Html | None:
    series = run.series(stage)
    found = [Line(label, [(point.step, point.value) for point in series[name]]) for name, label in panel.curves if series.get(name)]
    if not any(math.isfinite(value) for line in found for _, value in line.points):
        return None
    value = run.evaluation.get(panel.reference) if panel.reference else None
    reference = (float(value), panel.reference_label) if value is not None else None
    marks = [point["step"] for point in run.changes(stage)]
    plot = lines(f"{stage}{number}", panel.title, found, log=panel.log, reference=reference, marks=marks)
    return el("figure", el("figcaption", panel.title, few(found)), plot, class_="plot")


def _against_time(run: RunView, stage: str) -> Html | None:
    """The losses over the time of training, without pauses between attempts as far as the logged points show them."""
    panel = next((panel for panel in PANELS[stage] if panel.title.startswith(("image loss", "loss", "contrastive loss"))), None)
    series = run.series(stage)
    whole = sorted({(point.step, point.time) for points in series.values() for point in points})
    if panel is None or len(whole) < FEW + 1:
        return None
    minutes = _minutes(whole)
    unit, factor = ("minutes", 1) if minutes[whole[-1][0]] >= 2 else ("seconds", 60)
    found = [Line(label, [(factor * minutes[point.step], point.value) for point in series[name]]) for name, label in panel.curves if series.get(name)]
    if not any(math.isfinite(value) for line in found for _, value in line.points):
        return None
    title = f"{panel.title}, against time"
    marks = [factor * minutes[point["step"]] for point in run.changes(stage) if point["step"] in minutes]
    return el("figure", el("figcaption", title), lines(f"{stage}time", title, found, across=f"{unit} of training", marks=marks), class_="plot")


def _minutes(points: list[tuple[int, float]]) -> dict[int, float]:
    """Step -> minutes since the first point. If a step took more than ten times the median, that was a pause, and the median is counted instead."""
    paces = sorted((b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(points) if b[0] > a[0])
    usual = paces[len(paces) // 2] if paces else 0.0
    found, now = {points[0][0]: 0.0}, 0.0
    for (before, begun), (step, ended) in pairwise(points):
        if step > before:
            pace = (ended - begun) / (step - before)
            now += (step - before) * (pace if 0 <= pace <= 10 * usual else usual)
        found[step] = now / 60
    return found


def _limit(run: RunView) -> Html | None:
    """Whether data or computing time limits the transformer."""
    images = int(run.summary("prepare").get("splits", {}).get("train", 0))
    fit, series = run.section("dalle_fit"), run.series("dalle")
    read, losses = series.get("train/loss_image", []), series.get("eval/loss_image", [])
    if not images or not read or not fit.get("batch"):
        return None
    tail = [point.value for point in read[-max(1, len(read) // 10) :]]
    entropy = run.evaluation.get("unigram_entropy_nats")
    facts = data_limit.Facts(
        images=images,
        epochs=read[-1].step * fit["batch"] / images,
        crops=run.section("encode").get("crops", 1),
        entropy=float(entropy) if entropy else None,
        train=sum(tail) / len(tail),
        validation=losses[-1].value if losses else None,
        is_harder=any(fit.get(key) for key in ("replace_codes", "replace_pieces", "caption_dropout")),
    )
    return note(data_limit.described(facts))


def _warning(run: RunView, stage: str) -> Html | None:
    bad = sum(not math.isfinite(point.value) for points in run.series(stage).values() for point in points)
    return note(f"{bad} logged values are not finite and are left out of the plots.") if bad else None
