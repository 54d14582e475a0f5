"""Renders the part of docs/experiments.md on sweeps of options, from the files of train/experiments/sweep.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

from infra.shown import markdown
from train.evaluation.drawings import OWN_CLIP

_OF_CODES = ("dvae", "dvae_fit")
"""Sections with which an arm makes codes of its own. Keys of encode alone choose among the crops that the run has."""
_ABOUT = """Made by `python -m train.experiments.sweep FILE.toml`: {stages}, each training with {extent}{processes}. Every figure is a mean over the seeds. **over {base}** is the
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
    own = any(makes_codes([*settings["overrides"], *arm["overrides"]]) for arm in found["arms"].values())
    stages = "stage dalle, on codes that each training makes first where its keys ask for it" if own else "stage dalle on the same codes"
    about = _ABOUT.format(stages=stages, extent=extent, base=markdown(base), processes=processes)
    head = f"\n## Sweep {found['name']}, on {markdown(settings['run'])}{words}\n\n{about}\nSettings: {shown}. {made}\n\n"
    return head + table(found) + drawings(found)


def makes_codes(words: Sequence[str]) -> bool:
    """Whether a training with these overrides makes its own codes."""
    return any(word.partition(".")[0] in _OF_CODES for word in words)


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


_OF_DRAWINGS = """
Drawings of {captions} held-out captions. **R@k**: how often a caption's first, unranked drawing is among the k that suit it best of all, by the contrastive model of the run; in
parentheses 95 % by other captions, and ± the standard error over captions, seed by seed. **MMD** is the squared maximum mean discrepancy between the features of drawings and of
the real pictures, first drawings and best of {most}, by {judge}{halves}. Nats per code of different codes cannot be compared; **nats per picture** are their sum,
and say less the more a picture loses by its codes (PSNR).
"""
_COLUMNS_OF_DRAWINGS = (
    "| arm | PSNR, dB | codes in use | perplexity | nats per picture | R@1 | over {base} | R@10 | over {base} | MMD, first | MMD, best of {most} |",
    "|---|" + "---:|" * 10,
)


def drawings(found: dict[str, Any]) -> str:
    """The drawings of the arms as Markdown, if any arm was judged by them."""
    runs = [run for run in found["runs"] if run.get("drawings")]
    if not runs:
        return ""
    one = runs[0]["drawings"]
    judge = next((name for name in one["mmd2"] if name != OWN_CLIP), OWN_CLIP)
    most, halves = list(one["mmd2"][judge]["by_n"])[-1], one["mmd2"][judge]["halves_of_real"]
    between = f", which gives {halves:.4f} between two halves of the real pictures" if halves is not None else ""
    about = _OF_DRAWINGS.format(captions=one["captions"], most=most, judge=judge, halves=between)
    lines = [line.format(base=markdown(found["base"]), most=most) for line in _COLUMNS_OF_DRAWINGS]
    for arm in sorted({run["arm"]: None for run in runs}, key=lambda arm: arm != found["base"]):
        lines.append(_drawings_row(arm, [run for run in runs if run["arm"] == arm], judge, most))
    return about + "\n" + "\n".join(lines) + "\n"


def _drawings_row(arm: str, runs: Sequence[dict[str, Any]], judge: str, most: str) -> str:
    of_runs = [run["drawings"] for run in runs]
    firsts = [one["retrieval"][OWN_CLIP]["1"] for one in of_runs]
    low, high = (mean(one["recall_at_1_interval"][place] for one in firsts) for place in (0, 1))
    cells = [f"{mean(one['psnr_db'] for one in of_runs):.2f}", f"{mean(one['code_use'] for one in of_runs):.1%}"]
    cells += [
        f"{mean(one['code_perplexity'] for one in of_runs):.0f}",
        f"{mean(run['nats_per_code'] * run['codes_per_picture'] for run in runs):.0f}",
    ]
    for rank, interval in ((1, f" ({100 * low:.1f} to {100 * high:.1f})"), (10, "")):
        over = [one["over_base"][f"recall_at_{rank}"] for one in of_runs if one.get("over_base")]
        cells += [f"{mean(one[f'recall_at_{rank}'] for one in firsts):.1%}{interval}", _over(over)]
    cells += [f"{mean(one['mmd2'][judge]['by_n'][count] for one in of_runs):.4f}" for count in ("1", most)]
    return f"| {markdown(arm)} | " + " | ".join(cells) + " |"


def _over(found: Sequence[tuple[float, float]]) -> str:
    """The mean of differences that have errors of their own, in percent points."""
    if not found:
        return _NONE
    error = math.sqrt(sum(error**2 for _, error in found)) / len(found)
    return f"{100 * mean(value for value, _ in found):+.1f} ± {100 * error:.1f}"


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
