"""Renders docs/precision.md and its pictures from the files of ``train.experiments.precision``: ``python -m train.experiments.precision --render``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from infra import storage
from train.report.plots import Line, lines

_HEAD = """# Experiments on precision

Made by `python -m train.experiments.precision --render` from the JSON files in `docs/experiments/precision/`, which `python -m train.experiments.precision --name NAME` writes. Do not edit.

What the paper says (2.4, D): gradients of activations shrink from resblock to resblock; past a billion parameters the last of them leave fp16's range, one scale for the
whole loss cannot help, and one scale for each resblock does. 1-6-9 and 0-6-10 moments cost nothing.

- **floor**: bits by which fp16's exponent range was cut short from below, in all fp16 arms alike; 0 is fp16 as it is. A small model's gradients fit into fp16, so a higher
  floor stands in for a larger model.
- **loss**: mean training loss of the last tenth of the updates, in nats. **over fp32**: what it has more than the fp32 arm.
- **lost**: share of a resblock's matrix gradients that are exactly zero though fp32 has a value there, at the last weights: in the first, an average and the last resblock.
- **skipped**: updates that an overflow cost. **scales**: their exponents, from the first resblock to the last; each starts and is judged as high as its gradients allow, less a bit.
  The paper's ceiling of 2^24 (D.1) is lifted (ceiling below is its exponent): where the floor is raised, it would hide what the range decides.

All figures are means over the seeds; after ± stands the standard error of the mean difference from the fp32 arm of the same seed. Scales and the first two pictures are of
the first seed. With one seed a difference of a few thousandths of a nat says nothing.
"""
_LONG_ENOUGH = 300
"""Number of updates within which the task is learned; it takes 200 to 300."""
_ALT = {"loss": "losses", "lost": "lost values", "floors": "losses by floor"}
_COLOURS = ("#2563eb", "#d97706", "#059669", "#9333ea")


def write(docs: Path) -> None:
    """Write the page and its pictures below ``docs``."""
    parts = [_HEAD]
    for path in sorted((docs / "experiments" / "precision").glob("*.json")):
        found = storage.read_json(str(path))
        drawn = pictures(path.stem, found)
        parts.append(_section(path.stem, found, list(drawn)))
        for kind, picture in drawn.items():
            (docs / "pictures" / f"precision-{path.stem}-{kind}.svg").write_text(picture)
    (docs / "precision.md").write_text("".join(parts))


def _section(name: str, found: dict[str, Any], kinds: Sequence[str]) -> str:
    options = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in found["options"].items() if key not in ("floors", "seeds"))
    floor = _telling_floor(found["runs"])
    short = found["options"]["updates"] < _LONG_ENOUGH
    note = "Too short to learn anything: the losses show only that no arm fails; look at what is lost.\n\n" if short else ""
    return (
        f"\n## {name}\n\n{note}{options}; seeds {', '.join(map(str, found['options']['seeds']))}; {found['parameters']:,} parameters. Commit {found['commit'][:10]}.\n\n{table(found['runs'])}\n"
        f"Losses and shares of lost values by resblock at a floor raised by {floor} bits, where the arms differ most{', and losses by floor' * ('floors' in kinds)}:\n\n"
        f"{' '.join(f'![{_ALT[kind]}](pictures/precision-{name}-{kind}.svg)' for kind in kinds)}\n"
    )


def table(runs: Sequence[dict[str, Any]]) -> str:
    """The runs of one file as a Markdown table, with one row for all seeds of an arm at a floor."""
    base = {run["seed"]: run["last_tenth"] for run in runs if run["arm"] == "fp32"}
    rows = ["| arm | floor | loss | over fp32 | lost: first | mean | last | skipped | scales |", "|---|" + "---:|" * 7 + "---|"]
    for (floor, arm), same in by_arm(runs).items():
        lost = [mean(shares) for shares in zip(*(run["lost_share"] for run in same), strict=True)]
        shares = " | ".join(f"{share:.1%}" for share in (lost[0], mean(lost), lost[-1]))
        over = [run["last_tenth"] - base[run["seed"]] for run in same]
        error = f" ± {stdev(over) / len(over) ** 0.5:.4f}" if len(over) > 1 and arm != "fp32" else ""
        loss = f"{mean(run['last_tenth'] for run in same):.4f} | {mean(over):+.4f}{error}"
        rows.append(f"| {arm} | {floor} | {loss} | {shares} | {mean(run['skipped'] for run in same):.0f} | {_exponents(same[0])} |")
    return "\n".join(rows) + "\n"


def by_arm(runs: Sequence[dict[str, Any]]) -> dict[tuple[int, str], list[dict[str, Any]]]:
    """(floor, arm) -> its runs, which differ only in their seed. Floors are in ascending order, arms in their given order."""
    found: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for run in sorted(runs, key=lambda run: int(run["floor_bits"])):
        found.setdefault((int(run["floor_bits"]), run["arm"]), []).append(run)
    return found


def _exponents(run: dict[str, Any]) -> str:
    exponents = run.get("scale_exponents", [])
    return " ".join(f"{value:.0f}" for value in exponents[:: max(1, len(exponents) // 6)])


def _telling_floor(runs: Sequence[dict[str, Any]]) -> int:
    """The floor at which the losses of the fp16 arms, averaged over seeds, differ most."""
    losses: dict[int, list[float]] = {}
    for (floor, arm), same in by_arm(runs).items():
        if arm != "fp32":
            losses.setdefault(floor, []).append(mean(run["last_tenth"] for run in same))
    return max(losses, key=lambda floor: max(losses[floor]) - min(losses[floor]))


def pictures(name: str, found: dict[str, Any]) -> dict[str, str]:
    """Kind -> SVG file: 'loss' over updates and 'lost' over resblocks, of fp32 and of the fp16 arms at the floor at which they differ most; if there are several
    floors, also 'floors', the loss over floors."""
    floor = _telling_floor(found["runs"])
    grouped = by_arm(found["runs"])
    shown = [same[0] for (bits, arm), same in grouped.items() if arm == "fp32" or bits == floor]
    losses = [Line(run["arm"], run["losses"]) for run in shown]
    lost = [Line(run["arm"], list(enumerate(run["lost_share"]))) for run in shown if run["arm"] != "fp32"]
    plots = {
        "loss": lines(f"{name}-loss", "training loss, nats", losses),
        "lost": lines(f"{name}-lost", "share of lost gradient values", lost, across="resblock"),
    }
    points: dict[str, list[tuple[float, float]]] = {}
    for (bits, arm), same in grouped.items():
        if arm != "fp32":
            points.setdefault(arm, []).append((bits, mean(run["last_tenth"] for run in same)))
    if any(len(line) > 1 for line in points.values()):
        ends = [Line(arm, line) for arm, line in points.items()]
        plots["floors"] = lines(f"{name}-floors", "loss at the end, nats", ends, across="bits of raised floor")
    return {kind: alone(svg) for kind, svg in plots.items()}


def alone(svg: str) -> str:
    """Turn a plot that was made for an HTML page into a separate SVG file."""
    svg = str(svg)  # the method ``replace`` of Html would escape the new text
    for index, colour in enumerate(_COLOURS):
        svg = svg.replace(f"var(--s{index})", colour)
    return svg.replace("<svg ", '<svg width="560" font-family="sans-serif" color="#64748b" ', 1) + "\n"
