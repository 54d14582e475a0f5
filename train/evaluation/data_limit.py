"""Says whether pictures or computing time limit a training of the transformer, in words with numbers. Needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

_MANY_EPOCHS = 4.0
"""Up to so many readings, repeated data was nearly as good as new data (Muennighoff et al. 2023, arXiv 2305.16264)."""
_WIDE_GAP = 0.03
"""From this share of the validation loss on, training loss that is lower counts as learned by heart. A judgement."""
_TRY = (
    "Try more pictures first; then encode.crops=4, dalle_fit.replace_codes=0.1, dalle_fit.weight_decay=0.3 or fewer updates, and compare them by a sweep "
    "(docs/small_data.md)."
)


@dataclass(frozen=True)
class Facts:
    """What is known of a training; None where nothing is."""

    images: int
    """Training pictures."""
    epochs: float
    """How often each is read in the whole training."""
    crops: int = 1
    entropy: float | None = None
    """Entropy of single codes by their frequency, in nats."""
    train: float | None = None
    """Training loss of the image codes, in nats."""
    validation: float | None = None
    is_harder: bool = False
    """Whether training reads other inputs than validation (replaced codes or pieces, dropped captions): then its loss is not comparable."""

    @property
    def gap(self) -> float | None:
        """How much lower the training loss is, as a share of the validation loss."""
        if self.train is None or self.validation is None or self.is_harder or self.validation <= 0:
            return None
        return 1 - self.train / self.validation


def described(facts: Facts) -> str:
    """The verdict, the numbers behind it, and what to try."""
    several = f" in {facts.crops} crops" if facts.crops > 1 else ""
    said = [f"{facts.images:,} training pictures{several}, each read {facts.epochs:.1f} times"]
    if facts.entropy:
        bits, each = math.log2(max(2, facts.images)), facts.entropy / math.log(2)
        said.append(
            f"telling them apart takes log2 {facts.images:,} = {bits:.1f} bits, and a code has {each:.1f}: {math.ceil(bits / each)} codes may identify a picture"
        )
    if facts.gap is not None:
        low = "below" if facts.gap >= 0 else "above"
        said.append(f"the training loss of {facts.train:.3f} nats is {abs(facts.gap):.1%} {low} the validation loss of {facts.validation:.3f}")
    elif facts.is_harder and facts.train is not None:
        said.append("training reads replaced inputs or drops captions, so its loss says nothing beside that of validation")
    return f"{_verdict(facts)} {'; '.join(said)}."


def _verdict(facts: Facts) -> str:
    many, gap = facts.epochs > _MANY_EPOCHS, facts.gap
    if gap is not None and gap >= _WIDE_GAP:
        return f"Data is the limit: the model learns pictures by heart. {_TRY}"
    if many and gap is None:
        return f"Data is likely to be the limit, as pictures are read more than {_MANY_EPOCHS:g} times. {_TRY}"
    if many:
        return f"Data may soon be the limit: pictures are read more than {_MANY_EPOCHS:g} times, though not learned by heart yet. {_TRY}"
    return "Computing time is the limit, not data. Try more updates (dalle_fit.steps) or a larger model."
