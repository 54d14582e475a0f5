"""Compares search with the best of N at equal numbers of computed codes: ``python -m train.experiments.search RUN --captions FILE --out FILE [--n 8,16] [--judge FOLDER]``.

For each caption and N the best picture of either way by the run's contrastive model; its score by that model, which either way tries to raise, and by a judge that
has not ranked: another exported contrastive model of the same tokenizer. Each picture is written to ``--out`` when it is chosen, so the same command goes on after a
stop, and a judge may be named later without a picture being drawn again.
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

from infra import storage, stored
from infra.errors import ConfigError, ReportedError, UsageError
from infra.run_folder import producer
from train.drawing.captions import read_captions
from train.drawing.draw import decode, draw, embeddings, score
from train.drawing.judging import refuse_shared
from train.drawing.place import locate
from train.drawing.settings import Settings
from train.drawing.source import Models, open_judge, open_models
from train.evaluation.distances import recalls

WAYS = {"best_of_n": False, "search": True}


class _Chosen(stored.Stored):
    """The picture that one way chose for a caption."""

    codes: list[int]
    score: float
    seconds: float


class _DrawnWith(stored.Stored):
    """Captions, and the settings and weights on which all pictures depend."""

    captions: list[str]


class _Record(stored.Stored):
    """The content of ``--out``."""

    drawn_with: _DrawnWith
    chosen: dict[str, dict[str, list[_Chosen]]]
    """By N and way, for the first captions."""


def opened(url: str, drawn_with: dict[str, Any]) -> dict[str, Any]:
    """The record at a URL, as far as it has come; an empty one if there is none. It may have more or fewer captions, if they begin alike.

    Raises:
        ConfigError: its pictures were drawn with something else.
    """
    if not storage.exists(url):
        return {"drawn_with": drawn_with, "chosen": {}}
    record = stored.read(url, _Record)
    before, both = record["drawn_with"], min(len(record["drawn_with"]["captions"]), len(drawn_with["captions"]))
    odd = [name for name, value in drawn_with.items() if name != "captions" and before.get(name) != value]
    odd += ["captions"] if before["captions"][:both] != drawn_with["captions"][:both] else []
    if odd:
        raise ConfigError(f"--out {url}: its pictures were drawn with another value of '{odd[0]}'; name another file.")
    return record | {"drawn_with": before if len(before["captions"]) > both else drawn_with}


def choose(models: Models, record: dict[str, Any], captions: Sequence[str], sizes: Sequence[int], settings: Settings, out: str) -> None:
    """Draw and choose what the record lacks, and write it after each picture. Caption by caption, so that a stop leaves both ways equally far."""
    for number, caption in enumerate(captions):
        for n in sizes:
            for name, is_search in WAYS.items():
                found = record["chosen"].setdefault(str(n), {}).setdefault(name, [])
                if len(found) > number:
                    continue
                found.append(_best(models, caption, replace(settings, n=n, search=is_search)))
                storage.write_json(out, record)
                print(f"n = {n}, {name}, caption {number + 1} of {len(captions)}: {found[-1]['seconds']:.1f} s", file=sys.stderr, flush=True)


def _best(models: Models, caption: str, settings: Settings) -> dict[str, Any]:
    began = time.perf_counter()
    pictures = [picture for some in draw(models, [caption], settings) for picture in some]
    scores = score(models, pictures)
    place = int(np.argmax(scores))
    return {"codes": pictures[place].codes_I.tolist(), "score": scores[place], "seconds": time.perf_counter() - began}


def figures(models: Models, judge: Models | None, record: dict[str, Any], captions: Sequence[str], sizes: Sequence[int]) -> dict[str, Any]:
    """The figures of both ways for each N."""
    out: dict[str, Any] = {}
    for n in sizes:
        found: dict[str, Any] = {}
        scores: dict[str, list[float]] = {}
        for name in WAYS:
            chosen = record["chosen"][str(n)][name][: len(captions)]
            found[name] = {
                "seconds": float(np.mean([picture["seconds"] for picture in chosen])),
                "score_by_ranking_model": float(np.mean([picture["score"] for picture in chosen])),
            }
            scores[name] = [picture["score"] for picture in chosen]
            if judge is not None:
                scores[name], judged = _judged(judge, captions, [picture["codes"] for picture in chosen])
                found[name] |= judged
        difference = np.array(scores["search"]) - np.array(scores["best_of_n"])
        found["search_minus_best_of_n"] = {
            "by": "judge" if judge is not None else "ranking_model",
            "mean": float(difference.mean()),
            "standard_error": float(difference.std(ddof=1) / len(difference) ** 0.5),
        }
        out[str(n)] = found
    return out


def _judged(judge: Models, captions: Sequence[str], codes: Sequence[Sequence[int]]) -> tuple[list[float], dict[str, Any]]:
    """The judge's score of each caption's picture, and the figures that it gives."""
    pixels = decode(judge, torch.tensor(codes, device=judge.device))
    pairs = [embeddings(judge, caption, picture) for caption, picture in zip(captions, pixels, strict=True)]
    image_ME, text_ME = (torch.cat(parts).float().cpu() for parts in zip(*pairs, strict=True))
    scores_M = (image_ME * text_ME).sum(1)
    return scores_M.tolist(), {"score_by_judge": float(scores_M.mean())} | recalls(image_ME, text_ME)


def _sizes(words: str) -> list[int]:
    """
    Raises:
        UsageError: these are no numbers of candidates between which a search can choose.
    """
    found = [int(word) for word in words.split(",") if word.strip().isdecimal()]
    if len(found) != len(words.split(",")) or min(found) < 2:
        raise UsageError(f"--n {words}: accepted are numbers from 2 on, with commas between them, such as 8,16.")
    return found


def _run(given: argparse.Namespace) -> dict[str, Any]:
    sizes, captions, settings = _sizes(given.n), read_captions((), given.captions), Settings(guidance=given.guidance)
    if len(captions) < 2:
        raise UsageError(f"--captions {given.captions}: one caption; a comparison takes at least two.")
    storage.check_writable(given.out.rpartition("/")[0] or ".")
    settings.check(locate(given.run).cfg)
    models, judge = open_models(given.run, rerank="clip"), None
    if given.judge:
        clip, identity = open_judge(given.run, given.judge, models.lineage["tokenizer"], models.device)
        if identity == models.lineage["clip"]:
            raise ConfigError(f"--judge {given.judge}: the model that ranks; name another one.")
        assert models.clip is not None
        refuse_shared(f"--judge {given.judge}", clip.networks, models.clip.networks)
        judge = replace(models, clip=clip)
    shape = {name: value for name, value in settings.shape().items() if name != "n"}
    drawn_with = {"captions": captions, "settings": shape, "weights": models.lineage, "precision": models.precision}
    record = opened(given.out, drawn_with)
    choose(models, record, captions, sizes, settings, given.out)
    found = {"by_n": figures(models, judge, record, captions, sizes), "threads": torch.get_num_threads(), "producer": producer()}
    storage.write_json(given.out, record | found)
    return found


def main(arguments: Sequence[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Search against the best of N, at equal numbers of computed codes.")
    parser.add_argument("run", help="what launcher.py draw accepts, with a contrastive model")
    parser.add_argument("--captions", required=True, help="a file with a caption on each line, at least two")
    parser.add_argument("--n", default="8,16", help="numbers of candidates")
    parser.add_argument("--judge", default="", help="folder with another exported contrastive model of the same tokenizer")
    parser.add_argument("--guidance", type=float, default=1.0)
    parser.add_argument("--out", required=True, help="the file of the chosen pictures and of the figures; the same command goes on from it")
    try:
        found = _run(parser.parse_args(arguments))
    except ReportedError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
