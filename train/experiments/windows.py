"""Measures how many passes and seconds windows of drafts save with a trained model: ``python -m train.experiments.windows RUN CAPTION ... [--out FILE]``.

Every picture is drawn alone, with each window and the same seeds; the codes must be the same. Gives the figures in docs/drawing.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from infra import storage
from infra.errors import ReportedError
from infra.run_folder import producer
from model.sampling import Drawn, sample
from train.drawing.settings import Settings
from train.drawing.source import Models, open_models
from train.machine.rates import describe_device

WINDOWS = (1, 2, 4, 8, 16)


def compare(models: Models, captions: Sequence[str], settings: Settings, windows: Sequence[int] = WINDOWS) -> dict[str, Any]:
    """For each window, passes and seconds of a picture, averaged over captions; and how many codes it changed, which can be more than none only through rounding.

    Raises:
        ConfigError: this model cannot draw with these settings.
    """
    settings.check(models.cfg)
    rows: dict[int, dict[str, float]] = {}
    plain: list[Drawn] = []
    for window in windows:
        began, drawn = time.perf_counter(), [_draw(models, caption, settings, window) for caption in captions]
        seconds = (time.perf_counter() - began) / len(captions)
        plain = plain or drawn
        changed = sum(int((one.codes_BI != other.codes_BI).sum()) for one, other in zip(drawn, plain, strict=True))
        rows[window] = {"passes": float(np.mean([one.passes for one in drawn])), "seconds": seconds, "changed_codes": changed}
    first = rows[windows[0]]
    for row in rows.values():
        row |= {"fewer_passes": first["passes"] / row["passes"], "less_time": first["seconds"] / row["seconds"]}
    return {
        "captions": list(captions),
        "settings": settings.shape(),
        "weights": models.lineage,
        "precision": models.precision,
        "deterministic": models.is_deterministic,
        "threads": torch.get_num_threads(),
        "device": describe_device(models.device.type),
        "load_at_end": round(os.getloadavg()[0], 1),
        "windows": {str(window): row for window, row in rows.items()},
        "producer": producer(),
    }


def _draw(models: Models, caption: str, settings: Settings, window: int) -> Drawn:
    ids, length = models.tokenizer.encode(caption)
    text_1T = torch.from_numpy(np.asarray(ids))[None].to(models.device)
    return sample(models.weights, text_1T, torch.tensor([length], device=models.device), settings.seeds(caption)[:1], settings.rule, window=window)


def main(arguments: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Passes and seconds that windows of drafts save on a trained model.")
    parser.add_argument("run", help="what launcher.py draw accepts")
    parser.add_argument("captions", nargs="+")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--out", default="", help="also write the figures to this file")
    given = parser.parse_args(arguments)
    try:
        models = open_models(given.run, precision=given.precision)
        fitting = [window for window in WINDOWS if window <= models.cfg.dvae.grid]
        found = compare(models, given.captions, Settings(n=1, guidance=given.guidance), fitting)
    except ReportedError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(json.dumps(found, indent=2, ensure_ascii=False))
    if given.out:
        storage.write_json(given.out, found)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
