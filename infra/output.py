"""Makes output unable to end a run: a terminal or pipe may be gone, the disk of a log full, or the encoding unable to express a character."""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from infra import kept_within, shown

_UTF8 = ("utf-8", "utf8")
KEPT = 4 << 20
"""Bytes of a rank's words that are kept of what is longer, the last ones."""
_copy: list[int] = []
_ESCAPE = b"\x1b["


class _Lasting(io.FileIO):
    """A file descriptor that ignores failed writes: training continues, without its log."""

    def write(self, data: Any) -> int:
        if _copy:
            _keep(bytes(data))
        try:
            return super().write(data) or 0
        except OSError:
            return memoryview(data).nbytes


def copy_to(path: Path) -> None:
    """From here on, also append to a file what this process prints by itself (``last``), but for what only draws on a terminal."""
    kept_within.check(path)
    copy_no_more()
    _copy[:] = [os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)]


def copy_no_more() -> None:
    """End the copy."""
    while _copy:
        os.close(_copy.pop())


def note(line: str) -> None:
    """Put a line into the copy alone: what a terminal shows as a drawing."""
    if _copy:
        _keep(f"{line}\n".encode())


def copied_file() -> int | None:
    """Descriptor of the copy, for what writes past Python."""
    return _copy[0] if _copy else None


def tail(path: Path, most: int = KEPT) -> bytes:
    """The end of a file, from a line's beginning on where it is longer than ``most`` bytes."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(max(0, size - most))
        found = file.read(most)
    return found if size <= most else found.partition(b"\n")[2]


def _keep(data: bytes) -> None:
    try:
        if _ESCAPE not in data:  # the run folder is read by more people than a terminal
            os.write(_copy[0], shown.mask(data.decode(errors="replace")).encode())
    except OSError:
        copy_no_more()


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
    at_once = stream is not None and stream.write_through  # python -u or PYTHONUNBUFFERED, which container images set
    lines = number == 2 or os.isatty(number)
    return io.TextIOWrapper(raw if at_once else io.BufferedWriter(raw), encoding, "backslashreplace", line_buffering=lines, write_through=at_once)
