"""``launcher.py docs --demo RUN``: writes docs/demo.md and its pictures, only from the files of a finished run."""

from __future__ import annotations

import datetime
import platform
from pathlib import Path
from typing import Any

from infra import storage, stored
from infra.commands import launcher
from infra.errors import DataError
from infra.repository import DOCS
from infra.run_folder import RunFolder
from infra.run_records import Evaluation, Provenance
from train.run.stage_table import used


def main(url: str, note: str = "") -> None:
    """Write the page and copy the pictures.

    Args:
        url: the run.
        note: what a reader of the times should know and the run's files do not hold, such as other load on the machine.

    Raises:
        DataError: the run is not finished.
    """
    run = RunFolder(url)
    stored_config = run.stored() or {}
    done = {name: run.done(name) for name in used(lambda stage: int(stored_config.get(f"{stage}_fit", {}).get("steps", 0)))}
    missing = [name for name, marker in done.items() if marker is None]
    if missing:
        raise DataError(f"{url}: not finished ({', '.join(missing)}); run 'launcher.py demo' first.")
    (DOCS / "pictures").mkdir(exist_ok=True)
    for source, name in ((("generate", "grid.png"), "demo-grid.png"), (("dvae", "pictures", "reconstructions.png"), "demo-reconstructions.png")):
        (DOCS / "pictures" / name).write_bytes(storage.read_bytes(run.at(*source)))
    (DOCS / "demo.md").write_text(render(run, {name: marker for name, marker in done.items() if marker is not None}, note))
    print("docs/demo.md")


def render(run: RunFolder, done: dict[str, dict[str, Any]], note: str = "") -> str:
    """The page as Markdown. For the arguments see ``main``."""
    figures = stored.read(run.at("evaluate", "metrics.json"), Evaluation)
    provenance = stored.read(run.at("provenance.json"), Provenance)
    day = datetime.datetime.fromtimestamp(done["report"]["finished"], datetime.UTC).date()
    lines = [
        "# What the demo gives",
        "",
        f"Written by `python {launcher('docs', '--demo', f'runs/{Path(run.url).name}')}` from a run of {day}, commit {provenance['commit'][:12]}, on {_processor()}. Do not edit.",
        "",
        "| stage | minutes | throughput |",
        "|---|---:|---|",
    ]
    for name, marker in done.items():
        rate = marker.get("throughput", {"value": "", "unit": ""})
        value = f"{rate['value']:.0f}" if rate["unit"] else ""
        lines.append(f"| {name} | {marker['seconds'] / 60:.1f} | {value} {rate['unit']} |")
    total = sum(marker["seconds"] for marker in done.values()) / 60
    lines += [
        f"| all | {total:.1f} | and about a minute for starting processes |",
        "",
        *([note, ""] if note else []),
        "On validation (held-out concepts):",
        "",
        "| what | goal | reached |",
        "|---|---|---|",
    ]
    goals = [
        ("reconstruction, mean PSNR from true codes", "20 dB", f"{figures['psnr_db']:.1f} dB"),
        ("codes in use", "50 %", f"{100 * figures['code_use']:.0f} %"),
        ("image cross-entropy below the unigram entropy of the codes", "20 %", f"{figures['ce_below_unigram_percent']:.0f} %"),
        ("", "", f"{figures['image_ce_nats']:.3f} against {figures['unigram_entropy_nats']:.3f} nats per code"),
        ("caption gain: shuffled minus right caption", "above 0", f"{figures['caption_gain_nats']:.3f} nats per code"),
        (
            "own picture nearest to a caption, in a batch",
            f"chance {100 * figures['clip_chance']:.0f} %",
            f"{100 * figures['clip_recall_at_1']:.0f} %",
        ),
    ]
    lines += [f"| {what} | {goal} | {reached} |" for what, goal, reached in goals]
    lines += ["", "Held-out drawings, and what 256 codes of 512 keep of them:", "", "![Reconstructions](pictures/demo-reconstructions.png)", ""]
    lines += [
        "Drawn for captions of held-out concepts, then of frequent training concepts; best first:",
        "",
        "![Drawn pictures](pictures/demo-grid.png)",
        "",
    ]
    guidance, dropout = _guidance(run)
    if guidance != 1:
        lines += [f"Drawn with guidance {guidance:g}; {dropout:.0%} of captions were dropped in training.", ""]
    lines += ["Credits:", "", *(f"- {line}" for line in done["prepare"]["summary"]["credits"])]
    return "\n".join(lines) + "\n"


def _guidance(run: RunFolder) -> tuple[float, float]:
    """The guidance scale of the run's pictures, and the fraction of training samples whose caption was dropped."""
    cfg = storage.read_json(run.at("config.json"))
    return cfg["generate"]["guidance"], cfg["dalle_fit"]["caption_dropout"]


def _processor() -> str:
    names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{len(names)} cores of {names[0] if names else platform.machine()}"
