"""Renders the part of docs/experiments.md on sweeps of options, from the files of train/experiments/sweep.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

from infra.shown import markdown

_ABOUT = """Made by `python -m train.experiments.sweep FILE.toml`: stage dalle on the same codes, each training with {extent}{processes}. Every figure is a mean over the seeds. **over {base}** is the
difference from the arm `{base}` with the same seed, and ± the standard error of the mean of these differences: with one seed there is none, and a difference below twice its error says nothing.
Validation figures are those of averaged weights; **training** is the mean training loss of the last tenth of the updates. The caption gain is what shuffled captions cost, in nats per code.
"""
_COLUMNS = (
    "| arm | changes | nats per code | over {base} | share | caption gain | over {base} | training | updates | epochs | minutes | seeds |",
    "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
)
_NONE = "–"


def section(found: dict[str, Any]) -> str:
    """One file as Markdown."""
    settings, base = found["settings"], found["base"]
    minutes = settings.get("minutes")
    extent = f"{minutes:g} minutes of training" if minutes else f"{settings['tokens']:,} positions of the stream"
    processes = f" in {settings['cores']} processes" if settings["cores"] > 1 else " in one process"
    left_out = ("overrides", "run", "minutes", "tokens", "cores")
    shown = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in sorted(settings.items()) if key not in left_out)
    words = f" with `{markdown(' '.join(settings['overrides']))}`" if settings["overrides"] else ""
    commits = sorted({markdown(run["producer"]["commit"][:10]) for run in found["runs"]})
    made = f"Commit{'s' * (len(commits) > 1)} {', '.join(commits)}." if commits else "No training has ended yet."
    about = _ABOUT.format(extent=extent, base=markdown(base), processes=processes)
    head = f"\n## Sweep {found['name']}, on {markdown(settings['run'])}{words}\n\n{about}\nSettings: {shown}. {made}\n\n"
    return head + table(found)


def table(found: dict[str, Any]) -> str:
    """The arms as a Markdown table; one that has not been trained yet, or only diverged, has a row too."""
    arms = sorted(found["arms"], key=lambda arm: arm != found["base"])
    return "\n".join([line.format(base=markdown(found["base"])) for line in _COLUMNS] + [_row(found, arm) for arm in arms]) + "\n"


def _row(found: dict[str, Any], arm: str) -> str:
    of_arm = [run for run in found["runs"] if run["arm"] == arm]
    done = [run for run in of_arm if run["end"] == "done"]
    changes = f"`{markdown(' '.join(words))}`" if (words := found["arms"][arm]["overrides"]) else _NONE
    if not done:
        cells = [_NONE] * 9
    else:
        base = {run["seed"]: run for run in found["runs"] if run["arm"] == found["base"] and run["end"] == "done"}
        pairs = [(run, base[run["seed"]]) for run in done if run["seed"] in base] if arm != found["base"] else []
        nats, gain = ([mine[key] - its[key] for mine, its in pairs] for key in ("nats_per_code", "caption_gain"))
        share = f"{mean(mine['nats_per_code'] / its['nats_per_code'] - 1 for mine, its in pairs):+.1%}" if pairs else _NONE
        means = {key: mean(run[key] for run in done) for key in MEANS}
        cells = [f"{means['nats_per_code']:.4f}", paired(nats), share, f"{means['caption_gain']:.4f}", paired(gain)]
        cells += [f"{means['train_nats_per_code']:.4f}", f"{means['updates']:,.0f}", f"{means['epochs']:.2f}", f"{means['minutes']:.1f}"]
    return f"| {markdown(arm)} | {changes} | " + " | ".join(cells) + f" | {_seeds(of_arm, done)} |"


MEANS = ("nats_per_code", "caption_gain", "train_nats_per_code", "updates", "epochs", "minutes")


def paired(differences: Sequence[float]) -> str:
    """The mean of differences of equal seeds, and its standard error where there are several."""
    if not differences:
        return _NONE
    error = f" ± {stdev(differences) / math.sqrt(len(differences)):.4f}" if len(differences) > 1 else ""
    return f"{mean(differences):+.4f}{error}"


def _seeds(of_arm: Sequence[dict[str, Any]], done: Sequence[dict[str, Any]]) -> str:
    if not of_arm:
        return "not measured yet"
    lost = len(of_arm) - len(done)
    return f"{len(done)}" + f", {lost} diverged" * (lost > 0)
