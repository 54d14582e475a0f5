"""Small experiments on the paper's claims about the dVAE: ``python -m train.experiments.page PRESET [section.key=value ...]`` and ``... --render``.

Each variant is a run of stage dvae on the same images, and differs from the first variant in one setting. ``... --curves RUN`` records one training instead
(train/experiments/curves.py). The figures are written to docs/experiments/<name>.json, and docs/experiments.md is made only from these files.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infra import storage
from infra.errors import ExitCode, in_a_sentence
from infra.repository import DOCS, LAUNCHER
from infra.run_folder import producer
from train.config import load_run
from train.experiments import compression_page, curves, peer_page, sweep_page
from train.run.places import run_folder

VARIANTS: dict[str, tuple[str, ...]] = {
    "as the paper": (),
    "beta 0": ("dvae_fit.beta=0.0",),
    "beta 1": ("dvae_fit.beta=1.0",),
    "linear temperature": ("dvae_fit.tau_schedule=linear",),
    "average pooling": ("dvae.pool=average",),
}
"""Name -> the setting that differs from the first variant, which has beta 6.6, a cosine schedule of the temperature, and max-pooling."""
PAPER = ("dvae_fit.beta=6.6", "dvae_fit.tau_schedule=cosine", "dvae.pool=max")
FIGURES = {
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "elb_true": "ELB, true codes",
    "elb_gap": "ELB gap",
    "code_use": "codes in use",
    "perplexity": "perplexity",
    "train_dead_codes": "dead codes in training",
}
_HEAD = """# Experiments

Made by `python -m train.experiments.page --render` from the JSON files in `docs/experiments/`, which `python -m train.experiments.page PRESET`,
`python -m train.experiments.page --curves RUN`, `python -m train.experiments.peer RUN`, `python -m train.experiments.compression RUN` and `python -m train.experiments.sweep FILE.toml` write. Do not edit. Gradient scales, raised exponent floors and 16-bit moments have
[a page of their own](precision.md).

What the paper says of stage 1, and what each row would show:

- **beta**: raising it to 6.6 gave better use of the codebook and, in the end, a lower reconstruction error (2.1). Rows beta 0 and beta 1 should use fewer codes, and reconstruct worse.
- **temperature**: a linear schedule typically diverged (2.1).
- **pooling**: max-pooling gave a better ELB than average-pooling (A.1).

Figures are those of the last evaluation on validation images with averaged weights; ELBs are in nats per channel value at beta = 1, and the gap is relaxed minus true.
One seed decides nothing where rows are close, and a claim about 3,000,000 updates is not settled by a small run: read the settings beside each table.
"""
_MISSING = """
## What is missing

