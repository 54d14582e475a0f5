"""A run folder as if all stages had finished, for the report."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from train.config import RunConfig
from train.report.images import grid_png, png_bytes
from train.run.stage_table import STAGES

Draw = Callable[[int], np.ndarray]


def disc(number: int, side: int = 32) -> np.ndarray:
    """A coloured disc on white: uint8 [side, side, 3]."""
    y, x = np.mgrid[:side, :side] - side / 2
    colour = np.random.default_rng(number).integers(0, 200, 3)
    inside = (x**2 + y**2 < (side * (0.25 + 0.02 * (number % 7))) ** 2)[..., None]
    return np.where(inside, colour, 255).astype(np.uint8)


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_metrics(run: Path, stage: str, steps: int, every: int, values: Callable[[int], dict[str, float]]) -> None:
    path = run / stage / "metrics" / "attempt-0.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"step": s, "time": float(s), "values": values(s)}) + "\n" for s in range(every, steps + 1, every)))


def fake_run(
    run: Path, draw: Draw = disc, captions: tuple[str, ...] = ("a flat emoji of a red apple", "an outlined drawing of a <b>dog</b>")
) -> Path:
    """A finished run of the demo, with curves that look like curves."""
    config = RunConfig.model_validate({"run": {"name": "demo"}}).model_dump(mode="json")
    config["dvae"] |= {"image_size": 64, "downsample": 4, "vocab": 512}
    config["dvae_fit"] |= {"steps": 1500, "batch": 32}
    config["dalle_fit"] |= {"steps": 2000, "batch": 32}
    config["align_fit"] |= {"steps": 50}
    config["clip_fit"] |= {"steps": 500, "batch": 64}
    config["generate"] |= {"show": 3, "candidates": 8}
    write_json(run / "config.json", config)
    write_json(run / "provenance.json", {"commit": "4fe81a0c" * 5, "versions": {"torch": "2.15.0"}, "created": 1735689600.0})
    done: dict[str, Any] = {
        stage: {"stage": stage, "seconds": 11.0 * i + 5, "world_size": 2, "commit": "4fe81a0c", "summary": {}} for i, stage in enumerate(STAGES)
    }
    done["prepare"]["summary"] = {
        "splits": {"train": 7612, "validation": 401},
        "sources": {"emoji": 8013},
        "dropped": {
            "duplicate": {"count": 31, "examples": [{"id": f"u1f46{i}", "why": "same bytes as u1f400"} for i in range(7)]},
            "too <small>": {"count": 2, "examples": [{"id": "x", "why": "12 x <b>9</b> pixels"}]},
        },
        "dropped_captions": {"not English": 412, "too short": 5},
        "quarantined": [{"shard": "train-<0>.tar", "reason": "truncated after 3 members", "tries": 3}],
        "groups": {"train": 3500, "validation": 184},
        "credits": ["Twemoji, © Twitter, Inc. and contributors, CC-BY 4.0", "OpenMoji, CC-BY-SA 4.0 <script>alert(1)</script>"],
    }
    done["tokenizer"]["summary"] = {"captions": 40065, "content_hash": "67d5ece3", "settings": {"vocab": 400}}
    done["dvae"] |= {"seconds": 312.0, "throughput": {"value": 153.7, "unit": "images/s"}}
    done["dalle"] |= {"seconds": 401.0, "throughput": {"value": 41000.0, "unit": "tokens/s"}}
    for stage, what in done.items():
        write_json(run / stage / "done.json", what)
    _fake_metrics(run)
    _fake_pictures(run, draw, captions)
    return run


def _fake_metrics(run: Path) -> None:
    rng = np.random.default_rng(0)

    def falling(step: int, top: float, low: float, scale: float, noise: float = 0.02) -> float:
        return low + (top - low) * math.exp(-step / scale) + noise * float(rng.standard_normal())

    def dvae(step: int) -> dict[str, float]:
        values = {"train/loss": falling(step, 0.2, -1.4, 300), "train/nll": falling(step, 0.1, -1.6, 300), "train/kl": falling(step, 5, 2, 300)}
        values |= {"optim/lr": 1e-3 * (1 - step / 1600), "optim/grad_norm": math.exp(falling(step, 1, -1, 200, 0.2)), "perf/images_per_s": 150.0}
        values |= {"sched/tau": 1 - 0.9 * step / 1500, "sched/beta": 3.0, "data/wait_s": 0.001}
        if step % 300 == 0:
            values |= {"eval/psnr": 21 - 8 * math.exp(-step / 500), "eval/psnr_relaxed": 22 - 8 * math.exp(-step / 500), "eval/code_use": 0.62}
            values |= {"eval/perplexity": 150.0, "eval/nll_true": falling(step, 0.1, -1.5, 300), "eval/nll_relaxed": falling(step, 0.1, -1.6, 300)}
        return values

    def dalle(step: int) -> dict[str, float]:
        image = falling(step, 6.2, 2.6, 350, 0.05)
        values = {"train/loss": image, "train/loss_text": falling(step, 7, 1, 200, 0.05), "train/loss_image": image, "perf/tokens_per_s": 41e3}
        if step % 400 == 0:
            values |= {"eval/loss_image": image + 0.1, "eval/loss_image_shuffled": image + 0.18, "eval/caption_gain": 0.08, "eval/loss_text": 1.3}
        return values

    write_metrics(run, "dvae", 1500, 10, dvae)
    write_metrics(run, "dalle", 2000, 10, dalle)
    write_metrics(run, "clip", 500, 10, lambda s: {"train/loss": falling(s, 4, 1, 100), "eval/loss": 2.0, "eval/recall_at_1": 0.2})
    metrics = {
        "psnr_db": 20.7,
        "psnr_relaxed_db": 21.2,
        "code_use": 0.62,
        "code_perplexity": 151.0,
        "unigram_entropy_nats": 3.61,
        "image_ce_nats": 2.7,
    }
    metrics |= {"image_ce_shuffled_nats": 2.78, "caption_gain_nats": 0.081, "ce_below_unigram_percent": 25.2, "text_ce_nats": 1.3, "samples": 401}
    write_json(run / "evaluate/metrics.json", metrics | {"clip_recall_at_1": 0.21, "clip_chance": 0.0025})


def _fake_pictures(run: Path, draw: Draw, captions: tuple[str, ...]) -> None:
    pictures = run / "dvae" / "pictures"
    pictures.mkdir(parents=True)
    originals = [draw(i) for i in range(12)]
    rows = [originals, originals, [picture // 2 + 64 for picture in originals]]
    (pictures / "reconstructions.png").write_bytes(grid_png(rows, labels=("original", "from its codes", "relaxed")))
    counts = [int(40_000 / (rank + 3) ** 1.1) for rank in range(317)] + [0] * 195
    write_json(pictures / "codebook.json", {"counts": counts, "samples": 401})
    index: dict[str, Any] = {"captions": [], "temperature": 1.0, "checkpoint": "step-00002000"}
    (run / "generate" / "pictures").mkdir(parents=True)
    for number, caption in enumerate(captions):
        entry: dict[str, Any] = {"caption": caption, "id": f"id-{number}", "truth": f"generate/pictures/{number}-truth.png", "pictures": []}
        (run / entry["truth"]).write_bytes(png_bytes(draw(10 * number)))
        for k in range(4):
            names = [f"generate/pictures/{number}-{k}.png", f"generate/pictures/{number}-{k}-nearest.png"]
            for j, name in enumerate(names):
                (run / name).write_bytes(png_bytes(draw(10 * number + k + j)))
            nearest = {"id": f"near-{number}-{k}", "file": names[1], "distance": 0.1 * k + 0.034}
            entry["pictures"].append({"file": names[0], "score": 0.2 + 0.01 * k, "seed": k, "nearest": nearest})
        index["captions"].append(entry)
    write_json(run / "generate" / "index.json", index)
