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
        """The message; in a job with its time (UTC) before it. On a terminal it first erases the progress bar, which redraws itself below."""
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ ", time.gmtime(record.created)) if in_job() else ""
        return ("\r\x1b[2K" if self.stream.isatty() else "") + when + shown.message(super().format(record))


def in_job() -> bool:
    """Whether a scheduler runs this process: its log is then read later, so lines need a time."""
    return bool(environment.text("LAUNCHER_JOB") or environment.text("SLURM_JOB_ID"))


def show() -> None:
    """Print what our modules log, without level and logger name. For processes of the launcher: by default Python shows warnings only."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # from reading a checkpoint in one process, as for an export
    handler = _Lines()
    main = "--worker" not in sys.argv or environment.text("RANK", "0") == "0"  # RANK means something for our workers only
    for name in _OURS:
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO if main else logging.WARNING)
        logger.propagate = False  # some libraries give the root logger a handler, which would print it twice
