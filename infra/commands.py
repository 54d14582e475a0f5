"""Command lines for messages, quoted so that they can be pasted whatever characters the names hold."""

from __future__ import annotations

import shlex


def launcher(*words: str) -> str:
    """``launcher.py`` with its arguments."""
    return shlex.join(["launcher.py", *words])
