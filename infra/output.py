"""Output that cannot end a run: a terminal or pipe that is gone, a log's full disk, and encodings that know few characters."""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import sys
from typing import Any, NoReturn

_UTF8 = ("utf-8", "utf8")


class _Lasting(io.FileIO):
    """A descriptor whose failures are dropped with what was to be written: training goes on without its log."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return memoryview(data).nbytes


def speak_utf8() -> None:
    """Start this process again in Python's UTF-8 mode where the locale has another encoding: names of files and captions are UTF-8 wherever a run goes on.

    What is printed keeps the locale's encoding, with escapes for what that does not know. The process keeps its number.
    """
    if sys.getfilesystemencoding() in _UTF8:
        return
    os.environ.setdefault("PYTHONIOENCODING", f"{sys.stdout.encoding if sys.stdout else 'ascii'}:backslashreplace")
    os.environ["PYTHONUTF8"] = "1"
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def last() -> None:
    """Make stdout and stderr of this process outlast whoever reads them. To be called before anything opens a file: it would get the number of a closed stdout."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    sys.stdout, sys.stderr = _wrapped(1, sys.stdout), _wrapped(2, sys.stderr)
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr  # type: ignore[misc] # what Python flushes at its end, and what libraries keep


def leave(code: int) -> NoReturn:
    """End this process, after what is registered for its end: Python would take torch and its models apart first, for seconds, and longer where it is busy.
    For a stop, which has saved what there is."""
    with contextlib.suppress(Exception):
        atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wrapped(number: int, stream: Any) -> io.TextIOWrapper:
    if stream is not None:
        stream.flush()
    encoding = stream.encoding if stream is not None else "utf-8"
    raw: Any = _Lasting(number, "w", closefd=False)
    at_once = stream is not None and stream.write_through  # python -u, PYTHONUNBUFFERED: images set it, so that logs are not late
    lines = number == 2 or os.isatty(number)
    return io.TextIOWrapper(raw if at_once else io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=lines, write_through=at_once)
