"""How surely and how variously a network of classes names pictures: exp(E KL(p(class | picture) || p(class))), from 1 to the number of classes.

With Inception's classes this is the Inception Score; with those of another network it is a score of its own, and only comparable with itself. Shapes: N pictures,
C classes.
"""

from __future__ import annotations

import torch
from torch import Tensor

_OF_EACH, _SPLITS = 5000, 10
"""The published score is the mean over 10 parts of 5,000 pictures. Fewer pictures are one part; the score is then too low, by an amount that depends on their
number."""


def class_score(logits_NC: Tensor) -> float:
    """The score of a set of pictures."""
    parts = max(1, min(_SPLITS, len(logits_NC) // _OF_EACH))
    scores = []
    for part_MC in logits_NC.double().log_softmax(1).tensor_split(parts):
        mean_C = part_MC.exp().mean(0).log()
        scores.append((part_MC.exp() * (part_MC - mean_C)).sum(1).mean().exp())
    return float(torch.stack(scores).mean())
