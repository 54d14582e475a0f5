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


@dataclass(frozen=True)
class Share:
    """Which part of a stage's work this launcher does, where independent launchers divide it: a SLURM array, a Kubernetes Indexed Job, or by hand."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "Share":
        """Read 'I/N', I from 0 to N - 1.

        Raises:
            ConfigError: something else.
        """
        index, slash, count = text.partition("/")
        if not (slash and index.isascii() and index.isdigit() and count.isascii() and count.isdigit() and int(index) < int(count)):
            raise ConfigError(f"share '{text}': expected I/N with 0 <= I < N, for example 0/16 for the first of sixteen.")
        return cls(int(index), int(count))

    @classmethod
    def from_env(cls) -> "Share":
        """LAUNCHER_SHARE, or what an array task of SLURM or a pod of an Indexed Job has; all of the work where nothing is set.

        Raises:
            ConfigError: a variable is missing or wrong: half a declaration must not do all of the work.
        """
        given = os.environ.get("LAUNCHER_SHARE")
        if given:
            return cls.parse(given)
        if "SLURM_ARRAY_TASK_ID" in os.environ:
            index, count, low = (os.environ.get(f"SLURM_ARRAY_TASK_{name}", "") for name in ("ID", "COUNT", "MIN"))
            if not (index.isdigit() and count.isdigit() and low.isdigit()) or int(index) - int(low) >= int(count):
                raise ConfigError(
                    f"SLURM_ARRAY_TASK_ID = {index}, SLURM_ARRAY_TASK_MIN = {low}, SLURM_ARRAY_TASK_COUNT = {count}: an array without gaps is "
                    "needed, for example --array=0-15."
                )
            return cls(int(index) - int(low), int(count))
        if "JOB_COMPLETION_INDEX" in os.environ:
            if "JOB_COMPLETIONS" not in os.environ:
                raise ConfigError("JOB_COMPLETION_INDEX is set, JOB_COMPLETIONS is not: give the Job's number of completions in that variable.")
            return cls.parse(f"{os.environ['JOB_COMPLETION_INDEX']}/{os.environ['JOB_COMPLETIONS']}")
        return cls()

    def of(self, world: World) -> World:
        """The process's place among the ranks of all launchers, for dividing work."""
        return World(self.index * world.size + world.rank, self.count * world.size, world.local_rank, world.local_size)

    def label(self, stage: str) -> str:
        """Name of the stage's share, for locks and records of attempts."""
        return stage if self.count == 1 else f"{stage}.{self.index}-of-{self.count}"
