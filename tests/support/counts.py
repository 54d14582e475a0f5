"""Denominators as numbers, for tests that may wait for them."""

import torch

from train.engines.replicated import global_counts


def global_sum(counts: dict[str, int], device: torch.device) -> dict[str, int]:
    """Sum integer counts over ranks: the denominators of an update (docs/contracts.md, section 5)."""
    return {name: int(count) for name, count in global_counts(counts, device).items()}
