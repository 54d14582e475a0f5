"""The figures of drawn captions, from the features that stage evaluate has kept of them.

Shapes: M captions, V views of a caption's picture (the best of so many candidates, then blurs of the last), D features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.evaluation.class_scores import class_score
from train.evaluation.colours import agreement
from train.evaluation.distances import distances, halves, interval, nearer, recalls

OWN_CLIP = "own clip"
"""Name of the run's own contrastive model, which ranks."""


@dataclass(frozen=True)
class Judge:
    """A network whose features compare drawings with real pictures, and with captions if it has a text tower."""

    name: str
    identity: str
    image: Callable[[Tensor], Tensor]
    """Pictures [B, 3, Y, X] in [0, 1] -> features [B, D]; unit vectors if there is a text tower."""
    text: Callable[[str], Tensor] | None = None
    """A caption -> [1, D]; None if there is no text tower."""
    classes: Callable[[Tensor], Tensor] | None = None
    """Features [B, D] -> logits of classes [B, C], if it has classes."""
    score: str = ""
    """Name of the score that its classes give."""
    ranks: bool = False
    """Whether it has chosen among candidates: then it judges the first candidate only."""
    shares_images: bool = False
    """Whether it was trained on the images that the ranking model was trained on."""


Files = Sequence[Mapping[str, NDArray[Any]]]


def figures(captions: Sequence[str], files: Files, judges: Sequence[Judge], best_of: Sequence[int], blur: Sequence[int], seed: int) -> dict[str, Any]:
    """All figures of drawings that need no training image. ``files`` holds the arrays of each caption, as stage evaluate writes them."""
    found: dict[str, Any] = {"drawings": len(captions), "best_of": list(best_of), "blur": list(blur), "distances": {}, "retrieval": {}, "classes": {}}
    for judge in judges:
        drawn_MVD, real_MVD = (_stacked(files, f"{judge.name}/{name}") for name in ("drawn_VD", "real_VD"))
        facts = {"identity": judge.identity, "trained_on_the_images_of_what_ranks": judge.shares_images or judge.ranks}
        seen = [(place, count) for place, count in enumerate(best_of) if count == 1 or not judge.ranks]
        if len(files) > 1:
            by_n = {str(count): distances(drawn_MVD[:, place], real_MVD[:, 0], seed) for place, count in seen}
            found["distances"][judge.name] = facts | {"by_n": by_n} | _reference(real_MVD[:, 0], seed)
            if not judge.ranks and blur:
                places = [(len(best_of) + place, 1 + place, radius) for place, radius in enumerate(blur)]
                by_blur = {str(radius): distances(drawn_MVD[:, ours], real_MVD[:, theirs], seed) for ours, theirs, radius in places}
                found["distances"][judge.name]["by_blur"] = {"best_of": best_of[-1]} | by_blur
        if judge.classes is not None:
            found["classes"][judge.name] = _class_scores(judge, judge.classes, drawn_MVD, real_MVD, best_of, blur)
        if judge.text is not None:
            text_MD = _stacked(files, f"{judge.name}/text_D")
            found["retrieval"][judge.name] = facts | {
                "chance_at_1": 1 / len(captions),
                "real": _of_captions(real_MVD[:, 0], text_MD),
                "by_n": {str(count): _of_captions(drawn_MVD[:, place], text_MD) for place, count in seen},
            }
    colours_MVK = np.stack([file["colours_VK"] for file in files])
    found["colours"] = {
        "real": agreement(captions, np.stack([file["real_colours_K"] for file in files])),
        "by_n": {str(count): agreement(captions, colours_MVK[:, place]) for place, count in enumerate(best_of)},
    }
    return found


@torch.no_grad()
def _class_scores(
    judge: Judge, classes: Callable[[Tensor], Tensor], drawn_MVD: Tensor, real_MVD: Tensor, best_of: Sequence[int], blur: Sequence[int]
) -> dict[str, Any]:
    """The score of drawings and of the real pictures; over radii of blur for the best of the most candidates. Radius 0 is none."""

    def score(views_MVD: Tensor, place: int) -> float:
        return class_score(classes(views_MVD[:, place]))

    last = len(best_of) - 1
    radii = {str(radius): (last + place, place) for place, radius in enumerate([0, *blur])}
    return {
        "name": judge.score,
        "by_n": {str(count): score(drawn_MVD, place) for place, count in enumerate(best_of)},
        "by_blur": {radius: {"drawn": score(drawn_MVD, ours), "real": score(real_MVD, theirs)} for radius, (ours, theirs) in radii.items()},
    }


def _stacked(files: Files, name: str) -> Tensor:
    return torch.from_numpy(np.stack([file[name] for file in files]))


def _reference(real_MD: Tensor, seed: int) -> dict[str, Any]:
    return {"halves_of_real": halves(real_MD, seed)} if len(real_MD) >= 4 else {}


def _of_captions(image_MD: Tensor, text_MD: Tensor) -> dict[str, Any]:
    """Retrieval, for each caption too, and the mean cosine of picture and caption, beside that with the caption of another picture."""
    cosine_M = (image_MD * text_MD).sum(1)
    shifted_M = (image_MD * text_MD.roll(1, 0)).sum(1)
    nearer_M = nearer(image_MD, text_MD).numpy()
    return recalls(image_MD, text_MD) | {
        "recall_at_1_interval": interval((nearer_M < 1).astype(np.float64)),
        "nearer": nearer_M.tolist(),
        "clip_score": float(cosine_M.mean()),
        "clip_score_of_another_caption": float(shifted_M.mean()),
    }
