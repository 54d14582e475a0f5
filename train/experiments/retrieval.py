"""Measures whether drawings can be told apart by their captions: ``python -m train.experiments.retrieval RUN [RUN/dalle/export ...] [--guidance 1,2,4]``.

Draws all captions of held-out concepts with every given transformer and guidance, from equal seeds, and lets the run's own contrastive model look for each drawing's
caption among all of them. It may judge, because it has ranked none of these drawings; but it was trained on the same pictures. Intervals and standard errors are by
caption, because drawings of one caption are alike. Gives the figures in docs/small_data.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from infra import storage
from infra.errors import ConfigError, UsageError, in_a_sentence
from infra.run_folder import producer
from train.drawing.draw import draw
from train.drawing.place import locate
from train.drawing.settings import Settings
from train.drawing.source import Models, open_models
from train.evaluation.distances import interval
from train.run.data_inputs import open_images
from train.stages.generate_prompts import held_out
from train.weights.contrastive import Ranker

RANKS = (1, 5, 10)

Hits = NDArray[np.float64]
"""[captions, ranks]: the share of a caption's drawings for which the right caption is among so many first ones."""


def hits(models: Models, judge: Ranker, captions: Sequence[str], settings: Settings) -> Hits:
    """Draw ``settings.n`` pictures of each caption, and look for their captions.

    Raises:
        ConfigError: this model cannot draw with these settings.
    """
    with torch.inference_mode():
        text_ME = torch.cat([judge.encode_caption(caption) for caption in captions])
        above: dict[str, list[int]] = {caption: [] for caption in captions}
        for pictures in draw(models, captions, settings):
            pixels_B3YX = torch.from_numpy(np.stack([picture.pixels_YXC for picture in pictures])).permute(0, 3, 1, 2).float() / 255
            scores_BM = judge.encode_image(pixels_B3YX.to(text_ME.device)) @ text_ME.T
            for picture, scores_M in zip(pictures, scores_BM, strict=True):
                above[picture.caption].append(int((scores_M > scores_M[captions.index(picture.caption)]).sum()))
    return np.array([[np.mean([place < rank for place in above[caption]]) for rank in RANKS] for caption in captions])


def compare(sources: Sequence[str], guidances: Sequence[float], captions: int, settings: Settings) -> dict[str, Any]:
    """Figures of every source and guidance, and each source less the first one.

    Raises:
        ConfigError: a source is of another run than the first, or cannot draw with these settings.
        DataError: a source holds no models.
    """
    place = locate(sources[0])
    if place.run is None or any(locate(source).url != place.url for source in sources):
        raise ConfigError(f"{', '.join(sources)}: give one run folder, and exports in it such as {place.url}/dalle/export.")
    judging = open_models(sources[0], rerank="clip")
    wanted = list(dict.fromkeys(prompt.caption for prompt in held_out(open_images(place.cfg, place.run, "validation"), captions, place.cfg.run.seed)))
    assert judging.clip is not None
    rows, found = [], dict[tuple[str, float], Hits]()
    for source in sources:
        models = open_models(source)
        for guidance in guidances:
            used = Settings(n=settings.n, seed=settings.seed, temperature=settings.temperature, guidance=guidance)
            used.check(models.cfg)
            hits_MR = found[source, guidance] = hits(models, judging.clip, wanted, used)
            row: dict[str, Any] = {"source": source, "weights": models.lineage["dalle"], "guidance": guidance}
            for rank, shares_M, first_M in zip(RANKS, hits_MR.T, found[sources[0], guidance].T, strict=True):
                row[f"recall_at_{rank}"] = float(shares_M.mean())
                row[f"recall_at_{rank}_interval"] = interval(shares_M)
                less_M = shares_M - first_M
                row[f"recall_at_{rank}_less_first"] = [float(less_M.mean()), float(less_M.std(ddof=1) / len(less_M) ** 0.5)]
            rows.append(row)
            print(line(row), flush=True)
    facts = {"captions": len(wanted), "drawings_of_each": settings.n, "seed": settings.seed, "temperature": settings.temperature}
    return facts | {"judge": judging.lineage["clip"], "rows": rows, "producer": producer()}


def line(row: dict[str, Any]) -> str:
    """A row for people, in percent."""
    parts = []
    for rank in RANKS:
        (low, high), (less, error) = row[f"recall_at_{rank}_interval"], row[f"recall_at_{rank}_less_first"]
        beside = f", {100 * less:+.1f} ± {100 * error:.1f}" if less or error else ""
        parts.append(f"R@{rank} {100 * row[f'recall_at_{rank}']:.1f} % ({100 * low:.1f} to {100 * high:.1f}{beside})")
    return f"{row['source']}  guidance {row['guidance']:g}  {'  '.join(parts)}"


def main(arguments: Sequence[str]) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Whether drawings can be told apart by their captions.")
    parser.add_argument("sources", nargs="+", help="a run folder, and exports of transformers in it, such as RUN/dalle/export")
    parser.add_argument("--guidance", default="1,2,4", help="scales, with commas between them")
    parser.add_argument("--captions", type=int, default=1000, help="captions of so many held-out concepts, or of all if there are fewer")
    parser.add_argument("--n", type=int, default=12, help="drawings of each caption")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--out", default="", help="also write the figures to this file")
    given = parser.parse_args(arguments)
    try:
        guidances = [float(word) for word in given.guidance.split(",")]
    except ValueError as error:
        raise UsageError(f"--guidance {given.guidance}: accepted are numbers with commas between them, such as 1,2,4.") from error
    found = compare(given.sources, guidances, given.captions, Settings(n=given.n, seed=given.seed, temperature=given.temperature))
    print(json.dumps({key: value for key, value in found.items() if key != "rows"}))
    if given.out:
        storage.write_json(given.out, found)


if __name__ == "__main__":
    in_a_sentence(main)
