"""The warning about a codebook of which few codes are used. Needs no torch, because the report shows it too."""

from __future__ import annotations

from collections.abc import Mapping


def collapse_warning(found: Mapping[str, float], vocab: int, share: float) -> str:
    """The warning for a codebook whose perplexity is less than ``share`` of its number of codes; empty if it is not.

    Args:
        found: perplexity and code_use.
        vocab: number of codes.
        share: dvae_fit.warn_perplexity.
    """
    if found["perplexity"] >= share * vocab:
        return ""
    return (
        f"the codebook collapses: {100 * found['code_use']:.1f} % of {vocab} codes are in use, at a perplexity of {found['perplexity']:.1f} "
        f"(below {100 * share:g} % of the codes, dvae_fit.warn_perplexity). Raise dvae_fit.beta, or lower the temperature more slowly "
        f"(dvae_fit.tau_steps) or the step size (dvae_fit.lr); drawings with flat areas need dvae_fit.min_ln_b."
    )
