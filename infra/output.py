"""Makes output unable to end a run: a terminal or pipe may be gone, the disk of a log full, or the encoding unable to express a character."""

from __future__ import annotations

import io
import os
import sys
from typing import Any

_UTF8 = ("utf-8", "utf8")


class _Lasting(io.FileIO):
    """A file descriptor that ignores failed writes: training continues, without its log."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return memoryview(data).nbytes


def speak_utf8() -> None:
    """Start this process again in Python's UTF-8 mode if the locale has another encoding, because names of files and captions are UTF-8 on every machine.

    Printed text keeps the locale's encoding, with escapes for characters that it lacks. The process id stays the same.
    """
    if sys.getfilesystemencoding() in _UTF8:
        return
    os.environ.setdefault("PYTHONIOENCODING", f"{sys.stdout.encoding if sys.stdout else 'ascii'}:backslashreplace")
    os.environ["PYTHONUTF8"] = "1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def last() -> None:
    """Make writes to stdout and stderr survive the end of whoever reads them. To be called before any file is opened, because a file would take the descriptor
    number of a closed stdout."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor, which is this one
    sys.stdout, sys.stderr = _wrapped(1, sys.stdout), _wrapped(2, sys.stderr)
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr  # type: ignore[misc] # Python flushes these at exit, and some libraries use them


def _wrapped(number: int, stream: Any) -> io.TextIOWrapper:
    if stream is not None:
        stream.flush()
    encoding = stream.encoding if stream is not None else "utf-8"
    raw: Any = _Lasting(number, "w", closefd=False)
    at_once = stream is not None and stream.write_through  # python -u or PYTHONUNBUFFERED, which container images set
    lines = number == 2 or os.isatty(number)
    return io.TextIOWrapper(raw if at_once else io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=lines, write_through=at_once)
