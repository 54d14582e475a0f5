"""Who this process is among its peers: the only reader of RANK and its relatives."""

import os
from dataclasses import dataclass

from infra.errors import ConfigError

_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class World:
    """Place of a process in its group."""

    rank: int
    size: int
    local_rank: int
    local_size: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @classmethod
    def single(cls) -> "World":
        """The world of one process."""
        return cls(rank=0, size=1, local_rank=0, local_size=1)

    @classmethod
    def from_env(cls) -> "World":
        """Read the variables that the launcher's agent (or torchrun) sets; a missing one is an error, never rank 0.

        Raises:
            ConfigError: a variable is missing or is no integer.
        """
        try:
            rank, size, local_rank, local_size = (int(os.environ[name]) for name in _NAMES)
        except KeyError as error:
            raise ConfigError(f"{error.args[0]} is not set: ranks are started by launcher.py or torchrun, which set {', '.join(_NAMES)}.") from error
        except ValueError as error:
            raise ConfigError(f"{', '.join(_NAMES)}: {error}; expected integers.") from error
        return cls(rank, size, local_rank, local_size)
