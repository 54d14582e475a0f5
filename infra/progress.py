"""Progress on a terminal (a bar) or in a log (a line now and then), and tables. Only this file and launcher.py import rich."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from infra import live, logs, output, shown

_WINDOW_S = 60.0
_REDRAW_S = 0.2
_LOG_WIDTH = 200
_SOON_S = 10.0
"""Before this many seconds were observed, a rate is a guess, and the time to go is shown as a wide range."""
_GUESS = 1.5
"""The factor by which such a guess may be wrong, either way."""
_STEADY = 1.2
"""If the longest estimate exceeds the shortest by no more than this factor, a single figure is shown instead of a range."""


class Progress:
    """How far a piece of work is, how fast it goes and when it will end.

    A terminal gets a bar that is redrawn in place; anything else gets a line at the first update, then one every ``every_s`` seconds, and one at
    the end. Nothing is drawn from a thread: a line appears only inside ``update`` and ``finish``.

    Args:
        total: the amount of work, in ``unit``; 0 where it is not known.
        title: what is being done; the first word of every line.
        unit: plural noun of what is counted.
        every_s: seconds between two lines of a log.
        every: updates between two lines of a log, in place of seconds; 0: by time.
        timed: lines carry the time of day, in a job the date too (UTC).
        start: work that was done before (a resumed run): it counts as done, not towards the rate.
        enabled: False makes every call do nothing; pass ``world.is_main``.
        stream: where to write; the default is stderr as it is at construction.
        clock: seconds that never go backwards.
    """

    def __init__(
        self,
        total: int,
        title: str,
        unit: str = "steps",
        every_s: float = 10.0,
        *,
        every: int = 0,
        timed: bool = False,
        start: int = 0,
        enabled: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.title, self.unit, self.every_s, self.enabled = total, title, unit, every_s, enabled
        self._every, self._timed, self._logged = every, timed, -math.inf
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._started = clock()
        self._start = start
        self._done = start
        self._fields: dict[str, object] = {}
        self._recent: deque[tuple[float, int]] = deque([(self._started, start)])
        self._shown: float | None = None
        self._bar: Bar | None = None
        self._task = TaskID(0)
        self._closed = False
        live.say(now=True, title=title, done=start, total=total, unit=unit, rate=0.0, eta_s=None)
        if enabled and self._stream.isatty():
            self._open_bar()

    def update(self, done: int, **fields: object) -> None:
        """Say that ``done`` of ``total`` is done, on this rank's terminal or log if it is enabled, and to whoever watches (``infra/live.py``) from every rank.
        Fields (loss=0.412) are shown at the end of the line and stay until replaced."""
        if self._closed:
            return
        now = self._clock()
        self._done = done
        self._fields |= fields
        if self._shown is None and done - self._start == 1:
            self._recent.clear()  # the first unit waits for data, allocates and compiles: its duration says nothing about the next
        self._recent.append((now, done))
        while len(self._recent) > 2 and now - self._recent[1][0] >= _WINDOW_S:
            self._recent.popleft()
        live.say(done=done, total=self.total, rate=self.rate(), eta_s=self.eta_s())
        if self.enabled and self._is_due(now):
            self._show(now)

    def _is_due(self, now: float) -> bool:
        if self._shown is None:
            return True
        if self._bar is None and self._every:
            return self._done % self._every == 0
        return now - self._shown >= (_REDRAW_S if self._bar else self.every_s)

    def finish(self) -> None:
        """Show the final state and the time that it took. Later calls do nothing."""
        if self._closed:
            return
        self._closed = True
        now = self._clock()
        live.say(now=True, done=self._done, total=self.total, rate=self.rate(), eta_s=None)
        if not self.enabled:
            return
        if self._bar:
            self._show(now)
            self._bar.stop()
        else:
            self._write(self.line(finished=True))

    def rate(self) -> float:
        """Units per second over the last minute (0 while nothing is known). A slow minute changes it, a single slow step hardly."""
        (t0, n0), (t1, n1) = self._recent[0], self._recent[-1]
        return (n1 - n0) / (t1 - t0) if t1 > t0 else 0.0

    def eta_s(self) -> float | None:
        """Seconds to go at the present rate; None while that is not known."""
        rate = self.rate()
        return max(0, self.total - self._done) / rate if rate > 0 and self.total else None

    def eta_range_s(self) -> tuple[float, float] | None:
        """Seconds to go at the fastest and at the slowest recent rate, a wider range while little was observed; None while nothing is known."""
        if not self.total or self.rate() <= 0:
            return None
        left, watched = max(0, self.total - self._done), self._recent[-1][0] - self._recent[0][0]
        rates = [rate for rate in self._quarters() if rate > 0] or [self.rate()]
        guess = _GUESS if watched < _SOON_S else 1.0
        return left / max(rates) / guess, left / min(rates) * guess

    def _quarters(self) -> list[float]:
        """Rates in up to four consecutive periods with equally many updates."""
        marks = list(self._recent)
        step = max(1, -(-(len(marks) - 1) // 4))
        ends = [*range(0, len(marks) - step, step), len(marks) - 1]
        pairs = [(marks[a], marks[b]) for a, b in pairwise(ends)]
        return [(n1 - n0) / (t1 - t0) for (t0, n0), (t1, n1) in pairs if t1 > t0]

    def _eta(self) -> str:
        found = self.eta_range_s()
        if found is None:
            return ""
        low, high = found
        return f"ETA {duration(self.eta_s() or 0.0)}" if high <= _STEADY * low else f"ETA {duration(low)} to {duration(high)}"

    def line(self, finished: bool = False) -> str:
        """The state as one line: ``dvae  120/1500 steps  8.1 steps/s  ETA 2:51  loss 0.412``."""
        elapsed = self._clock() - self._started
        amount = f"{self._done}/{self.total}" if self.total else f"{self._done}"
        words = [self.title, *([logs.clock()] if self._timed else []), f"{amount} {self.unit}"]
        rate = (self._done - self._start) / elapsed if finished and elapsed > 0 else self.rate()
        if rate > 0:
            words.append(f"{three_digits(rate)} {self.unit}/s")
        if finished:
            words.append(f"took {duration(elapsed)}")
        elif eta := self._eta():
            words.append(eta)
        return "  ".join([*words, *_shown_fields(self._fields)])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.finish()

    def _open_bar(self) -> None:
        columns = (TextColumn("[bold]{task.description}"), BarColumn(bar_width=28), TextColumn("{task.fields[rest]}", markup=False))
        # No refresh thread, and stdout and stderr are not redirected: a rank that is killed must not leave the terminal redirected.
        console = Console(file=self._stream)
        self._bar = Bar(*columns, console=console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
        self._task = self._bar.add_task(self.title, total=self.total or None, completed=self._start, rest="")
        self._bar.start()

    def _show(self, now: float) -> None:
        self._shown = now
        if self._bar:
            rest = self.line().removeprefix(self.title).lstrip()
            self._bar.update(self._task, completed=self._done, rest=rest, refresh=True)
            if now - self._logged >= self.every_s:
                self._logged = now
                output.note(self.line())
        else:
            self._write(self.line())

    def _write(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()


def three_digits(value: float) -> str:
    """A positive number with three significant digits and no exponent: 0.0123, 8.1, 1234."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}" if value >= 0.001 else f"{value:.1e}"


def duration(seconds: float) -> str:
    """Seconds as a person says them: 0:07, 2:51, 1:02:03."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def table(rows: Sequence[Mapping[str, object]], title: str = "", stream: TextIO | None = None) -> None:
    """Print rows as a table; the columns are the keys in the order of their first appearance, a missing value is left empty."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    grid = Table(
        title=Text(shown.escaped(title), "table.title") if title else None,
        title_justify="left",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        header_style="bold",
    )
    for column in columns:
        numbers = all(isinstance(row.get(column), int | float | None) for row in rows)
        grid.add_column(column, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        # Text, not str: a caption such as "[red]" is not markup.
        grid.add_row(*(Text(shown.escaped(_word(row.get(column, "")))) for column in columns))
    out = sys.stdout if stream is None else stream
    # A log has no width of its own: never cut a path there.
    Console(file=out, width=None if out.isatty() else _LOG_WIDTH).print(grid)


def _word(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _shown_fields(fields: Mapping[str, object]) -> list[str]:
    return [f"{name} {_word(value)}" for name, value in fields.items()]
