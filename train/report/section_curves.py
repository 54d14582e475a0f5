"""Section: curves of every training stage."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from train.report.markup import Html, el, join, note
from train.report.plots import Line, lines
from train.report.view import RunView, Section
from train.run import change_points
from train.run.stage_table import TRAINED


@dataclass(frozen=True)
class Panel:
    """One plot: its title, and (metric, label) for each of its curves."""

    title: str
    curves: tuple[tuple[str, str], ...]
    log: bool = False
    reference: str = ""
    """Key of a value in evaluate/metrics.json, which is drawn as a dashed line."""
    reference_label: str = ""


PANELS: dict[str, tuple[Panel, ...]] = {
    "dvae": (
        Panel("ELB (nats per channel value)", (("eval/elb_relaxed", "relaxed codes"), ("eval/elb_true", "true codes"))),
        Panel(
            "reconstruction term",
            (("train/nll", "training"), ("eval/nll_true", "validation, true codes"), ("eval/nll_relaxed", "validation, relaxed")),
        ),
        Panel("PSNR on validation (dB)", (("eval/psnr", "true codes"), ("eval/psnr_relaxed", "relaxed"))),
        Panel("codes in use (share)", (("eval/code_use", "validation"), ("eval/train_code_use", "newest training codes"))),
        Panel("ELB gap: relaxed minus true", (("eval/elb_gap", "validation"),)),
        Panel("SSIM on validation", (("eval/ssim", "true codes"),)),
        Panel("LPIPS on validation", (("eval/lpips", "true codes"),)),
        Panel("Fréchet distance of reconstructions", (("eval/fid", "FID"), ("eval/frechet_efficientnet_lite0", "by EfficientNet-Lite0 (no FID)"))),
        Panel("loss (nats per channel value)", (("train/loss", "training"),)),
        Panel("KL to uniform (nats per code)", (("train/kl", "training"),)),
        Panel("perplexity of codes", (("eval/perplexity", "validation"), ("eval/train_perplexity", "newest training codes"))),
        Panel("dead codes", (("eval/dead_codes", "validation"), ("eval/train_dead_codes", "newest training codes"))),
        Panel("schedules: temperature, KL weight", (("sched/tau", "temperature"), ("sched/beta", "KL weight"))),
        Panel("step size", (("optim/lr", "step size"),)),
        Panel("gradient norm", (("optim/grad_norm", "before clipping"),), log=True),
        Panel("loss scale", (("optim/loss_scale", "scale"),), log=True),
        Panel("skipped updates", (("optim/skipped_updates", "overflows so far"),)),
        Panel("images per second", (("perf/images_per_s", "images/s"),)),
        Panel("share of the matrix peak (MFU)", (("perf/mfu", "useful arithmetic"),)),
        Panel("waiting for data (s per update)", (("data/wait_s", "wait"),)),
    ),
    "dalle": (
        Panel(
            "image loss (nats per code)",
            (("train/loss_image", "training"), ("eval/loss_image", "validation"), ("eval/loss_image_shuffled", "validation, wrong captions")),
            reference="unigram_entropy_nats",
            reference_label="unigram entropy",
        ),
        Panel("text loss (nats per token)", (("train/loss_text", "training"), ("eval/loss_text", "validation"))),
        Panel("worth of the caption (nats per code)", (("eval/caption_gain", "validation"),)),
        Panel("weighted loss", (("train/loss", "training"),)),
        Panel("step size", (("optim/lr", "step size"),)),
        Panel("gradient norm", (("optim/grad_norm", "before clipping"),), log=True),
        Panel("tokens per second", (("perf/tokens_per_s", "tokens/s"),)),
    ),
    "clip": (
        Panel("contrastive loss (nats)", (("train/loss", "training"), ("eval/loss", "validation"))),
        Panel("retrieval at first rank (share)", (("eval/recall_at_1", "validation"),)),
    ),
}
TITLES = {"dvae": "dVAE", "dalle": "Transformer", "clip": "CLIP"}
_OPEN = 3
_FEW = 2


def section(run: RunView) -> Section | None:
    """One group of plots for each training stage that has logged something; the first plots are shown, the others can be unfolded."""
    parts: list[Html | None] = []
    silent = []
    for stage in TRAINED:
        plots = [plot for number, panel in enumerate(PANELS[stage]) if (plot := _plot(run, stage, number, panel))]
        if timed := _against_time(run, stage):
            plots.insert(1, timed)
        if not plots:
            silent.append(TITLES[stage])
            continue
        parts.append(el("h3", TITLES[stage]))
        parts.append(el("div", plots[:_OPEN], class_="plots"))
        if len(plots) > _OPEN:
            parts.append(el("details", el("summary", f"{len(plots) - _OPEN} more"), el("div", plots[_OPEN:], class_="plots")))
        parts.append(_warning(run, stage))
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
    return el("figure", el("figcaption", panel.title, _few(found)), plot, class_="plot")


def _few(found: list[Line]) -> str:
    """A remark for curves of one or two points, which show no trend."""
    short = [(line.label, len(line.points)) for line in found if len(line.points) <= _FEW]
    return "".join(f" – {label}: {count} point{'s' if count > 1 else ''}, no trend" for label, count in short)


def _against_time(run: RunView, stage: str) -> Html | None:
    """The losses over minutes of training, without pauses between attempts as far as the logged points show them."""
    panel = next((panel for panel in PANELS[stage] if panel.title.startswith(("image loss", "loss", "contrastive loss"))), None)
    series = run.series(stage)
    whole = sorted({(point.step, point.time) for points in series.values() for point in points})
    if panel is None or len(whole) < _FEW + 1:
        return None
    minutes = _minutes(whole)
    found = [Line(label, [(minutes[point.step], point.value) for point in series[name]]) for name, label in panel.curves if series.get(name)]
    if not any(math.isfinite(value) for line in found for _, value in line.points):
        return None
    title = f"{panel.title}, against time"
    marks = [minutes[point["step"]] for point in run.changes(stage) if point["step"] in minutes]
    return el("figure", el("figcaption", title), lines(f"{stage}time", title, found, across="minutes of training", marks=marks), class_="plot")


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


def _warning(run: RunView, stage: str) -> Html | None:
    bad = sum(not math.isfinite(point.value) for points in run.series(stage).values() for point in points)
    return note(f"{bad} logged values are not finite and are left out of the plots.") if bad else None
