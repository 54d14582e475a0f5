"""Writes docs/benchmarks.md, whose figures come only from docs/benchmarks/*.json. ``python -m train.bench.docs``"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from infra.repository import DOCS
from train.bench import best_known
from train.bench.harness import JSON_SCHEMA
from train.bench.table import BENCHES

_HEAD = """# Benchmarks

Made by `python launcher.py bench docs` from the JSON files in `docs/benchmarks/`, which `python launcher.py bench NAME --out docs/benchmarks` writes.
Do not edit. Floors (what the machine can do) are measured in the same run as the figures beside them; a figure is the median of several runs.
A load at the start above 0 means that other work shared the machine.
"""


def main() -> None:
    """Write docs/benchmarks.md, and the schema of the files that it reads."""
    page = DOCS / "benchmarks.md"
    page.write_text(render(DOCS / "benchmarks"))
    (DOCS / "benchmarks.schema.json").write_text(schema_text())
    print(page.relative_to(DOCS.parent))


def schema_text() -> str:
    """The JSON Schema of a result, as docs/benchmarks.schema.json holds it."""
    return json.dumps(JSON_SCHEMA, indent=2, sort_keys=True) + "\n"


def render(folder: Path) -> str:
    """The page as Markdown: a section for each benchmark, and in it a part for each device.

    Raises:
        ValueError: a file does not hold the result of a benchmark; the message names it.
    """
    results = [_read(path) for path in sorted(folder.glob("*.json"))]
    parts = [_HEAD, _open(results), *filter(None, [best_known.section(folder, results)])]
    for name in sorted({result["name"] for result in results}):
        group = sorted(
            (result for result in results if result["name"] == name), key=lambda result: (result["device"]["kind"], result["device"]["name"])
        )
        parts.append(f"## {group[0]['title']}\n")
        parts += [_one(result) for result in group]
    return "\n".join(parts)


def _open(results: list[dict[str, Any]]) -> str:
    """What is not reached, and what nobody has measured: for each device the goals below their value, and the benchmarks that have no result."""
    lines = ["## Open goals\n", "| benchmark | device | ratio | value | goal |", "|---|---|---|---:|---:|"]
    for result in sorted(results, key=lambda result: (result["name"], result["device"]["name"])):
        for name, ratio in result["ratios"].items():
            if ratio["goal"] is not None and ratio["value"] < ratio["goal"]:
                lines.append(f"| {result['name']} | {result['device']['name']} | {name} | {ratio['value']:.2f} | {ratio['goal']:.2f} |")
    words = {"cpu": "a CPU", "cuda": "a GPU"}
    missing = {kind: sorted(set(BENCHES) - {r["name"] for r in results if r["device"]["kind"] == kind}) for kind in words}
    said = [f"Not measured on {words[kind]} yet, so that their goals are open: {', '.join(names)}.\n" for kind, names in missing.items() if names]
    return "\n".join([*lines, "", *said])


def check(value: Any) -> None:
    """Check parsed JSON against the schema of results.

    Raises:
        ValueError: it does not conform. The message names the place, what is there and what is expected.
    """
    error = best_match(Draft202012Validator(JSON_SCHEMA).iter_errors(value))
    if error is not None:
        raise ValueError(f"{error.json_path}: {error.message}")


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        check(found)
    except ValueError as error:
        raise ValueError(f"{path.name}: no result of a benchmark ({error}); run the benchmark again") from error
    return found


def _one(result: dict[str, Any]) -> str:
    device = result["device"]
    facts = [f"{device['cores']} {'cores' if device['kind'] == 'cpu' else 'multiprocessors'}"] if "cores" in device else []
    facts += [", ".join(device["flags"])] if device.get("flags") else []
    facts += [f"torch {result['versions'].get('torch', '?')}", result["date"], f"commit {_short(result['commit'])}"]
    lines = [f"### {device['name']}\n", "; ".join(facts) + ".\n"]
    if result["settings"]:
        lines.append("Settings: " + ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in result["settings"].items()) + ".\n")
    rows = [
        (name, kind, figure["value"], f"{_digits(figure['min'])} – {_digits(figure['max'])}", figure["unit"])
        for kind, key in (("floor", "floor"), ("measured", "measured"), ("peer", "peers"))
        for name, figure in result[key].items()
    ]
    lines += ["| | | median | range | unit |", "|---|---|---:|---:|---|"]
    lines += [f"| {name} | {kind} | {_digits(value)} | {spread} | {unit} |" for name, kind, value, spread, unit in rows]
    lines.append("")
    if result["ratios"]:
        lines += ["| ratio | of | to | value | goal |", "|---|---|---|---:|---:|"]
        for name, ratio in result["ratios"].items():
            goal = "" if ratio["goal"] is None else f"{ratio['goal']:.2f}"
            lines.append(f"| {name} | {ratio['of']} | {ratio['to']} | {ratio['value']:.2f} | {goal} |")
        lines.append("")
    return "\n".join([*lines, *(f"{note}\n" for note in result["notes"])])


def _short(commit: str) -> str:
    return commit[:10] + (" with changes" if commit.endswith("+dirty") else "")


def _digits(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


if __name__ == "__main__":
    main()
