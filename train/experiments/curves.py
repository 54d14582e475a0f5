"""Shows a training of the dVAE as a table of its evaluations: both ELBs, reconstructions and the use of the codebook, while the temperature falls."""

from __future__ import annotations

from typing import Any

from infra import storage, stored
from infra.run_folder import RunFolder
from infra.run_records import Provenance, Summary
from train.config import RunConfig, load_run
from train.loop.metrics import Point, read_metrics
from train.run import places

SERIES = {
    "sched/tau": "tau",
    "eval/elb_true": "ELB, true codes",
    "eval/elb_relaxed": "ELB, relaxed codes",
    "eval/elb_gap": "gap",
    "eval/psnr": "PSNR, dB",
    "eval/ssim": "SSIM",
    "eval/code_use": "codes in use",
    "eval/perplexity": "perplexity",
    "eval/train_dead_codes": "dead codes in training",
}
_ROWS = 12
_NOTE = """The gap is relaxed minus true. It cannot vanish: at any temperature the relaxation draws codes from the encoder's distribution, and the true code is that distribution's most
likely one, so that true codes end up a little better.
"""


def collect(url: str) -> dict[str, Any]:
    """The evaluations of a finished stage dvae, and its settings, without paths of the machine that it ran on.

    Raises:
        DataError: stage prepare or dvae has not finished.
    """
    cfg, run = load_run(url, []), RunFolder(url)
    done = places.require(run, "prepare", "dvae")["dvae"]
    series = {name: points for name, points in read_metrics(url, "dvae").items() if name in SERIES}
    updates = [point.step for point in series["eval/elb_true"]]
    images = stored.read(storage.join(places.images(cfg, run), "summary.json"), Summary)["splits"]["train"]
    provenance = stored.read(run.at("provenance.json"), Provenance)
    return {
        "kind": "curves",
        "name": cfg.run.name,
        "settings": _settings(cfg),
        "images": {"count": images["count"], "licenses": images["licenses"]},
        "minutes": round(done["seconds"] / 60, 1),
        "processes": done["world_size"],
        "updates": updates,
        "series": {name: [_at(series[name], step) for step in updates] for name in SERIES if name in series},
        "producer": {"commit": provenance["commit"]},
    }


def _at(points: list[Point], step: int) -> float | None:
    """The value that was logged last at or before an update, because not at every evaluation something is logged."""
    return next((point.value for point in reversed(points) if point.step <= step), None)


def _settings(cfg: RunConfig) -> dict[str, Any]:
    dvae, fit = cfg.dvae, cfg.dvae_fit
    found: dict[str, Any] = {
        key: getattr(dvae, key) for key in ("image_size", "downsample", "groups", "blocks_per_group", "width", "init_width", "vocab")
    }
    keys = (
        "steps",
        "batch",
        "precision",
        "lr",
        "lr_final",
        "clip_norm",
        "min_ln_b",
        "beta",
        "beta_steps",
        "tau_steps",
        "ema",
        "scale_min",
        "scale_max",
    )
    return found | {key: getattr(fit, key) for key in keys}


def section(found: dict[str, Any]) -> str:
    """The section of the page for one such file, as Markdown."""
    settings = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in sorted(found["settings"].items()))
    total, licenses = found["images"]["count"], sorted(found["images"]["licenses"].items(), key=lambda item: -item[1])
    named = ", ".join(f"{count:,} {name}" for name, count in licenses)
    process = "one process" if found["processes"] == 1 else f"{found['processes']} processes"
    names = [name for name in SERIES if name in found["series"]]
    lines = ["| update | " + " | ".join(SERIES[name] for name in names) + " |", "|---:|" + "---:|" * len(names)]
    for position in _shown(len(found["updates"])):
        values = [found["series"][name][position] for name in names]
        lines.append(f"| {found['updates'][position]:,} | " + " | ".join("–" if value is None else f"{value:.4g}" for value in values) + " |")
    head = f"\n## {found['name']}, as the temperature falls\n\n"
    about = f"{total:,} training images ({named}), {found['minutes']:g} minutes in {process} of a shared machine.\n"
    return f"{head}{about}Settings: {settings}. Commit {found['producer']['commit'][:10]}.\n\n" + "\n".join(lines) + f"\n\n{_NOTE}"


def _shown(count: int) -> list[int]:
    """Which evaluations are shown: the first ones, in which values change most, and evenly spaced ones up to the last."""
    if count <= _ROWS:
        return list(range(count))
    head = _ROWS // 3
    rest = _ROWS - head
    return [*range(head), *(head + round((number + 1) * (count - 1 - head) / rest) for number in range(rest))]
