"""Filters: pure functions from a pair to the reason why it is dropped, or None. They run in this order, cheapest first."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

from data_pipeline.images import Pixels, decode
from data_pipeline.pairs import Pair
from infra.errors import DataError

MAX_ASPECT = 2.0
"""Images with a longer side above this multiple of the shorter one are dropped (paper, section 3.1: aspect ratios in [1/2, 2])."""


@dataclass
class Candidate:
    """A pair on its way through the filters. Decoding is left to the first filter that needs pixels."""

    pair: Pair
    min_side: int
    seen: set[tuple[bytes, tuple[str, ...]]]
    """Hashes and captions of what this part has accepted already."""
    pixels: Pixels | None = field(default=None, repr=False)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels, after decoding."""
        assert self.pixels is not None, "size is asked for before undecodable() ran"
        return self.pixels.shape[1], self.pixels.shape[0]


def empty_caption(candidate: Candidate) -> str | None:
    """No caption with a visible character."""
    return None if any(caption.strip() for caption in candidate.pair.captions) else "empty caption"


def exact_duplicate(candidate: Candidate) -> str | None:
    """The same file under the same captions was accepted earlier in this part."""
    return "exact duplicate" if duplicate_key(candidate.pair) in candidate.seen else None


def undecodable(candidate: Candidate) -> str | None:
    """The image is damaged, of an unknown format, or a decompression bomb. Leaves the pixels on the candidate."""
    try:
        candidate.pixels = decode(candidate.pair.image)
    except DataError:
        return "undecodable image"
    return None


def too_small(candidate: Candidate) -> str | None:
    """The shorter side has fewer than ``min_side`` pixels."""
    return "image too small" if min(candidate.size) < candidate.min_side else None


def aspect_ratio(candidate: Candidate) -> str | None:
    """The longer side is more than twice the shorter one."""
    return "aspect ratio" if max(candidate.size) > MAX_ASPECT * min(candidate.size) else None


FILTERS: tuple[Callable[[Candidate], str | None], ...] = (empty_caption, exact_duplicate, undecodable, too_small, aspect_ratio)


def duplicate_key(pair: Pair) -> tuple[bytes, tuple[str, ...]]:
    """What makes two pairs the same: image bytes (hashed) and captions."""
    return hashlib.blake2b(pair.image, digest_size=16).digest(), pair.captions


def first_reason(candidate: Candidate) -> str | None:
    """Run all filters; the first reason, or None for a pair to keep (which is then remembered as seen)."""
    for check in FILTERS:
        reason = check(candidate)
        if reason is not None:
            return reason
    candidate.seen.add(duplicate_key(candidate.pair))
    return None
