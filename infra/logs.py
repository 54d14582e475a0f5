"""What our modules say while they work, on stderr: the warnings of every process and the notes of the main one."""

from __future__ import annotations

import logging
import os

_OURS = ("data_pipeline", "infra", "model", "train")


def show() -> None:
    """Print what our modules log, bare. For processes of the launcher: without it Python shows warnings alone."""
    handler = logging.StreamHandler()
    for name in _OURS:
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
        logger.propagate = False  # some libraries give the root a handler, which would say it again
