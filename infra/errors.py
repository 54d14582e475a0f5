"""The exit codes of every command, and the exceptions that carry them (docs/contracts.md, section 1)."""

import sys
from collections.abc import Callable
from enum import IntEnum

from infra import shown


class ExitCode(IntEnum):
    """What a scheduler may conclude from how a command ended. These numbers are defined here alone."""

    DONE = 0
    """Finished; running it again does nothing."""
    CRASH = 1
    """Anything without a code of its own (a lost peer, a bug): may be retried."""
    USAGE = 64
    """The command line is wrong: never retry."""
    DATA = 65
    """Input data, a shard set or a checkpoint is missing, damaged or made from other inputs: never retry."""
    REQUEUE = 75
    """Stopped by a signal; everything is saved; requeue."""
    CONFIG = 78
    """The configuration or the run folder is wrong: never retry."""
    DIVERGED = 93
    """Training makes no progress or has diverged; the last good checkpoint is kept: never retry."""


class ReportedError(Exception):
    """An error whose message is for the user: what was given, what is accepted, what to change. No traceback is shown.

    Messages quote values from users and files, and are stored in run folders: passwords in them are masked, and long values are cut.
    """

    exit_code = ExitCode.CRASH

    def __init__(self, message: str = "") -> None:
        super().__init__(shown.message(message))


class UsageError(ReportedError):
    """The command line is wrong."""

    exit_code = ExitCode.USAGE


class DataError(ReportedError):
    """Input data or a shard set is missing, damaged or made from other inputs than expected."""

    exit_code = ExitCode.DATA


class MissingError(DataError):
    """There is no such file or object. A file that exists but cannot be read is another DataError."""


class UnreachableError(DataError):
    """The storage gives no answer, even after retries. That says nothing about the data and may pass, so unlike other DataErrors it may be retried."""

    exit_code = ExitCode.CRASH


class UnchangingError(DataError):
    """A fault in the bytes themselves, such as unknown column names: reading again cannot help, so it is not retried."""


class CheckpointError(DataError):
    """A checkpoint is missing, incomplete, damaged, or has other shapes than the model."""


class ConfigError(ReportedError, ValueError):
    """The configuration or the run folder is wrong."""

    exit_code = ExitCode.CONFIG


class NoRoomError(ConfigError):
    """A disk is full or a quota is used up. Another node may have room, or somebody may make some, so unlike other ConfigErrors it may be retried."""

    exit_code = ExitCode.CRASH


class DivergedError(ReportedError):
    """Training makes no progress or its numbers are no longer finite."""

    exit_code = ExitCode.DIVERGED


class StopRequested(ReportedError):
    """A signal asked to stop, and everything is saved.

    Args:
        at_once: this process ends alone, in a phase in which it had nothing to save: the other ranks have not agreed to stop.
    """

    exit_code = ExitCode.REQUEUE

    def __init__(self, message: str = "", *, at_once: bool = False) -> None:
        super().__init__(message)
        self.at_once = at_once


class SupersededError(ReportedError):
    """Another launcher has taken over the work: this one writes nothing more. That does not count as a crash."""

    exit_code = ExitCode.REQUEUE


class LostPeerError(ReportedError):
    """Another node or rank did not do its part: may be retried."""


def in_a_sentence(main: Callable[[list[str]], object]) -> None:
    """Run the main function of a program with its command line: an error that is for the user is a line, and its code the program's; whoever reads what it prints
    may go away."""
    from infra import output  # imports this module

    output.last()
    try:
        main(sys.argv[1:])
    except ReportedError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