No table of a run that is long enough to judge the claims on stage 1 is here yet: `python -m train.experiments.page demo` (five runs of the demo's dVAE, about 15 minutes on two cores) and
the same on photographs, for hours, with several seeds (`run.seed=1` ...).
"""
_LONG_ENOUGH = 1000


def main(arguments: Sequence[str]) -> None:
    """Run the variants and write their figures, or render the page."""
    parser = argparse.ArgumentParser(description="Train the dVAE in the variants of the paper's claims.")
    parser.add_argument("preset", nargs="?", help="preset, .toml file or run folder")
    parser.add_argument("overrides", nargs="*", help="section.key=value, for every variant")
    parser.add_argument("--nproc", type=int, default=1)
    parser.add_argument("--out", type=Path, default=DOCS / "experiments", help="folder for the figures")
    parser.add_argument("--curves", metavar="RUN", help="write the evaluations of this run's stage dvae instead of training anything")
    parser.add_argument("--render", action="store_true", help="write docs/experiments.md instead")
    given = parser.parse_args(arguments)
    if given.render or not (given.preset or given.curves):
        (DOCS / "experiments.md").write_text(render(DOCS / "experiments"))
        for against in _of_kind(DOCS / "experiments", "peer"):
            (DOCS / peer_page.picture_place(against)).write_text(peer_page.picture(against))
        return
    found = curves.collect(given.curves) if given.curves else run(given.preset, given.overrides, given.nproc)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / f"{found['name']}{'-curves' if given.curves else ''}.json").write_text(json.dumps(found, indent=2, sort_keys=True) + "\n")
    print(curves.section(found) if given.curves else table(found))


def run(preset: str, overrides: Sequence[str], nproc: int) -> dict[str, Any]:
    """Train every variant in a run folder of its own; all read the images from a common folder."""
    cfg = load_run(preset, list(overrides))
    name = cfg.run.name
    images = storage.join(cfg.run.root, f"{name}-images")
    rows = {}
    for title, changes in VARIANTS.items():
        slug = re.sub(r"[^a-z0-9]+", "-", title)
        words = [*PAPER, *overrides, *changes, f"run.name={name}-{slug}", f'data.images="{images}"']
        variant = run_folder(load_run(preset, words))
        _launch("prepare", preset, words, 1)  # the first variant writes the images, the others find them
        began = time.monotonic()
        code = _launch("dvae", preset, words, nproc)
        done = variant.done("dvae") or {"summary": {}}
        rows[title] = {
            "changes": list(changes),
            "end": ExitCode(code).name.lower(),
            "minutes": round((time.monotonic() - began) / 60, 2),
            "figures": {key: done["summary"][key] for key in FIGURES if key in done["summary"]},
        }
    fit = cfg.dvae_fit
    settings = {
        "image_size": cfg.dvae.image_size,
        "vocab": cfg.dvae.vocab,
        "steps": fit.steps,
        "batch": fit.batch,
        "lr": fit.lr,
        "seed": cfg.run.seed,
    }
    shown = [word for word in overrides if not word.startswith("run.root=")]  # a path of this machine, which does not belong on the page
    return {"name": name, "settings": settings | {"overrides": shown}, "rows": rows, "producer": producer()}


def _launch(stage: str, preset: str, words: Sequence[str], nproc: int) -> int:
    """Run a stage, and return its exit code. 93 (diverged) is a valid result; any other code but 0 is an error."""
    command = [sys.executable, str(LAUNCHER), stage, preset, *words, "--nproc", str(nproc)]
    code = subprocess.run(command, check=False).returncode
    if code not in (ExitCode.DONE, ExitCode.DIVERGED):
        raise SystemExit(code)
    return code


def render(folder: Path) -> str:
    """The page, as Markdown."""
    found = _of_kind(folder, "variants")
    parts = [_HEAD, *(curves.section(one) for one in _of_kind(folder, "curves"))]
    for one in found:
        settings = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in sorted(one["settings"].items()) if key != "overrides")
        overrides = f" with `{' '.join(one['settings']['overrides'])}`" if one["settings"]["overrides"] else ""
        short = one["settings"]["steps"] < _LONG_ENOUGH
        note = "Far too short to say anything about the claims: it shows that the variants run.\n\n" if short else ""
        parts.append(f"\n## {one['name']}{overrides}\n\n{note}Settings: {settings}. Commit {one['producer']['commit'][:10]}.\n\n{table(one)}")
    long_enough = any(one["settings"]["steps"] >= _LONG_ENOUGH for one in found)
    parts += [compression_page.section(one) for one in _of_kind(folder, "compression")]
    parts += [compression_page.network_section(one) for one in _of_kind(folder, "compression-network")]
    parts += [sweep_page.section(one) for one in _of_kind(folder, "sweep")]
    return "".join([*parts, *(peer_page.section(one) for one in _of_kind(folder, "peer")), "" if long_enough else _MISSING])


def _of_kind(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The files of a kind, in the order of their names. A file that names no kind holds variants."""
    everything = (storage.read_json(str(path)) for path in sorted(folder.glob("*.json")))
    return [one for one in everything if one.get("kind", "variants") == kind]


def table(found: dict[str, Any]) -> str:
    """The variants of one file as a Markdown table."""
    lines = ["| variant | " + " | ".join(FIGURES.values()) + " | end | minutes |", "|---|" + "---:|" * len(FIGURES) + "---|---:|"]
    for title, row in found["rows"].items():
        cells = [f"{row['figures'][key]:.4g}" if key in row["figures"] else "–" for key in FIGURES]
        lines.append(f"| {title} | " + " | ".join(cells) + f" | {row['end']} | {row['minutes']} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    in_a_sentence(main)
