"""The settings of drawing: everything except the caption on which a picture depends, and the sizes of batches and windows. Needs no model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

from infra.errors import ConfigError
from infra.seeds import derive
from model.sampling import Rule
from train.config import RunConfig

Fit = Literal["crop", "letterbox"]
MOST_PICTURES = 1 << 16
"""Most pictures of a caption, and of a batch."""


@dataclass(frozen=True)
class Settings:
    """Everything that can be set for drawing, except captions."""

    n: int = 4
    """Number of pictures for each caption."""
    seed: int = 0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    guidance: float = 1.0
    keep_rows: int | None = None
    """Rows of codes that are taken from a given image; None: 15 of 32 (paper 2.9), or none without an image."""
    fit: Fit = "crop"
    """How a given image is made square."""
    batch: int = 0
    """Number of pictures that are drawn together; 0: as many as memory allows."""
    window: int = 0
    """Number of codes of a picture that a pass computes; 0: chosen for the device."""
    search: bool = False
    """Whether half of the candidates are replaced by branches of the others, at one and at two thirds of their rows (train/drawing/search.py)."""

    @property
    def rule(self) -> Rule:
        return Rule(self.temperature, self.top_k, self.top_p, self.guidance)

    def check(self, cfg: RunConfig) -> None:
        """
        Raises:
            ConfigError: this model cannot draw with one of the settings. The message names it, and what is accepted.
        """
        try:
            self.rule.check(cfg.stream_shape())
        except ValueError as error:
            raise ConfigError(f"{error}.") from error
        if not 1 <= self.n <= MOST_PICTURES or not 0 <= self.batch <= MOST_PICTURES or self.seed < 0:
            raise ConfigError(
                f"n = {self.n}, batch = {self.batch}, seed = {self.seed}: accepted are n from 1 to {MOST_PICTURES}, batch from 0 to {MOST_PICTURES}, and seed "
                "from 0."
            )
        if not 0 <= self.window <= cfg.dvae.grid:
            raise ConfigError(f"window = {self.window}: accepted are 0 (by the device) to {cfg.dvae.grid}, a row of codes.")
        if self.guidance != 1 and not cfg.dalle_fit.caption_dropout:
            raise ConfigError(
                f"guidance = {self.guidance}: this model was trained with dalle_fit.caption_dropout = 0, and never saw a picture without its caption; "
                "draw with guidance 1, or train one with dalle_fit.caption_dropout=0.1."
            )
        if self.keep_rows is not None and not 1 <= self.keep_rows < cfg.dvae.grid:
            raise ConfigError(f"keep_rows = {self.keep_rows}: accepted are 1 to {cfg.dvae.grid - 1} of the picture's {cfg.dvae.grid} rows of codes.")
        if self.fit not in ("crop", "letterbox"):
            raise ConfigError(f"fit '{self.fit}': accepted are crop (the central square) and letterbox (all of it, on white).")

    def check_search(self, is_ranked: bool) -> None:
        """
        Raises:
            ConfigError: a search has nothing that ranks, or a single candidate.
        """
        if self.search and (not is_ranked or self.n < 2):
            raise ConfigError(
                f"search with n = {self.n} and rerank {'clip' if is_ranked else 'none'}: it needs --rerank clip and at least 2 candidates."
            )

    def seeds(self, caption: str) -> list[int]:
        """The seed of each candidate, which depends only on (seed, caption, candidate)."""
        return [derive(self.seed, "sample", caption, candidate) for candidate in range(self.n)]

    def shape(self) -> dict[str, Any]:
        """The settings that decide which picture is drawn. Batches and windows do not."""
        names = ("n", "seed", "temperature", "top_k", "top_p", "guidance")
        return {name: getattr(self, name) for name in names} | ({"search": True} if self.search else {})


def key(caption: str, settings: Settings, lineage: dict[str, str], prefix: list[int], reranker: str, **more: Any) -> str:
    """Digest of everything on which a drawing depends. It names the drawing's folder, so other values give other folders."""
    words = [caption, settings.shape(), sorted(lineage.items()), prefix, reranker, more]
    return hashlib.sha256(json.dumps(words, sort_keys=True).encode()).hexdigest()


def of_stage(cfg: RunConfig) -> Settings:
    """The settings of section [generate]."""
    section = cfg.generate
    return Settings(
        n=section.candidates,
        seed=cfg.run.seed,
        temperature=section.temperature,
        top_k=section.top_k or None,
        top_p=section.top_p if section.top_p < 1 else None,
        guidance=section.guidance,
        batch=section.batch,
        window=section.window,
        search=section.search,
    )


def replaced(settings: Settings, **values: Any) -> Settings:
    """The settings with other values.

    Raises:
        ConfigError: there is no such setting.
    """
    names = [field.name for field in dataclasses.fields(Settings)]
    odd = sorted(set(values) - set(names))
    if odd:
        raise ConfigError(f"'{odd[0]}' is not a setting of drawing; accepted: {', '.join(names)}.")
    return dataclasses.replace(settings, **values)
