"""Explains the figures of a run: what a value means, what chance would give, and what to do next. Fixed goals apply to the demo only, for which they were made."""

from __future__ import annotations

import math

from train.config import read_preset
from train.report.view import RunView

GOAL_PSNR_DB = 20.0
GOAL_CODE_USE = 0.5
GOAL_BELOW_UNIGRAM_PERCENT = 20.0
DEMO_CAPTION_GAIN = 0.108
"""The caption gain of the demo in nats per code (docs/demo.md), whose pictures can be looked at. A value to compare with, not a goal."""
_SHAPE = ("image_size", "downsample", "vocab")


def draws_emoji(run: RunView) -> bool:
    """Whether the embedded drawings are the only data."""
    sources = run.section("data").get("sources") or []
    return bool(sources) and all((source.get("url") if isinstance(source, dict) else source) == "emoji" for source in sources)


def has_goals(run: RunView) -> bool:
    """Whether the fixed goals apply to this run: it uses the demo's data, resolution and vocabulary."""
    preset = read_preset("demo")[0]["dvae"]
    return draws_emoji(run) and all(run.section("dvae").get(key) == preset[key] for key in _SHAPE)


def codes(run: RunView) -> int:
    """Number of codes of a picture; 0 if the configuration does not say."""
    size, down = run.section("dvae").get("image_size"), run.section("dvae").get("downsample")
    return (int(size) // int(down)) ** 2 if size and down else 0


def of_psnr(value: float) -> str:
    """What a PSNR of reconstructions means. Drawn pictures cannot be sharper than reconstructions."""
    looks = (
        "shapes and colours at best"
        if value < 18
        else "blurred, small things are lost"
        if value < 23
        else "soft"
        if value < 28
        else "close to the original"
    )
    more = " Next: a longer or wider dVAE (dvae_fit.steps, dvae.width), or less compression (dvae.downsample)." if value < 23 else ""
    return f"{looks}; no drawn picture is sharper than this.{more}"


def of_code_use(value: float) -> str:
    """What a share of used codes means."""
    return "Next: look at the curves below for a collapse; a lower dvae_fit.beta or fewer dvae.vocab." if value < 0.25 else "unused ones do no harm."


def of_below_unigram(percent: float) -> str:
    """What it means that the transformer's image loss is this far below the unigram entropy (guessing codes by their frequency)."""
    next_ = " Next: train the transformer longer (dalle_fit.steps), or on more pictures." if percent < 30 else ""
    return f"0 % would be guessing codes by their frequency alone.{next_}"


def of_caption_gain(value: float, per_picture: int) -> str:
    """What it means that the right caption lowers the loss by this much, compared with a wrong one."""
    total = f"{value * per_picture:.1f} nats for a picture; " if per_picture else ""
    if value <= 0:
        return f"{total}0 is a model that ignores its captions. Next: train longer, and look whether captions describe their pictures."
    if value < DEMO_CAPTION_GAIN / 2:
        return (
            f"{total}0 is a model that ignores its captions, and this is near it (the demo reaches {DEMO_CAPTION_GAIN}). Next: train longer "
            "(dalle_fit.steps), or on more pictures."
        )
    return f"{total}0 is a model that ignores its captions; the demo reaches {DEMO_CAPTION_GAIN}."


def of_retrieval(value: float, chance: float) -> str:
    """What a share of pictures found at first rank means for the reranker."""
    times = value / chance if chance > 0 else math.inf
    return "" if times >= 5 else " Next: train the reranker longer (clip_fit.steps); until then its order of pictures says little."
