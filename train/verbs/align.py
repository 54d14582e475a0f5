"""``launcher.py align RUN``: a new run beside a trained one, whose transformer is fine-tuned by contrasting captions (docs/small_data.md).

It has the trained run's configuration but for the schedule below, shares what the stages before the transformer wrote, and starts from the trained run's export.
"""

from __future__ import annotations

import json
import math
import os
import shlex
from pathlib import Path

from infra import scratch, storage
from infra.commands import launcher
from infra.errors import ConfigError, DataError
from infra.run_folder import RunFolder
from train.config import DalleFit, load_run
from train.run import places
from train.run.stage_table import STAGES

SHARE = 0.01
"""Of the computing time of the trained run's updates, as in the paper (1 % of its epochs)."""
FEWEST = 50
"""Updates: fewer say nothing, however short the training was."""
_COST = 8 / 3
"""Of an update, in updates of the same batch by likelihood: train/planning/flops.py."""
_OF_TRANSFORMER = ("dalle", "generate", "evaluate", "report")
"""Stages that begin anew."""
_CHECKPOINTS = "checkpoints/"
"""Not shared: nothing before the transformer is trained further."""


def schedule(fit: DalleFit) -> list[str]:
    """The preset: overrides of a trained run's configuration. Keys of [dalle_fit] that are not named stay what they were."""
    steps = max(FEWEST, math.ceil(SHARE * fit.steps / _COST))
    values = {
        "steps": steps,
        "schedule": "cosine",
        "lr": float(f"{fit.lr / 10:.6g}"),
        "lr_final": 0.0,
        "warmup_steps": max(1, steps // 10),
        "weight_decay": 0.0,  # decay would pull away from the frozen weights
        # The average spans all updates, so that more than a third of it is the start: likelihood is kept better than with fewer updates or smaller ones.
        "ema": 0.98,
        "ema_every": max(1, steps // 50),
        "contrast_lambda": 0.5,
        "z_loss": 0.0,
        "replace_codes": 0.0,
        "replace_pieces": 0.0,
        "log_every": max(1, min(fit.log_every, steps // 25)),
        "eval_every": steps,
        "save_every": max(1, min(fit.save_every, steps // 2)),
        "keep_every": 0,
        "on_change": "recomputed",
    }
    return [f"dalle_fit.{key}={json.dumps(value)}" for key, value in values.items()]


def prepared(url: str, overrides: list[str], name: str, *, dry_run: bool) -> tuple[str, list[str]]:
    """Make the new run, and return the words with which ``launcher.py demo`` trains it; without a trace with ``dry_run``.

    Args:
        url: the trained run's folder.
        overrides: further values, which win.
        name: the new run's; empty: the trained one's with '-aligned'.

    Raises:
        ConfigError: the new run is the old one, or its folder holds a run with another configuration.
        DataError: there is no run, or it has no exported transformer.
    """
    source = RunFolder(url)
    if source.stored() is None:
        raise DataError(f"{url}: no run folder (it has no config.json); give the folder of a trained run.")
    begin = source.at("dalle", "export")
    if not storage.exists(storage.join(begin, "config.json")):
        raise DataError(
            f"{url} has no trained transformer to begin with; run '{launcher('dalle', url)}', or of one under way '{launcher('export', url)}'."
        )
    given = load_run(url, [])
    name = name or f"{given.run.name}-aligned"
    words = [
        f"run.name={json.dumps(name)}",
        f"dalle_fit.init_from={json.dumps(begin)}",
        "dalle_fit.objective=caption_contrast",
        *schedule(given.dalle_fit),
    ]
    words += overrides
    cfg = load_run(url, words)
    target = places.run_folder(cfg)
    if storage.absolute(target.url) == storage.absolute(source.url):
        raise ConfigError(f"--name {name}: the new run would be {url} itself; give another name.")
    if dry_run:
        return url, words
    places.claim(cfg, target, shlex.join(["python", "launcher.py", "align", url, *overrides]))
    for stage in STAGES:
        if stage not in _OF_TRANSFORMER:
            _share(source, target, stage)
    print(f"{target.url}: begins with {begin}; {cfg.dalle_fit.steps} updates contrast captions", flush=True)
    return target.url, []


def _share(source: RunFolder, target: RunFolder, stage: str) -> None:
    """Give the new run what a finished stage wrote, its marker last."""
    if source.done(stage) is None or target.done(stage) is not None:
        return
    folders = dict.fromkeys([*(made.partition("/")[0] for made in STAGES[stage].makes), stage])
    names = [f"{folder}/{name}" for folder in folders for name in storage.list_files(source.at(folder)) if not name.startswith(_CHECKPOINTS)]
    marker = f"{stage}/done.json"
    for name in sorted(names, key=lambda name: name == marker):
        _copy(source.at(name), target.at(name))


def _copy(source: str, target: str) -> None:
    """By a hard link where that is possible, else by its bytes."""
    if storage.is_remote(source):
        with scratch.folder("align-") as room:
            storage.download_file(source, Path(room, "file"))
            storage.upload_file(Path(room, "file"), target)
        return
    place = storage.local_path(target)
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(storage.local_path(source), place)
    except FileExistsError:
        return  # from a command that was killed
    except OSError:
        storage.upload_file(storage.local_path(source), target)
