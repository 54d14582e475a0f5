"""Logging of our modules to stderr: warnings of every process, and messages of level INFO of the main one."""

from __future__ import annotations

import logging
import sys
import time
import warnings

from infra import environment, shown

_OURS = ("data_pipeline", "infra", "model", "train")


class _Lines(logging.StreamHandler):  # type: ignore[type-arg]
    def format(self, record: logging.LogRecord) -> str:
        """The message, in a job with its time (UTC); on a terminal in place of the progress that is drawn there, which draws itself again."""
        when = f"{clock(record.created)} " if in_job() else ""
        return ("\r\x1b[2K" if self.stream.isatty() else "") + when + shown.message(super().format(record))


def clock(seconds: float | None = None) -> str:
    """The time as lines of a log carry it: UTC with the date in a job, of day elsewhere."""
    at = time.time() if seconds is None else seconds
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at)) if in_job() else time.strftime("%H:%M:%S", time.localtime(at))


def in_job() -> bool:
    """Whether a scheduler runs this process: its log is then read later, so lines need a time."""
    return bool(environment.text("LAUNCHER_JOB") or environment.text("SLURM_JOB_ID"))


def show() -> None:
    """Print what our modules log, bare; with LAUNCHER_DEBUG also what each phase of a stage is. For processes of the launcher: without it Python shows
    warnings alone."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # where one process reads a checkpoint, as for an export
    handler = _Lines()
    main = "--worker" not in sys.argv or environment.text("RANK", "0") == "0"  # only our ranks have a number that counts
    most = logging.DEBUG if environment.text("LAUNCHER_DEBUG") else logging.INFO
    for name in _OURS:
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(most if main else logging.WARNING)
        logger.propagate = False  # some libraries give the root a handler, which would say it again
