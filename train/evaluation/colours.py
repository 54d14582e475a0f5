"""Whether a drawing has the colour that its caption names: a check of composition that needs no model. Shapes: Y X rows and columns, K colours, N pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

COLOURS = ("black", "white", "grey", "red", "orange", "brown", "yellow", "green", "blue", "purple", "pink")
_SPELLINGS = {"gray": "grey", "violet": "purple"}
_WORD = re.compile(r"[a-z]+")
_HUES = ((15, "red"), (40, "orange"), (70, "yellow"), (165, "green"), (255, "blue"), (290, "purple"), (345, "pink"), (360, "red"))
"""Up to which hue, in degrees, a saturated and bright pixel has which name."""
_DARK, _BRIGHT, _DULL = 0.2, 0.85, 0.18


def named(caption: str) -> set[str]:
    """The colours that a caption names."""
    return {_SPELLINGS.get(word, word) for word in _WORD.findall(caption.lower())} & set(COLOURS)


def shares(pixels_YXC: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Which share of a picture has which colour, [K]. Each pixel has one: the bounds of hue, saturation and brightness are a choice, equal for all pictures."""
    rgb = pixels_YXC.reshape(-1, 3).astype(np.float64) / 255
    value, low = rgb.max(1), rgb.min(1)
    spread = value - low
    safe = np.where(spread > 0, spread, 1)
    red, green, blue = rgb.T
    sector = np.where(value == red, (green - blue) / safe % 6, np.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4))
    hue, saturation = 60 * sector, spread / np.where(value > 0, value, 1)
    place = np.searchsorted([bound for bound, _ in _HUES], hue, side="right").clip(max=len(_HUES) - 1)
    index = np.array([COLOURS.index(name) for _, name in _HUES])[place]
    index[(hue >= 10) & (hue < 40) & (value < 0.65)] = COLOURS.index("brown")
    index[((hue < 15) | (hue >= 345)) & (saturation < 0.55) & (value > 0.75)] = COLOURS.index("pink")
    dull = saturation < _DULL
    index[dull] = COLOURS.index("grey")
    index[dull & (value > _BRIGHT)] = COLOURS.index("white")
    index[value < _DARK] = COLOURS.index("black")
    return np.bincount(index, minlength=len(COLOURS)) / len(index)


def agreement(captions: Sequence[str], shares_NK: NDArray[np.float64]) -> dict[str, float]:
    """How often a drawing of a caption that names one colour has more of it than a drawing of a caption that does not name it (AUC): 0.5 is chance.

    Returns:
        ``captions``: how many name one colour only; ``agreement``, if there are any and others to compare with; and ``agreement_<colour>``.
    """
    names = [named(caption) for caption in captions]
    found: dict[str, list[float]] = {}
    for place, colours in enumerate(names):
        if len(colours) == 1:
            (colour,) = colours
            others = shares_NK[[colour not in other for other in names], COLOURS.index(colour)]
            if len(others):
                own = shares_NK[place, COLOURS.index(colour)]
                found.setdefault(colour, []).append(float((others < own).mean() + (others == own).mean() / 2))
    every = [value for values in found.values() for value in values]
    out = {"captions": float(len(every))}
    if every:
        out["agreement"] = float(np.mean(every))
        out |= {f"agreement_{colour}": float(np.mean(values)) for colour, values in sorted(found.items())}
    return out
