"""Counter-based randomness: every (seed, purpose, counters) has a seed of its own, so no generator state is carried along (docs/contracts.md, section 2)."""

import hashlib
from typing import Literal

import numpy as np

Purpose = Literal[
    "split", "crop", "mirror", "view", "caption", "gumbel", "bpe", "caption_dropout", "replace", "sample", "init", "order", "evaluate", "compression"
]


def derive(seed: int, purpose: Purpose, *counters: int | str) -> int:
    """A 63-bit seed from a run's seed, a purpose and any counters (epoch or step, sample id). Equal inputs give the same seed on every machine."""
    words = "\x1f".join([str(seed), purpose, *(f"{type(c).__name__}:{c}" for c in counters)])
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, purpose: Purpose, *counters: int | str) -> np.random.Generator:
    """A fresh NumPy generator (Philox) for one sample and purpose."""
    return np.random.Generator(np.random.Philox(derive(seed, purpose, *counters)))
