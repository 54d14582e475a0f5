"""This process's place among the ranks, and this launcher's share of a stage. The only reader of RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE."""

from dataclasses import dataclass

from infra import environment
from infra.errors import ConfigError

_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class World:
    """A process's place among the ranks of its launcher's job."""

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
        """Read the variables that the launcher's agent (or torchrun) sets. A missing one is an error; it never means rank 0.

        Raises:
            ConfigError: a variable is missing or not an integer.
        """
        try:
            rank, size, local_rank, local_size = (environment.whole(name) for name in _NAMES)
        except ConfigError as error:
            raise ConfigError(f"{error} Ranks are started by launcher.py or torchrun, which set {', '.join(_NAMES)}.") from error
        return cls(rank, size, local_rank, local_size)


@dataclass(frozen=True)
class Share:
    """The part of a stage's work that this launcher does, where independent launchers divide it: a SLURM array, a Kubernetes Indexed Job, or by hand."""

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
            raise ConfigError(
                f"share '{text}': expected I/N with 0 <= I < N, for example 0/16 for the first of sixteen; of an array, one without gaps."
            )
        return cls(int(index), int(count))

    @classmethod
    def from_env(cls) -> "Share":
        """Read LAUNCHER_SHARE, which ``--share`` and our job scripts set; all of the work if it is not set.

        Raises:
            ConfigError: the value is not a share; or it is not set in a task of an array or a pod of an Indexed Job, where it is unclear whether the tasks
                divide one run or each do a run of their own.
        """
        given = environment.text("LAUNCHER_SHARE")
        if given:
            return cls.parse(given)
        index, count, low = (environment.text(f"SLURM_ARRAY_TASK_{name}") for name in ("ID", "COUNT", "MIN"))
        what = f"task {index} of an array (SLURM_ARRAY_TASK_ID)"
        if index:
            divided = f"{int(index) - int(low or 0)}/{count}" if index.isdigit() and count.isdigit() and (low or "0").isdigit() else "I/N"
        else:
            index, count = environment.text("JOB_COMPLETION_INDEX"), environment.text("JOB_COMPLETIONS")
            what, divided = f"pod {index} of an Indexed Job (JOB_COMPLETION_INDEX)", f"{index}/{count or 'N'}"
        if not index:
            return cls()
        raise ConfigError(
            f"this is {what}, but it is not known how its tasks divide the work: give --share {divided} (LAUNCHER_SHARE) if the tasks divide one run, "
            "or --share 0/1 if each does all the work of a run of its own."
        )

    def of(self, world: World) -> World:
        """The place of a process among the ranks of all launchers, by which work is divided."""
        return World(self.index * world.size + world.rank, self.count * world.size, world.local_rank, world.local_size)

    def label(self, stage: str) -> str:
        """Name of this share of a stage, for locks and records of attempts."""
        return stage if self.count == 1 else f"{stage}.{self.index}-of-{self.count}"
