"""Judges a training of a sweep by its drawings: stage evaluate in its folder, and the figures of it that the sweep keeps (docs/evaluation.md).

The contrastive model is that of the run that the sweep is about, so all arms are ranked and judged by the same one. It judges first candidates only, which it has not
ranked; the best of several are judged by the networks that ``evaluate.frechet_net`` and ``evaluate.judge`` name.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from infra import storage
from infra.run_folder import RunFolder
from train.config import RunConfig
from train.evaluation.drawings import OWN_CLIP
from train.experiments import peer
from train.run import places

RANKS = (1, 10)
_OF_PICTURES = ("psnr_db", "code_use", "code_perplexity")
"""Figures of stage evaluate that say what codes keep of a picture, and how many are used."""


def measure(cfg: RunConfig, run: RunFolder, place: RunFolder, captions: int, cores: int) -> dict[str, Any]:
    """Draw held-out captions with the models of ``place``, measure the drawings, and return the figures that the sweep keeps.

    Args:
        cfg: of the arm; its sections generate and evaluate say how to draw and who judges.
        run: whose images and contrastive model are used, and whose dVAE if ``place`` has none of its own.

    Raises:
        SystemExit: stage evaluate failed; the exit code is that of the stage.
    """
    for stage in ("clip", *(() if place.done("dvae") else ("dvae",))):
        _take(stage, run, place)
    peer.run_stage("evaluate", place.url, [f"evaluate.drawings={captions}", f'data.images="{places.images(cfg, run)}"'], cores)
    found, of_pictures = (storage.read_json(place.at("evaluate", f"{name}.json")) for name in ("drawings", "metrics"))
    retrieval = {
        judge: {
            count: {key: values[key] for key in (*(f"recall_at_{k}" for k in RANKS), "recall_at_1_interval")}
            for count, values in part["by_n"].items()
        }
        for judge, part in found["retrieval"].items()
    }
    distances = {
        judge: {
            "by_n": {count: values["mmd2"] for count, values in part["by_n"].items()},
            "halves_of_real": part.get("halves_of_real", {}).get("mmd2"),
        }
        for judge, part in found["distances"].items()
    }
    return {"captions": found["drawings"], "retrieval": retrieval, "mmd2": distances} | {key: of_pictures[key] for key in _OF_PICTURES}


def _take(stage: str, run: RunFolder, place: RunFolder) -> None:
    """Copy what a stage of ``run`` has exported, its mark last."""
    for name in storage.list_files(run.at(stage, "export")):
        storage.write_bytes(place.at(stage, "export", name), storage.read_bytes(run.at(stage, "export", name)))
    storage.write_bytes(place.at(stage, "done.json"), storage.read_bytes(run.at(stage, "done.json")))


def over(place: RunFolder, base: RunFolder) -> dict[str, tuple[float, float]]:
    """For each k, R@k of the drawings of ``place`` less that of ``base`` and its standard error, caption by caption, by the model that ranks, unranked. Nothing
    if the figures of one are gone, or they drew other captions."""
    files = [one.at("evaluate", "drawings.json") for one in (place, base)]
    if not all(storage.exists(file) for file in files):
        return {}
    mine, its = (storage.read_json(file) for file in files)
    if mine["captions_hash"] != its["captions_hash"]:
        return {}
    nearer_2M = [np.array(found["retrieval"][OWN_CLIP]["by_n"]["1"]["nearer"]) for found in (mine, its)]
    return {f"recall_at_{k}": _paired((nearer_2M[0] < k).astype(float) - (nearer_2M[1] < k)) for k in RANKS}


def _paired(less_M: np.ndarray[Any, np.dtype[np.float64]]) -> tuple[float, float]:
    return float(less_M.mean()), float(less_M.std(ddof=1) / len(less_M) ** 0.5)
