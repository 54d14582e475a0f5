"""Section: the most important figures as tiles, each with its goal if the run has goals, else with what it means."""

from __future__ import annotations

from dataclasses import dataclass

from infra.progress import duration
from train.report import judgement
from train.report.judgement import GOAL_BELOW_UNIGRAM_PERCENT, GOAL_CODE_USE, GOAL_PSNR_DB
from train.report.markup import Html, el, join, note
from train.report.view import RunView, Section
from train.run.stage_table import STAGES

_FEW = 50
"""Of fewer pictures, figures are chance."""


@dataclass(frozen=True)
class Tile:
    """One figure."""

    label: str
    value: str
    unit: str
    detail: str
    met: bool | None = None
    """Whether the goal is met; None if there is no goal."""


def section(run: RunView) -> Section | None:
    """Tiles with the results of the evaluation; before there is one, with the newest values of the training logs, which is said below them."""
    tiles = [tile for tile in (_psnr(run), _code_use(run), _below_unigram(run), _caption_gain(run), _retrieval(run), _time(run)) if tile]
    if not tiles:
        return Section("summary", "At a glance", note("No stage has measured anything yet."))
    held_out = "whole concepts" if judgement.draws_emoji(run) else "pictures"
    count = int(run.evaluation.get("samples") or 0)
    few = " Of so few, figures say little." if 0 < count < _FEW else ""
    explanation = f"Measured on {f'{count:,} pictures of ' if count else ''}the validation split: {held_out} that no training stage has seen.{few}"
    missing = (
        "The evaluate stage has not finished: these are the newest values of the training logs, on fewer samples." if not run.evaluation else None
    )
    old = [note(f"Out of date: {stage} was {why}; run it again.") for stage, why in run.out_of_date.items()]
    return Section(
        "summary",
        "At a glance",
        join(el("div", [_render(tile) for tile in tiles], class_="tiles"), note(explanation if run.evaluation else None, missing), old),
    )


def _render(tile: Tile) -> Html:
    mark = None if tile.met is None else el("span", "✓ reached" if tile.met else "not reached", class_="met" if tile.met else "unmet")
    value = el("p", tile.value, el("small", " ", tile.unit) if tile.unit else None, class_="value")
    return el("div", el("p", tile.label, class_="label"), value, el("p", tile.detail, " ", mark, class_="detail"), class_="tile")


def _measured(run: RunView, key: str, stage: str, metric: str) -> float | None:
    found = run.measured(key, stage, metric)
    return None if found is None else found[0]


def _psnr(run: RunView) -> Tile | None:
    value = _measured(run, "psnr_db", "dvae", "eval/psnr")
    if value is None:
        return None
    if not judgement.has_goals(run):
        return Tile("Reconstruction", f"{value:.1f}", "dB PSNR", judgement.of_psnr(value))
    return Tile("Reconstruction", f"{value:.1f}", "dB PSNR", f"goal {GOAL_PSNR_DB:g} dB", value >= GOAL_PSNR_DB)


def _code_use(run: RunView) -> Tile | None:
    value = _measured(run, "code_use", "dvae", "eval/code_use")
    if value is None:
        return None
    vocab = run.section("dvae").get("vocab")
    of = f"of {vocab} codes in use" if vocab else "of codes in use"
    if not judgement.has_goals(run):
        return Tile("Codebook", f"{100 * value:.0f}", "%", f"{of}; {judgement.of_code_use(value)}")
    return Tile("Codebook", f"{100 * value:.0f}", "%", f"{of}, goal {100 * GOAL_CODE_USE:.0f} %", value >= GOAL_CODE_USE)


def _below_unigram(run: RunView) -> Tile | None:
    found = run.evaluation
    below, ce, unigram = found.get("ce_below_unigram_percent"), found.get("image_ce_nats"), found.get("unigram_entropy_nats")
    if below is None:
        loss = _measured(run, "image_ce_nats", "dalle", "eval/loss_image")
        return None if loss is None else Tile("Image codes", f"{loss:.2f}", "nats per code", "cross-entropy")
    detail = f"{ce:.2f} against {unigram:.2f} nats, " if ce is not None and unigram is not None else ""
    if not judgement.has_goals(run):
        return Tile("Below unigram entropy", f"{below:.0f}", "%", f"{detail}{judgement.of_below_unigram(below)}")
    return Tile("Below unigram entropy", f"{below:.0f}", "%", f"{detail}goal {GOAL_BELOW_UNIGRAM_PERCENT:.0f} %", below >= GOAL_BELOW_UNIGRAM_PERCENT)


def _caption_gain(run: RunView) -> Tile | None:
    value = _measured(run, "caption_gain_nats", "dalle", "eval/caption_gain")
    if value is None:
        return None
    if not judgement.has_goals(run):
        return Tile("What a caption is worth", f"{value:.3f}", "nats per code", judgement.of_caption_gain(value, judgement.codes(run)))
    return Tile("What a caption is worth", f"{value:.3f}", "nats per code", "less surprise than under a wrong caption, goal above 0", value > 0)


def _retrieval(run: RunView) -> Tile | None:
    value = _measured(run, "clip_recall_at_1", "clip", "eval/recall_at_1")
    if value is None:
        return None
    chance = run.evaluation.get("clip_chance")
    if not chance:
        return Tile("CLIP finds the picture", f"{100 * value:.0f}", "%", "at first rank")
    detail = f"at first rank in a batch; chance is {100 * chance:.2g} %"
    if not judgement.has_goals(run):
        return Tile("CLIP finds the picture", f"{100 * value:.0f}", "%", f"{detail}.{judgement.of_retrieval(value, float(chance))}")
    return Tile("CLIP finds the picture", f"{100 * value:.0f}", "%", detail, value > chance)


def _time(run: RunView) -> Tile | None:
    seconds = [float(run.done(stage)["seconds"]) for stage in STAGES if run.done(stage).get("seconds") is not None]
    if not seconds:
        return None
    return Tile("Time", duration(sum(seconds)), "", f"in {len(seconds)} finished stages; starts of processes come on top")
