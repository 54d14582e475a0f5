"""Renders the part of docs/experiments.md on compression between machines, from the files of train/experiments/compression.py."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

GOAL = 0.01
"""The paper claims that nothing is lost. The claim counts as confirmed if the loss is at most so many nats above exact, at the end and in every tenth."""
_ABOUT = """Made by `python -m train.experiments.compression RUN`: {machines} machines simulated in one process on real codes, each with m GPUs that hold one shard of every matrix, and error
buffers of its own; factors in fp32. **sent** is what travels of the matrices' gradients, by the formula r(m + 2)/(2dm) and as the real shards have it; **loss** the mean training loss of the last tenth of
the updates, **over exact** what it has more than the exact arm of the same seed, and **worst tenth** the most that any tenth has. **owed** is
what compression has not sent yet, as the metric `numerics/owed` has it: the norm of the summed errors over that of the summed gradient, in the last tenth (– : not counted yet). ± is the standard error over the seeds.
"""


def section(found: dict[str, Any]) -> str:
    """One file as Markdown."""
    settings = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in sorted(found["settings"].items()) if key != "machines")
    about = _ABOUT.format(machines=found["settings"]["machines"])
    runs = found["runs"]
    head = f"\n## Compression between machines: {found['name']}\n\n{about}\nSettings: {settings}. Commit {found['producer']['commit'][:10]}.\n\n"
    return head + table(runs, found["settings"]["width"]) + f"\n{verdict(runs)}\n"


def table(runs: Sequence[dict[str, Any]], width: int = 0) -> str:
    """The arms as a Markdown table."""
    lines = [
        "| arm | rank | sent, formula | sent | loss | over exact | worst tenth | owed, updates | summing and compressing, of the time | seeds |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for arm in dict.fromkeys(run["arm"] for run in runs):
        of_arm = [run for run in runs if run["arm"] == arm]
        first, gaps = of_arm[0], [gap for run in of_arm if (gap := over_exact(run, runs)) is not None]
        formula = first["rank"] * (first["gpus"] + 2) / (2 * width * first["gpus"]) if width and first["rank"] else 1.0
        spent = mean(run["compressing_s"] / run["seconds"] for run in of_arm)
        ends = [gap[-1] for gap in gaps]
        error = f" ± {stdev(ends) / len(ends) ** 0.5:.4f}" if len(ends) > 1 and first["rank"] else ""
        mean_tenths = [mean(tenth) for tenth in zip(*gaps, strict=True)]
        cells = [
            str(first["rank"] or "–"), f"{formula:.3f}", f"{first['sent_share']:.3f}", f"{mean(run['tenths'][-1] for run in of_arm):.4f}",
            f"{mean(ends):+.4f}{error}" if ends else "–", f"{max(mean_tenths):+.4f}" if mean_tenths else "–", _owed(of_arm), f"{spent:.1%}", str(len(of_arm)),
        ]  # fmt: skip
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _owed(runs: Sequence[dict[str, Any]]) -> str:
    """The mean over the last tenth of the looks."""
    found = [mean(run["owed"][-max(1, len(run["owed"]) // 10) :]) for run in runs if run["rank"] and run.get("owed")]
    return f"{mean(found):.1f}" if found else "–"


def over_exact(run: dict[str, Any], runs: Sequence[dict[str, Any]]) -> list[float] | None:
    """For each tenth, the loss of a training minus that of the exact one with the same seed; None if the exact one is missing."""
    exact = [one for one in runs if one["arm"] == "exact" and one["seed"] == run["seed"]]
    return [mine - base for mine, base in zip(run["tenths"], exact[0]["tenths"], strict=True)] if exact else None


def network_section(found: dict[str, Any]) -> str:
    """Times of updates at several bandwidths, as Markdown."""
    settings, rows = found["settings"], found["rows"]
    ways = list(dict.fromkeys(row["way"] for row in rows))
    shown = ", ".join(f"{key} {value}" for key, value in sorted(settings.items()))
    lines = ["| Mbit/s | " + " | ".join(f"{way}: update, s | exchange, s" for way in ways) + " |", "|---:|" + "---:|---:|" * len(ways)]
    for rate in dict.fromkeys(row["mbit_s"] for row in rows):
        of_rate = {row["way"]: row for row in rows if row["mbit_s"] == rate}
        cells = [f"{of_rate[way]['update_s']:.3f} | {of_rate[way]['exchange_s']:.3f}" for way in ways]
        lines.append(f"| {rate or 'unbounded'} | " + " | ".join(cells) + " |")
    sent = "; ".join(f"{way}: {_bytes(next(row for row in rows if row['way'] == way))}" for way in ways)
    return (
        "\n## Compression between two machines in network namespaces\n\nMade by `python -m train.experiments.compression_network`: two machines of two processes on one computer, ZeRO 3 and gloo, joined by a "
        "virtual cable that a token bucket bounds in each direction. **exchange** is what comes after the backward pass and before the step, and is in **update**.\n\n"
        f"Settings: {shown}. Commit {found['producer']['commit'][:10]}.\n\n"
        + "\n".join(lines)
        + f"\n\nMB that a machine sends in an update over the cable, headers included: {sent}.\n\n{crossover(rows)}\n"
    )


def _bytes(row: dict[str, Any]) -> str:
    counted = f" ({row['counted_bytes'] / 1e6:.2f} counted at the collectives)" if row["counted_bytes"] else ""
    return f"{row['cable_bytes'] / 1e6:.2f}{counted}"


def crossover(rows: Sequence[dict[str, Any]]) -> str:
    """Say up to which rate compression saves time. Above the first rate where it does not, the times differ by less than they vary, so later ones are not read as gains."""
    times = {(row["way"], row["mbit_s"] or float("inf")): row["update_s"] for row in rows}
    words = []
    for way in dict.fromkeys(row["way"] for row in rows if row["way"] != "exact"):
        rates = sorted(rate for name, rate in times if name == way)
        slower = next((rate for rate in rates if times[way, rate] >= times["exact", rate]), None)
        faster = [rate for rate in rates if slower is None or rate < slower]
        if slower is None:
            words.append(f"{way} is faster than exact at any rate")
        elif faster:
            words.append(f"{way} is faster than exact up to {faster[-1]:g} Mbit/s, and not {_from(slower)}")
        else:
            words.append(f"{way} is not faster than exact {_from(slower)}")
    return "; ".join(words) + "."


def _from(rate: float) -> str:
    return "without a bound" if rate == float("inf") else f"from {rate:g} Mbit/s on"


def verdict(runs: Sequence[dict[str, Any]]) -> str:
    """Say for each number of GPUs which is the smallest rank without a loss, among the arms with the paper's algorithm."""
    words = []
    for gpus in sorted({run["gpus"] for run in runs if run["rank"]}):
        plain = [run for run in runs if run["gpus"] == gpus and run["rank"] and run["arm"].count(",") == 1]
        good = []
        for rank in sorted({run["rank"] for run in plain}):
            gaps = [gap for run in plain if run["rank"] == rank and (gap := over_exact(run, runs)) is not None]
            if gaps and max(mean(tenth) for tenth in zip(*gaps, strict=True)) <= GOAL:
                good.append(rank)
        words.append(
            f"m = {gpus}: "
            + (
                f"the smallest rank within {GOAL} nats of exact in every tenth is {good[0]}"
                if good
                else f"no rank stays within {GOAL} nats of exact in every tenth"
            )
        )
    return "; ".join(words) + "." if words else "No compressed arm is here yet."
