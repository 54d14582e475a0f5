"""What ranks never judges: a network that either looks through is not looked through by the other."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from infra.errors import ConfigError

IMAGENET = frozenset({"efficientnet-lite0", "inception-cleanfid", "inception-torch-fidelity"})
"""Networks that were trained on ImageNet: they do not share weights, but the pictures that they have learned from."""


def refuse_shared(key: str, judge: AbstractSet[str], ranker: AbstractSet[str]) -> None:
    """
    Args:
        key: what names the judge, for the message.
        judge: names of the networks that the judge looks through.
        ranker: of those that the model that ranks does.

    Raises:
        ConfigError: they share one.
    """
    shared = sorted(judge & ranker)
    if shared:
        raise ConfigError(
            f"{key}: looks through {' and '.join(shared)}, as the model that ranks the drawings does (clip.towers = 'frozen'), and what ranks never judges; name "
            "a judge of other networks: evaluate.frechet_net = 'inception-cleanfid' or 'inception-torch-fidelity', or evaluate.judge with a model of open_clip or one "
            "of clip.towers = 'own'."
        )


def shares_pictures(judge: AbstractSet[str], ranker: AbstractSet[str]) -> bool:
    """Whether networks of both have learned from the same pictures."""
    return bool(judge & IMAGENET) and bool(ranker & IMAGENET)
