"""Renders the parts of docs/experiments.md on dalle-pytorch, and their pictures, from the files of train/experiments/peer.py."""

from __future__ import annotations

from typing import Any

from train.experiments.precision_page import alone
from train.report.plots import Line, lines

_GOAL = 0.05
_COLUMNS = (("ours", "averaged", "ours, averaged weights"), ("ours", "raw", "ours, last weights"), ("peer", "raw", "dalle-pytorch"))
_ABOUT = """Made by `python -m train.experiments.peer RUN`, on the same codes, captions and samples in the same order, with equal depth, width, heads and batch, on the same machine,
{halves}. Updates and the fetching of batches count as time, checkpoints in ours too; evaluations, the start and all probes do not. What the peer was given beyond its own
script: AdamW with our decays, a warm-up and a cosine that ends with the time, the faster of fp32 and bf16, the best of {probes}, and our allocator setting. It has
no averaged weights. The caption gain is what shuffled captions cost, in nats per code.
"""


def section(found: dict[str, Any]) -> str:
    """One file as Markdown. A missing half is shown as missing."""
    settings = found["settings"]
    shown = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in sorted(settings.items()) if key not in ("overrides", "run", "halves"))
    words = f" with `{' '.join(settings['overrides'])}`" if settings["overrides"] else ""
    about = _ABOUT.format(halves=settings["halves"], probes=_probes(found))
    halves = [half for half in ("ours", "peer") if half in found]
    made = "; ".join(f"{half}: {_recipe(found[half])}" for half in halves)
    return (
        f"\n## Against dalle-pytorch, on {settings['run']}{words}\n\n{about}\nSettings: {shown}.\n\n{made}.\n\n{table(found)}\n{verdict(found)}\n\n"
        f"![validation nats per code]({picture_place(found)})\n"
    )


def table(found: dict[str, Any]) -> str:
    """The final figures as a Markdown table."""
    columns = [(half, weights, name) for half, weights, name in _COLUMNS if half in found]
    rows = {
        "validation, nats per image code": lambda half, weights: f"{found[half]['final'][weights]['nats_per_code']:.4f}",
        "with shuffled captions": lambda half, weights: f"{found[half]['final'][weights]['nats_shuffled']:.4f}",
        "caption gain": lambda half, weights: f"{found[half]['final'][weights]['caption_gain']:.4f}",
        "minutes of training": lambda half, _: f"{found[half]['minutes']:.1f}",
        "updates": lambda half, _: f"{found[half]['updates']:,}",
        "epochs": lambda half, _: f"{found[half]['updates'] * found['settings']['batch'] / found['settings']['training_images']:.1f}",
        "parameters": lambda half, _: f"{found[half]['parameters']:,}",
    }
    lines_ = ["| | " + " | ".join(name for _, _, name in columns) + " |", "|---|" + "---:|" * len(columns)]
    lines_ += [f"| {title} | " + " | ".join(cell(half, weights) for half, weights, _ in columns) + " |" for title, cell in rows.items()]
    return "\n".join(lines_) + "\n"


def verdict(found: dict[str, Any]) -> str:
    """Say by how much our loss is lower."""
    if "ours" not in found or "peer" not in found:
        return f"The other half is missing: `python -m train.experiments.peer RUN --only {'peer' if 'ours' in found else 'ours'}`."
    theirs = found["peer"]["final"]["raw"]["nats_per_code"]
    shares = {weights: 1 - found["ours"]["final"][weights]["nats_per_code"] / theirs for weights in ("averaged", "raw")}
    reached = "reached" if shares["averaged"] >= _GOAL else "missed"
    said = {weights: f"{abs(share):.1%} {'lower' if share >= 0 else 'higher'}" for weights, share in shares.items()}
    return f"Ours is {said['averaged']} ({said['raw']} with the last weights); the goal of {_GOAL:.0%} lower is {reached}."


def stem(run: str) -> str:
    """The name of the files about a run, without suffix."""
    return f"against-dalle-pytorch-{run}"


def picture_place(found: dict[str, Any]) -> str:
    """The path of its picture, relative to docs/."""
    return f"pictures/{stem(found['settings']['run'])}.svg"


def picture(found: dict[str, Any]) -> str:
    """The curves of both halves as an SVG file."""
    names = {"ours": "ours, averaged weights", "peer": "dalle-pytorch"}
    series = [Line(name, [(minutes, nats) for minutes, _, nats in found[half]["curve"]]) for half, name in names.items() if half in found]
    return alone(lines(stem(found["settings"]["run"]), "validation nats per image code", series, across="minutes of training"))


def _probes(found: dict[str, Any]) -> str:
    """The settings among which the peer's probes chose."""
    probes = found["peer"]["probes"] if "peer" in found else []
    rates, attentions = (sorted({probe[key] for probe in probes}) for key in ("lr", "attention"))
    patterns = f" and of the attention patterns {' and '.join(attentions)}" if len(attentions) > 1 else ""
    return f"{len(rates) or 'some'} step sizes{patterns} by probes"


def _recipe(half: dict[str, Any]) -> str:
    recipe = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in half["recipe"].items())
    package = half["producer"].get("dalle_pytorch")
    load = " to ".join(f"{value:.1f}" for value in half["load"])
    return f"{recipe}, {'dalle-pytorch ' + package + ', ' if package else ''}load {load}, commit {half['producer']['commit'][:10]}"
