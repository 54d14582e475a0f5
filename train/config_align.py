"""Keys of stage align, which contrasts captions after the transformer was trained (docs/small_data.md): section align_fit. No torch."""

from __future__ import annotations

import math
from typing import Literal, TypeVar

from pydantic import BaseModel, Field

from infra.config_keys import ANY_TIME, GOING_ON
from train.config_watching import WatchingSection

F = TypeVar("F", bound=BaseModel)

_SHARE = 0.01
"""Of the operations of stage dalle's updates, as in the paper (1 % of its epochs)."""
_FEWEST = 50
"""Updates: fewer say nothing, however short the training was."""
CONTRAST_COST = 8 / 3
"""Of an update, in updates of the same batch by likelihood: train/planning/flops.py."""
_PASSES = 50
"""How often the weights of stage align are copied into their average: with a decay of 0.98, more than a third of it then are the weights that the stage began
with, which keeps more of the likelihood than fewer updates or smaller steps do."""


def key(stage: str, name: str) -> str:
    """What sets a value of a stage that trains: a key of its own section, or of section dalle_fit for what section align_fit does not name."""
    return f"dalle_fit.{name}" if stage == "align" and name not in AlignFit.model_fields else f"{stage}_fit.{name}"


def usual_steps(updates: int) -> int:
    """Updates of stage align, after so many of stage dalle."""
    return max(_FEWEST, math.ceil(_SHARE * updates / CONTRAST_COST))


class AlignFit(WatchingSection):
    """Fine-tuning of the trained transformer by contrasting captions. What is not named here is as in section dalle_fit."""

    steps: int = Field(default=0, ge=0, json_schema_extra=GOING_ON)
    """Optimizer updates; 0: the run has no stage align, and draws with what stage dalle trained. 'launcher.py align RUN' takes about a hundredth of the operations
    of dalle_fit.steps, and at least 50."""
    on_change: Literal["recomputed", "kept", "restarted"] = Field(default="recomputed", json_schema_extra=ANY_TIME)
    """As dalle_fit.on_change."""
    batch: int = Field(default=0, ge=0, json_schema_extra=GOING_ON)
    """Pictures per update, each of which is computed under two captions; 0: dalle_fit.batch."""
    accumulation: int = Field(default=0, ge=0, json_schema_extra=ANY_TIME)
    """Micro-batches per update and process; 0: dalle_fit.accumulation. Activations take twice the memory of stage dalle's."""
    lr: float = Field(default=0.0, ge=0, json_schema_extra=GOING_ON)
    """Peak step size, brought to 0 by half a cosine; 0: a tenth of dalle_fit.lr."""
    warmup_steps: int = Field(default=0, ge=0, json_schema_extra=GOING_ON)
    """Updates of linear warm-up; 0: a tenth of steps, 1: none."""
    weight_decay: float = Field(default=0.0, ge=0, json_schema_extra=GOING_ON)
    """Decoupled weight decay, which would pull away from the weights that the stage began with."""
    contrast_beta: float = Field(default=0.02, gt=0, json_schema_extra=GOING_ON)
    """As dalle_fit.contrast_beta."""
    contrast_lambda: float = Field(default=0.5, ge=0, json_schema_extra=GOING_ON)
    """As dalle_fit.contrast_lambda: the less, the more of the likelihood is kept, and the less captions come to count."""
    ema: float = Field(default=0.98, ge=0, lt=1, json_schema_extra=GOING_ON)
    """Decay of the iterate average."""
    ema_every: int = Field(default=0, ge=0, json_schema_extra=GOING_ON)
    """Updates between copies into the iterate average; 0: a fiftieth of steps."""
    eval_every: int = Field(default=0, ge=0, json_schema_extra=ANY_TIME)
    """Updates between evaluations on the validation split; 0: only after the last update, of the weights before and after."""
    save_every: int = Field(default=0, ge=0, json_schema_extra=ANY_TIME)
    """Updates between checkpoints; 0: dalle_fit.save_every, or half of steps if that is less."""

    def contrasting(self, fit: F, begin: str) -> F:
        """Section dalle_fit as stage align trains with it.

        Args:
            begin: the export that it begins with.

        Raises:
            ValueError: it cannot.
        """
        given = fit.model_dump()
        values = self.model_dump() | {
            "batch": self.batch or given["batch"],
            "accumulation": self.accumulation or given["accumulation"],
            "lr": self.lr or float(f"{given['lr'] / 10:.6g}"),
            "warmup_steps": self.warmup_steps or max(1, self.steps // 10),
            "ema_every": self.ema_every or max(1, self.steps // _PASSES),
            "eval_every": self.eval_every or self.steps,
            "save_every": self.save_every or max(1, min(given["save_every"], self.steps // 2)),
        }
        values |= {"objective": "caption_contrast", "init_from": begin, "keep_every": 0}
        values |= {"schedule": "cosine", "lr_final": 0.0, "z_loss": 0.0, "replace_codes": 0.0, "replace_pieces": 0.0}
        if values["batch"] < 2:
            section = "align_fit" if self.batch else "dalle_fit"
            raise ValueError(
                f"{section}.batch = {values['batch']}: stage align (align_fit.steps = {self.steps}) takes another picture's caption out of the same update; set align_fit.batch = 2 or "
                "more, or align_fit.steps = 0"
            )
        return type(fit).model_validate(given | values)
