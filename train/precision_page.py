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
  23 is the ceiling of 2^24 (D.1) less a bit: where all scales stand there, those of the resblocks can give no more than a global one.

One seed each: a difference of a few thousandths of a nat says nothing.
"""
_LONG_ENOUGH = 1000
_COLOURS = ("#2563eb", "#d97706", "#059669", "#9333ea")


def write(docs: Path) -> None:
    """Write the page and its pictures below ``docs``."""
    parts = [_HEAD]
    for path in sorted((docs / "experiments" / "precision").glob("*.json")):
        found = json.loads(path.read_text())
        parts.append(_section(path.stem, found))
        for kind, picture in pictures(path.stem, found).items():
            (docs / "pictures" / f"precision-{path.stem}-{kind}.svg").write_text(picture)
    (docs / "precision.md").write_text("".join(parts))


def _section(name: str, found: dict[str, Any]) -> str:
    options = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in found["options"].items() if key != "floors")
    floor = _worst_floor(found["runs"])
    short = found["options"]["updates"] < _LONG_ENOUGH
    note = "Too short to learn anything: the losses show only that no arm fails; look at what is lost.\n\n" if short else ""
    return (
        f"\n## {name}\n\n{note}{options}; {found['parameters']:,} parameters. Commit {found['commit'][:10]}.\n\n{table(found['runs'])}\n"
        f"Losses, and shares of lost values by resblock, at a floor raised by {floor} bits:\n\n"
        f"![losses](pictures/precision-{name}-loss.svg) ![lost values](pictures/precision-{name}-lost.svg)\n"
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


def _worst_floor(runs: Sequence[dict[str, Any]]) -> int:
    return max(int(run["floor_bits"]) for run in runs)


def pictures(name: str, found: dict[str, Any]) -> dict[str, str]:
    """SVG files by kind: 'loss' over updates, 'lost' over resblocks; fp32 and the arms at the highest floor."""
    floor = _worst_floor(found["runs"])
    shown = [run for run in found["runs"] if run["arm"] == "fp32" or run["floor_bits"] == floor]
    losses = [Line(run["arm"], run["losses"]) for run in shown]
    lost = [Line(run["arm"], list(enumerate(run["lost_share"]))) for run in shown if run["arm"] != "fp32"]
    return {
        "loss": alone(lines(f"{name}-loss", "training loss, nats", losses)),
        "lost": alone(lines(f"{name}-lost", "share of lost gradient values", lost, across="resblock")),
    }


def alone(svg: str) -> str:
    """A plot that was made for a page, as a file of its own."""
    for index, colour in enumerate(_COLOURS):
        svg = svg.replace(f"var(--s{index})", colour)
    head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="560" font-family="sans-serif" color="#64748b" '
    return svg.replace("<svg ", head, 1) + "\n"
