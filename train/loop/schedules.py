"""Schedules of the learning rate and of other values, as pure functions of the update's number."""

import math


def half_cosine(step: int, start: float, end: float, steps: int) -> float:
    """From ``start`` at step 0 to ``end`` at ``steps`` along half a period of a cosine, then constant (paper A.2; docs/paper.md 2.8)."""
    if step >= steps:
        return end
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * step / steps))


def linear(step: int, start: float, end: float, steps: int) -> float:
    """From ``start`` at step 0 to ``end`` at ``steps`` along a straight line, then constant."""
    return end if step >= steps else start + (end - start) * step / steps


def warmup(step: int, peak: float, steps: int) -> float:
    """Linear from peak / steps to ``peak``, then constant."""
    return peak * min(1.0, (step + 1) / max(1, steps))


def warmup_cosine(step: int, peak: float, end: float, warmup_steps: int, steps: int) -> float:
    """Linear from peak / warmup_steps to ``peak``, then along half a period of a cosine to ``end`` at ``steps``."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return half_cosine(step - warmup_steps, peak, end, max(1, steps - warmup_steps))
