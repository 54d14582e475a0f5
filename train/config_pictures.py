"""Configuration of drawing, and of what is measured of the models and their drawings. No torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import ConfigDict, Field, PositiveInt, model_validator

from infra.config import Section
from infra.config_keys import ANY_TIME, BEFORE, PLACE


class GenerateSection(Section):
    """Drawing of pictures."""

    model_config = ConfigDict(json_schema_extra=ANY_TIME)

    captions: tuple[str, ...] = ()
    """Captions to draw; empty: captions of the validation split."""
    num_captions: int = Field(default=16, gt=0)
    """If captions is empty: number of validation captions to draw, each of another concept."""
    num_known_captions: int = Field(default=0, ge=0)
    """If captions is empty: number of captions of the most frequent training concepts to draw in addition."""
    candidates: int = Field(default=8, gt=0)
    """Pictures per caption (512 in the paper), before reranking."""
    batch: int = Field(default=32, gt=0)
    """Pictures that a process draws at once."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature (1 in the paper)."""
    top_k: int = Field(default=0, ge=0)
    """Sample only from the k likeliest codes; 0: from all."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample only from the likeliest codes that together have this probability; 1: from all."""
    guidance: float = Field(default=1.0, ge=0)
    """Classifier-free guidance: codes are sampled from the logits l_empty + s (l_caption - l_empty) with this s; 1: off. Needs dalle_fit.caption_dropout."""
    window: int = Field(default=1, ge=0)
    """Codes of a picture computed in one pass: guesses ahead (drafts), which are kept if the pass confirms them. Pictures do not change; 0: chosen by the device."""
    search: bool = False
    """Search instead of best of N: candidates are scored at one and two thirds of their rows, and the worse half goes on from the better one. For all
    candidates of a caption at once, whatever 'batch' is."""
    show: int = Field(default=4, gt=0)
    """Pictures per caption shown in the report, best first."""
    checkpoints: int = Field(default=4, ge=0, json_schema_extra={BEFORE: 0})
    """Most kept checkpoints of the transformer (dalle_fit.keep, keep_every) with which the first captions are drawn, too, for the report and TensorBoard."""
    nearest_among: int = Field(default=20_000, gt=0)
    """Number of training images that are searched for the nearest one of each picture."""


class EvaluateSection(Section):
    """Evaluation on the validation split. It shapes no weights, so a run may change its mind at any time; with other values the stage runs again."""

    model_config = ConfigDict(json_schema_extra=ANY_TIME)

    samples: int = Field(default=1024, gt=0)
    """Samples for reconstruction, cross-entropies and retrieval."""
    batch: int = Field(default=64, gt=0)
    """Samples per forward pass."""
    lpips_weights: tuple[str, ...] = Field(default=(), json_schema_extra=PLACE)
    """Files with the weights of LPIPS, to measure reconstructions: torchvision's AlexNet or VGG-16, and the linear heads (.safetensors or .pth). Empty: not measured."""
    frechet_net: Literal["none", "inception-cleanfid", "inception-torch-fidelity", "efficientnet-lite0"] = "none"
    """Feature network of the Fréchet distance of reconstructions. Only the Inception networks give an FID; 'efficientnet-lite0' needs no download, and is reported under its own name."""
    frechet_weights: str = Field(default="", json_schema_extra=PLACE)
    """File with the weights of that network; 'efficientnet-lite0' uses those in its package."""
    drawings: int = Field(default=0, ge=0)
    """Validation captions, each of another concept, that are drawn and measured as section [generate] says (docs/evaluation.md); 0: none."""
    best_of: tuple[PositiveInt, ...] = Field(default=(1, 2, 4, 8), min_length=1)
    """The best of how many candidates by the run's contrastive model is measured. 1 is not ranked."""
    blur: tuple[PositiveInt, ...] = Field(default=())
    """Standard deviations in pixels of blurs with which distances are measured, too (paper Figure 9: 1, 2, 4, 8)."""
    judge: str = Field(default="", json_schema_extra=PLACE)
    """Folder with another exported contrastive model of the same tokenizer, or with a published CLIP of open_clip, which judges ranked drawings; empty: only the network of
    frechet_net does."""

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if self.best_of[0] != 1 or list(self.best_of) != sorted(set(self.best_of)):
            raise ValueError(
                f"best_of = {list(self.best_of)}: rising numbers from 1 on, because figures of unranked drawings stand beside those of ranked ones"
            )
        return self
