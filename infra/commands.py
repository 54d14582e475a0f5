"""Command lines that messages name, quoted so that they can be pasted whatever is in the names."""

from __future__ import annotations

import shlex


def launcher(*words: str) -> str:
    """``launcher.py`` with its arguments."""
    return shlex.join(["launcher.py", *words])
