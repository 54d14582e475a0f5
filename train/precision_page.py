"""docs/precision.md and its pictures, from the files that ``train.precision_experiments`` wrote: ``python -m train.precision_experiments --render``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.report.plots import Line, lines

_HEAD = """# Experiments on precision

Made by `python -m train.precision_experiments --render` from the JSON files in `docs/experiments/precision/`, which `python -m train.precision_experiments --name NAME` writes. Do not edit.

What the paper says (2.4, D): gradients of activations shrink from resblock to resblock; past a billion parameters the last of them leave fp16's range, one scale for the
whole loss cannot help, and one scale for each resblock does. 1-6-9 and 0-6-10 moments cost nothing.

- **floor**: bits by which fp16's exponent range was cut short from below, in all fp16 arms alike; 0 is fp16 as it is. A small model's gradients fit into fp16, so a higher
  floor stands in for a larger model.
- **loss**: mean training loss of the last tenth of the updates, in nats. **over fp32**: what it has more than the fp32 arm.
- **lost**: share of a resblock's matrix gradients that are exactly zero though fp32 has a value there, at the last weights: in the first, an average and the last resblock.
- **skipped**: updates that an overflow cost. **scales**: their exponents, from the first resblock to the last; each starts and is judged as high as its gradients allow, less a bit.
  The paper's ceiling of 2^24 (D.1) is lifted (ceiling below is its exponent): where the floor is raised, it would hide what the range decides.

One seed each: a difference of a few thousandths of a nat says nothing.
"""
_LONG_ENOUGH = 300
"""Updates. The task is learned within 200 to 300."""
_ALT = {"loss": "losses", "lost": "lost values", "floors": "losses by floor"}
_COLOURS = ("#2563eb", "#d97706", "#059669", "#9333ea")


def write(docs: Path) -> None:
    """Write the page and its pictures below ``docs``."""
    parts = [_HEAD]
    for path in sorted((docs / "experiments" / "precision").glob("*.json")):
        found = json.loads(path.read_text())
        drawn = pictures(path.stem, found)
        parts.append(_section(path.stem, found, list(drawn)))
        for kind, picture in drawn.items():
            (docs / "pictures" / f"precision-{path.stem}-{kind}.svg").write_text(picture)
    (docs / "precision.md").write_text("".join(parts))


def _section(name: str, found: dict[str, Any], kinds: Sequence[str]) -> str:
    options = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in found["options"].items() if key != "floors")
    floor = _telling_floor(found["runs"])
    short = found["options"]["updates"] < _LONG_ENOUGH
    note = "Too short to learn anything: the losses show only that no arm fails; look at what is lost.\n\n" if short else ""
    return (
        f"\n## {name}\n\n{note}{options}; {found['parameters']:,} parameters. Commit {found['commit'][:10]}.\n\n{table(found['runs'])}\n"
        f"Losses and shares of lost values by resblock at a floor raised by {floor} bits, where the arms differ most{', and losses by floor' * ('floors' in kinds)}:\n\n"
        f"{' '.join(f'![{_ALT[kind]}](pictures/precision-{name}-{kind}.svg)' for kind in kinds)}\n"
    )


def table(runs: Sequence[dict[str, Any]]) -> str:
    """The runs of one file as a Markdown table."""
    base = runs[0]["last_tenth"]
    rows = ["| arm | floor | loss | over fp32 | lost: first | mean | last | skipped | scales |", "|---|" + "---:|" * 7 + "---|"]
    for run in runs:
        lost = run["lost_share"]
        shares = " | ".join(f"{share:.1%}" for share in (lost[0], sum(lost) / len(lost), lost[-1]))
        loss = f"{run['last_tenth']:.4f} | {run['last_tenth'] - base:+.4f}"
        rows.append(f"| {run['arm']} | {run['floor_bits']} | {loss} | {shares} | {run['skipped']} | {_exponents(run)} |")
    return "\n".join(rows) + "\n"


def _exponents(run: dict[str, Any]) -> str:
    exponents = run.get("scale_exponents", [])
    return " ".join(f"{value:.0f}" for value in exponents[:: max(1, len(exponents) // 6)])


def _telling_floor(runs: Sequence[dict[str, Any]]) -> int:
    """The floor at which the losses of the fp16 arms are furthest apart."""
    losses: dict[int, list[float]] = {}
    for run in runs:
        if run["arm"] != "fp32":
            losses.setdefault(int(run["floor_bits"]), []).append(run["last_tenth"])
    return max(losses, key=lambda floor: max(losses[floor]) - min(losses[floor]))


def pictures(name: str, found: dict[str, Any]) -> dict[str, str]:
    """SVG files by kind: 'loss' over updates and 'lost' over resblocks, of fp32 and of the arms where they differ most; of several floors 'floors', the loss over them."""
    floor = _telling_floor(found["runs"])
    shown = [run for run in found["runs"] if run["arm"] == "fp32" or run["floor_bits"] == floor]
    losses = [Line(run["arm"], run["losses"]) for run in shown]
    lost = [Line(run["arm"], list(enumerate(run["lost_share"]))) for run in shown if run["arm"] != "fp32"]
    plots = {
        "loss": lines(f"{name}-loss", "training loss, nats", losses),
        "lost": lines(f"{name}-lost", "share of lost gradient values", lost, across="resblock"),
    }
    by_arm: dict[str, list[tuple[float, float]]] = {}
    for run in found["runs"]:
        by_arm.setdefault(run["arm"], []).append((run["floor_bits"], run["last_tenth"]))
    by_arm.pop("fp32", None)
    if any(len(points) > 1 for points in by_arm.values()):
        ends = [Line(arm, points) for arm, points in by_arm.items()]
        plots["floors"] = lines(f"{name}-floors", "loss at the end, nats", ends, across="bits of raised floor")
    return {kind: alone(svg) for kind, svg in plots.items()}


def alone(svg: str) -> str:
    """A plot that was made for a page, as a file of its own."""
    for index, colour in enumerate(_COLOURS):
        svg = svg.replace(f"var(--s{index})", colour)
    head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="560" font-family="sans-serif" color="#64748b" '
    return svg.replace("<svg ", head, 1) + "\n"
