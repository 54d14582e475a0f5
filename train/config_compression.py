"""The section [compression] of a run's configuration. Needs no torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import ConfigDict, Field, model_validator

from infra.config import Section
from infra.config_keys import ANY_TIME
from infra.errors import ConfigError


class CompressionSection(Section):
    """Compression of the gradients of block matrices between machines (paper 2.5, E; docs/compression.md). Applies with zero.sharding = "node" on several machines."""

    model_config = ConfigDict(json_schema_extra=ANY_TIME)

    method: Literal["exact", "powersgd"] = "exact"
    """'exact': gradients are sent uncompressed. 'powersgd': factors of low rank are sent, and each machine has an error buffer with what was not sent yet. If a run
    switches compression off, its buffers are added to one update; if it switches it on, they start at zero."""
    rank: int = Field(default=0, ge=0)
    """Total rank of a matrix's factors; required for 'powersgd'. It is divided among the processes of a machine, and must be a multiple of their number. In the paper: 512
    at width 1920, 640 at 2688, 896 at 3968."""
    refresh_every: int = Field(default=0, ge=0)
    """Number of updates after which projections are replaced by ones from a singular value decomposition of the sum of all buffers, which must be sent uncompressed for
    this; 0: the initial random projections stay (paper 2.5)."""
    wire: Literal["1-6-9", "bf16", "fp32"] = "1-6-9"
    """Format in which factors are sent between machines: the paper's 16-bit format (summed in fp32), or an all-reduce in bf16 or fp32."""
    rest: Literal["fp32", "1-6-9"] = "fp32"
    """Format of the error buffers in memory and in checkpoints; the paper's is '1-6-9'."""
    error_buffers: Literal["own", "sum"] = "own"
    """What a checkpoint stores of the error buffers. 'own': those of each machine; the same number of machines then resumes with the same bits. 'sum': their sum, as in
    the paper; a resumed run then differs by rounding. Another number of machines divides the sum in both cases."""

    @model_validator(mode="after")
    def _ranked(self) -> Self:
        if self.method == "powersgd" and not self.rank:
            raise ValueError("method = 'powersgd' needs compression.rank above 0, such as a quarter of dalle.width")
        return self


def check_sharding(section: CompressionSection, sharding: str) -> None:
    """Check that compression is possible. Raises: ValueError: compression is configured, but machines are not replicas."""
    if section.method == "powersgd" and sharding != "node":
        raise ValueError(
            f"compression.method = 'powersgd' compresses between machines that hold replicas, but zero.sharding = '{sharding}'; set it to 'node', or the "
            "method to 'exact'"
        )


def check_rank(section: CompressionSection, machines: int, processes: int) -> None:
    """Check that the rank divides over the processes of a machine, where anything is compressed.

    Raises:
        ConfigError: it does not.
    """
    if section.method == "powersgd" and machines > 1 and section.rank % processes:
        raise ConfigError(
            f"compression.rank = {section.rank} does not divide over the {processes} processes of a machine; use a multiple of {processes}."
        )
