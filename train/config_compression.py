"""The section [compression] of a run's configuration. No torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import ConfigDict, Field, model_validator

from infra.config import Section
from infra.config_keys import ANY_TIME


class CompressionSection(Section):
    """Gradients of block matrices between machines (paper 2.5, E; docs/compression.md): with zero.sharding = "node", on more than one machine."""

    model_config = ConfigDict(json_schema_extra=ANY_TIME)

    method: Literal["exact", "powersgd"] = "exact"
    """'exact': whole gradients. 'powersgd': factors of a low rank, and on each machine an error buffer of what is not sent yet. A run that is switched off adds its
    buffers to one update; one that is switched on starts them at zero."""
    rank: int = Field(default=0, ge=0)
    """Total rank of a matrix's factors, divided over the processes of a machine, of which it must be a multiple; needed for 'powersgd'. The paper's: 512 at width
    1920, 640 at 2688, 896 at 3968."""
    refresh_every: int = Field(default=0, ge=0)
    """Updates between new projections, from a singular value decomposition of the sum of all buffers, which travels whole for it; 0: the random ones of the start
    stay (paper 2.5)."""
    wire: Literal["1-6-9", "bf16", "fp32"] = "1-6-9"
    """Format of the factors between machines: the paper's 16 bits (summed in fp32), or an all-reduce in bf16 or fp32."""
    rest: Literal["fp32", "1-6-9"] = "fp32"
    """Format of the error buffers in memory and in checkpoints; the paper's is '1-6-9'."""
    error_buffers: Literal["own", "sum"] = "own"
    """What a checkpoint holds of them: each machine's own, from which as many machines go on with the same bits; or their sum, as the paper does, from which they go
    on with other roundings. Another number of machines divides the sum in either case."""

    @model_validator(mode="after")
    def _ranked(self) -> Self:
        if self.method == "powersgd" and not self.rank:
            raise ValueError("method = 'powersgd' needs a rank above 0, such as 0.25 times dalle.width")
        return self


def check_sharding(section: CompressionSection, sharding: str) -> None:
    """Raises: ValueError: gradients shall be compressed between machines, but there are no replicas."""
    if section.method == "powersgd" and sharding != "node":
        raise ValueError(
            f"compression.method = 'powersgd' compresses between machines that hold replicas, but zero.sharding = '{sharding}'; set it to 'node', or the "
            "method to 'exact'"
        )
