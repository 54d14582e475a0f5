"""The exit codes of every command, and the exceptions that carry them (docs/contracts.md, section 1)."""

from enum import IntEnum

from infra import shown


class ExitCode(IntEnum):
    """What a scheduler may conclude from how a command ended. The one home of these numbers."""

    DONE = 0
    """Finished; run again, it is a no-op."""
    CRASH = 1
    """Anything without a code of its own (a lost peer, a bug): may be retried."""
    USAGE = 64
    """The command line is off: never retry."""
    DATA = 65
    """Input data, a shard set or a checkpoint is missing, damaged or of another lineage: never retry."""
    REQUEUE = 75
    """Stopped by a signal; everything is saved; please requeue."""
    CONFIG = 78
    """The configuration or the run folder is wrong: never retry."""
    DIVERGED = 93
    """No progress or diverged; the last good checkpoint is kept: never retry."""


class ReportedError(Exception):
    """An error whose message is for the user: what was given, what is accepted, what to change. No traceback is shown.

    Messages quote what others have written, and are stored in run folders: passwords are masked in them, and long values cut.
    """

    exit_code = ExitCode.CRASH

    def __init__(self, message: str = "") -> None:
        super().__init__(shown.message(message))


class UsageError(ReportedError):
    """The command line is wrong."""

    exit_code = ExitCode.USAGE


class DataError(ReportedError):
    """Input data or a shard set is missing, damaged or of another lineage."""

    exit_code = ExitCode.DATA


class MissingError(DataError):
    """There is no such file or object. Anything else that keeps it from being read is another DataError: absence is a fact, not a fault."""


class UnreachableError(DataError):
    """The storage gives no answer, also after retries. That says nothing about the data, and may pass: unlike other DataErrors it is retried."""

    exit_code = ExitCode.CRASH


class UnchangingError(DataError):
    """What the bytes themselves say, such as columns of unknown names: reading them again cannot change it, and nobody tries."""


class CheckpointError(DataError):
    """A checkpoint is missing, incomplete, damaged or of another shape."""


class ConfigError(ReportedError, ValueError):
    """The configuration or the run folder is wrong."""

    exit_code = ExitCode.CONFIG


class NoRoomError(ConfigError):
    """A disk is full, or a quota used up. Another node, or somebody who makes room, may help: unlike other ConfigErrors it is retried."""

    exit_code = ExitCode.CRASH


class DivergedError(ReportedError):
    """Training makes no progress or its numbers are no longer finite."""

    exit_code = ExitCode.DIVERGED


class StopRequested(ReportedError):
    """A signal asked to stop, and the state is saved.

    Args:
        at_once: this process ends by itself, where it had nothing to lose: its peers have not agreed on it.
    """

    exit_code = ExitCode.REQUEUE

    def __init__(self, message: str = "", *, at_once: bool = False) -> None:
        super().__init__(message)
        self.at_once = at_once


class SupersededError(ReportedError):
    """Another launcher has the work: nothing more is written, and that is no crash."""

    exit_code = ExitCode.REQUEUE


class LostPeerError(ReportedError):
    """Another node or rank did not do its part: may be retried."""
