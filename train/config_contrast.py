"""Keys of the caption-contrastive objective of stage dalle (docs/small_data.md): part of section dalle_fit. No torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from infra.config import Section
from infra.config_keys import GOING_ON


class ContrastSection(Section):
    """Condition contrastive alignment (Chen et al. 2024, arXiv 2410.09347), off by default."""

    objective: Literal["likelihood", "caption_contrast"] = "likelihood"
    """'likelihood': the paper's two cross-entropies. 'caption_contrast': a fine-tune that makes pictures likelier under their own caption and less likely under
    another picture's, each relative to the frozen weights that dalle_fit.init_from names; each micro-batch computes every picture under both captions."""
    contrast_beta: float = Field(default=0.02, gt=0, json_schema_extra=GOING_ON)
    """'caption_contrast': factor of both log-likelihood ratios, in 1 / nat of a whole picture. The larger it is, the closer to the frozen weights both terms are
    satisfied."""
    contrast_lambda: float = Field(default=1.0, ge=0, json_schema_extra=GOING_ON)
    """'caption_contrast': weight of the term with another picture's caption."""

    @property
    def contrasts(self) -> bool:
        """Whether captions are contrasted."""
        return self.objective == "caption_contrast"

    def check_contrast(self, *, init_from: str, batch: int, z_loss: float, replaced: float) -> None:
        """Refuse what the contrastive objective cannot be combined with.

        Raises:
            ValueError: there is something.
        """
        if not self.contrasts:
            return
        what = "objective = 'caption_contrast'"
        if not init_from:
            raise ValueError(
                f"{what} needs init_from: likelihoods are compared with those of frozen weights, the ones that training starts from. Name the export of a trained "
                "run, such as dalle_fit.init_from=runs/mine/dalle/export, or run 'launcher.py align runs/mine' in the run itself"
            )
        if batch < 2:
            raise ValueError(f"{what} takes another picture's caption out of the same update, and batch = {batch}; set batch = 2 or more")
        if z_loss:
            raise ValueError(
                f"{what} cannot have z_loss = {z_loss:g}: under another's caption likelihoods are to fall, and the z-loss would grow there; set z_loss = 0"
            )
        if replaced:
            raise ValueError(
                f"{what} compares likelihoods of pictures as they are; set replace_codes = 0 and replace_pieces = 0, which would change what the model reads"
            )
