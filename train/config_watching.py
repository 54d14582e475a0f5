"""Keys of how a training stage is watched: part of each of its sections. No torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

from infra.config import Section
from infra.config_keys import ANY_TIME


class WatchingSection(Section):
    """What of a training stage is shown and written down while it goes on; nothing of what it computes."""

    log_every: int = Field(default=10, gt=0, json_schema_extra=ANY_TIME)
    """Updates between logged points."""
    lines_every: int = Field(default=0, ge=0, json_schema_extra=ANY_TIME)
    """Updates between lines in a log; 0: a line every ten seconds. A terminal has a bar."""
    profile: tuple[PositiveInt, ...] = Field(default=(), json_schema_extra=ANY_TIME)
    """Updates that are profiled: a trace of torch's profiler, on a GPU a snapshot of its memory, and a page with the phases of all ranks, in <stage>/profile/
    (docs/watching.md says what that costs). Empty: none."""
    profile_ranks: tuple[NonNegativeInt, ...] = Field(default=(), json_schema_extra=ANY_TIME)
    """Ranks that write traces and snapshots of these updates; empty: all."""


class NumericsSection(Section):
    """What is written down of the transformer's gradients, resblock by resblock."""

    numerics_every: int = Field(default=100, gt=0, json_schema_extra=ANY_TIME)
    """Updates between logged points of each resblock: scale, overflows, gradient norm, and the shares of zero and subnormal values in reduced gradients; and of what goes
    between machines."""
    histograms_every: int = Field(default=0, ge=0, json_schema_extra=ANY_TIME)
    """Updates between histograms of the exponents of each resblock's reduced gradients, for TensorBoard; 0: none. Takes two passes over them in such an update."""


class SamplesSection(Section):
    """Pictures that are drawn while the transformer trains: the same captions with the same seeds, by the averaged weights of its newest checkpoint."""

    model_config = ConfigDict(json_schema_extra=ANY_TIME)

    every: int = Field(default=0, ge=0)
    """Updates between drawings; 0: none. A checkpoint is drawn once, so they are at least dalle_fit.save_every apart."""
    captions: tuple[str, ...] = ()
    """Captions to draw, one picture each; empty: the first of generate.captions, or else the first captions of the validation split."""
    num_captions: int = Field(default=4, gt=0, le=64)
    """If captions is empty: how many."""
    where: Literal["auto", "beside", "evaluation"] = "auto"
    """'beside': a process of lowest priority on CPU cores that the ranks leave over, while training goes on. 'evaluation': training waits for it, at evaluations.
    'auto': beside it where at least four cores are left over, else at evaluations."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where it draws. 'cuda': on the main rank's GPU, which then has to hold the weights once more (the verb plan counts them), and with where = 'evaluation'."""
    memory_gb: float = Field(default=0.0, ge=0)
    """Most memory that drawing may take; where the formula of the verb plan finds that it takes more, nothing is drawn, and the log says so. 0: no limit."""

    @model_validator(mode="after")
    def _a_gpu_is_not_shared(self) -> Self:
        if self.device == "cuda" and self.where != "evaluation":
            raise ValueError(f"device = 'cuda' with where = '{self.where}': a GPU that trains draws at evaluations; set where = 'evaluation'")
        return self


class ReportSection(Section):
    """What the report estimates of cost and energy, for which a run has no figures of its own."""

    model_config = ConfigDict(json_schema_extra=ANY_TIME)

    price: float = Field(default=0.0, ge=0)
    """Price of one process (a GPU, or a part of a machine) for an hour, in any currency; 0: no cost is shown."""
    gpu: str = ""
    """GPU of each process, as the verb plan names it ('H100'), for its power; empty: not known."""
    watts: float = Field(default=0.0, ge=0)
    """Power of one process instead; 0: that of report.gpu's datasheet."""
