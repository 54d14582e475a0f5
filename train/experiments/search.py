"""Compares search with the best of N at equal numbers of computed codes: ``python -m train.experiments.search RUN --captions FILE [--n 8,16] [--judge FOLDER]``.

For each caption and N the best picture of either way by the run's contrastive model; its score by that model, which either way tries to raise, and by a judge that
has not ranked: another exported contrastive model of the same tokenizer.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from infra import storage
from infra.errors import ConfigError, ReportedError
from infra.run_folder import producer
from train.drawing.captions import read_captions
from train.drawing.draw import Picture, draw, embeddings, score
from train.drawing.settings import Settings
from train.drawing.source import Models, open_judge, open_models
from train.evaluation.distances import recalls


def compare(models: Models, judge: Models | None, captions: Sequence[str], sizes: Sequence[int], settings: Settings) -> dict[str, Any]:
    """The figures of both ways for each N."""
    out: dict[str, Any] = {}
    for n in sizes:
        found = {}
        for name, is_search in (("best_of_n", False), ("search", True)):
            began = time.perf_counter()
            best = [_best(models, caption, replace(settings, n=n, search=is_search)) for caption in captions]
            seconds = (time.perf_counter() - began) / len(captions)
            found[name] = {"seconds": seconds} | _judged(best, models, judge)
        by = "judge" if judge is not None else "ranking_model"
        difference = np.array(found["search"].pop("scores")) - np.array(found["best_of_n"].pop("scores"))
        found["search_minus_best_of_n"] = {
            "by": by,
            "mean": float(difference.mean()),
            "standard_error": float(difference.std(ddof=1) / len(difference) ** 0.5),
        }
        out[str(n)] = found
    return out


def _best(models: Models, caption: str, settings: Settings) -> tuple[Picture, float]:
    pictures = [picture for some in draw(models, [caption], settings) for picture in some]
    scores = score(models, pictures)
    place = int(np.argmax(scores))
    return pictures[place], scores[place]


def _judged(best: Sequence[tuple[Picture, float]], models: Models, judge: Models | None) -> dict[str, Any]:
    ranked = [worth for _, worth in best]
    found: dict[str, Any] = {"score_by_ranking_model": float(np.mean(ranked)), "scores": ranked}
    if judge is not None:
        pairs = [embeddings(judge, picture.caption, picture.pixels_YXC) for picture, _ in best]
        image_ME, text_ME = (torch.cat(parts).float().cpu() for parts in zip(*pairs, strict=True))
        scores_M = (image_ME * text_ME).sum(1)
        found |= {"score_by_judge": float(scores_M.mean()), "scores": scores_M.tolist()} | recalls(image_ME, text_ME)
    return found


def main(arguments: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Search against the best of N, at equal numbers of computed codes.")
    parser.add_argument("run", help="what launcher.py draw accepts, with a contrastive model")
    parser.add_argument("--captions", required=True, help="a file with a caption on each line, at least two")
    parser.add_argument("--n", default="8,16", help="numbers of candidates")
    parser.add_argument("--judge", default="", help="folder with another exported contrastive model of the same tokenizer")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--out", default="", help="also write the figures to this file")
    given = parser.parse_args(arguments)
    try:
        models, judge = open_models(given.run, rerank="clip"), None
        if given.judge:
            clip, identity = open_judge(given.run, given.judge, models.lineage["tokenizer"], models.device)
            if identity == models.lineage["clip"]:
                raise ConfigError(f"--judge {given.judge}: the model that ranks; name another one.")
            judge = replace(models, clip=clip)
        captions = read_captions((), given.captions)
        settings = Settings(guidance=given.guidance)
        rows = compare(models, judge, captions, [int(word) for word in given.n.split(",")], settings)
    except ReportedError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    facts = {
        "captions": len(captions),
        "guidance": given.guidance,
        "weights": models.lineage,
        "threads": torch.get_num_threads(),
        "producer": producer(),
    }
    print(json.dumps({"by_n": rows} | facts, indent=2))
    if given.out:
        storage.write_json(given.out, {"by_n": rows} | facts)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
