"""How large DeepSpeed's buckets of gradients are. Without torch, so that `plan` counts them by the same rule."""

from __future__ import annotations

from collections.abc import Iterable


def elements(most: int, reduced: Iterable[int]) -> int:
    """Elements of each bucket. DeepSpeed allocates all of them whole, one size for every dtype, however little there is to reduce; so they are no larger than the
    dtype with most gradients fills. Then everything of a dtype is reduced at once, as in any larger bucket.

    Args:
        most: zero.reduce_bucket_size.
        reduced: elements of the gradients of each dtype in which they travel; empty where they are unknown.
    """
    return min(most, max(reduced, default=most))
