"""Writes and reads the metrics of a training stage: lines of JSON (one file for each attempt) and TensorBoard events. Nothing else imports tensorboard.

    <run>/<stage>/metrics/attempt-<k>.jsonl     {"step": 120, "time": 1735689600.0, "values": {"train/loss": 0.412}}
    <run>/tensorboard/<stage>/                  events

A killed process loses at most the line that it was writing. Both kinds of file are written locally: if the run folder is on s3, they are written to a
temporary folder, and ``flush`` uploads them.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

import numpy as np
from numpy.typing import NDArray

from infra import kept_within, scratch, storage, strict_json
from train.loop.panels import PANELS, TITLES

if TYPE_CHECKING:  # it imports torch
    from train.engines.protocol import Update

_PREFIX, _SUFFIX = "attempt-", ".jsonl"


class Point(NamedTuple):
    """One value of one series."""

    step: int
    """How many updates had been made when it was measured."""
    value: float
    """May be NaN or infinite."""
    time: float
    """Seconds since 1970."""


_GROUPS = {
    "eval": "2 validation",
    "train": "3 training",
    "sched": "4 schedules",
    "optim": "4 optimizer",
    "perf": "5 speed",
    "data": "5 data",
    "mem": "5 memory",
    "goodput": "6 goodput",
    "numerics": "8 numerics",
}
"""First part of a metric's name -> the group under which TensorBoard shows it. The numbers put the groups in order."""
_DEBUG = ("data/samples",)
_JUDGED_BY = ("train/loss", "eval/loss", "perf/mfu")
"""Metrics that TensorBoard shows beside the hyperparameters, in those runs that have them."""


class MetricsWriter:
    """Writes the metrics of one attempt at one stage. Only the main rank's writer is enabled; the others do nothing.

    Args:
        run_url: the run folder, local or s3://.
        stage: name of the stage's folder.
        attempt: number of the attempt; see ``next_attempt``.
        enabled: if False, every call does nothing and no file is touched.
        lines: False for a stage that logs only pictures and text, and no numbers.
    """

    def __init__(self, run_url: str, stage: str, attempt: int, enabled: bool = True, *, lines: bool = True) -> None:
        self.enabled = enabled
        self._lines: TextIO | None = None
        self._events: Any = None
        self._temporary: scratch.Folder | None = None
        if not enabled:
            return
        self._stage = stage
        self._lines_url = storage.join(_folder(run_url, stage), f"{_PREFIX}{attempt}{_SUFFIX}")
        self._events_url = storage.join(run_url, "tensorboard", stage)
        if storage.is_remote(run_url):
            self._temporary = scratch.Folder("metrics-")
            room = Path(self._temporary.name)
            self._lines_path, self._events_path = room / f"{_PREFIX}{attempt}{_SUFFIX}", room / "events"
        else:
            self._lines_path, self._events_path = storage.local_path(self._lines_url), storage.local_path(self._events_url)
        if lines:
            kept_within.check(self._lines_path)
            self._lines_path.parent.mkdir(parents=True, exist_ok=True)
            self._lines = self._lines_path.open("a", encoding="utf-8")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values of a step. When this returns, the operating system has the line: it survives a kill of the process."""
        if self._lines is None:
            return
        plain = {name: float(value) for name, value in values.items()}
        now = time.time()
        self._lines.write(json.dumps({"step": step, "time": now, "values": {n: _to_json(v) for n, v in plain.items()}}, allow_nan=False) + "\n")
        self._lines.flush()
        events = self._open_events(step)
        for name, value in plain.items():
            events.add_scalar(shown_as(name), value, global_step=step, walltime=now)

    def histogram(self, step: int, name: str, edges: Sequence[float], counts: Sequence[float]) -> None:
        """Log a distribution to TensorBoard: how many values lie up to each of ``edges``, which ascend. Nothing is written where nothing was counted."""
        total = float(sum(counts))
        if not self.enabled or not total:
            return
        used = [place for place, count in enumerate(counts) if count]
        least = edges[used[0] - 1] if used[0] else 2 * edges[0] - edges[1]
        sums = [sum(count * edge**power for edge, count in zip(edges, counts, strict=True)) for power in (1, 2)]
        events = self._open_events(step)
        events.add_histogram_raw(shown_as(name), least, edges[used[-1]], int(total), *sums, list(edges), list(counts), global_step=step)

    def measured(self, step: int, update: Update) -> None:
        """Log what an update found out about each resblock."""
        if update.numerics:
            self.scalars(step, {f"numerics/{name}": value for name, value in update.numerics.items()})
        for name, (edges, counts) in update.histograms.items():
            self.histogram(step, f"numerics/{name}", edges, counts)

    def images(self, step: int, name: str, array_HWC: NDArray[np.uint8]) -> None:
        """Log a picture (uint8, [H, W, 3]) to TensorBoard, which does not enlarge small ones: use ``enlarged`` of train/report/images.py first."""
        if self.enabled:
            self._open_events(step).add_image(name, array_HWC, global_step=step, dataformats="HWC")

    def text(self, step: int, name: str, text: str) -> None:
        """Log text (Markdown) to TensorBoard."""
        if self.enabled:
            self._open_events(step).add_text(name, text, global_step=step)

    def describe(self, step: int, config: Mapping[str, Any], parents: Mapping[str, str]) -> None:
        """Log what is trained and from which inputs: the configuration and the lineage as text, and the stage's own keys as TensorBoard's hyperparameters."""
        if not self.enabled:
            return
        self.text(step, "configuration", _code(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False)))
        self.text(step, "lineage", _code("\n".join(f"{kind}: {digest}" for kind, digest in sorted(parents.items())) or "made from nothing else"))
        from torch.utils.tensorboard.summary import hparams

        # SummaryWriter.add_hparams would create a second TensorBoard run for them, in which each metric appears again.
        more = ("dalle", "dalle_fit") if self._stage == "align" else ()
        sections = [name for name in config if name in (self._stage, f"{self._stage}_fit", "run", "data", "zero", *more)]
        flat = {key: value for name in sections for key, value in _leaves(name, config[name])}
        for part in hparams(flat, dict.fromkeys(map(shown_as, _JUDGED_BY))):
            self._open_events(step).file_writer.add_summary(part, step)

    def flush(self) -> None:
        """Write everything to disk, and upload it if the run folder is on s3."""
        if self._lines is not None:
            self._lines.flush()
        if self._events is not None:
            self._events.flush()
        if self._temporary is None:
            return
        if self._lines_path.exists():
            storage.upload_file(self._lines_path, self._lines_url)
        for path in sorted(self._events_path.glob("*")):
            storage.upload_file(path, storage.join(self._events_url, path.name))

    def close(self) -> None:
        """Flush and release everything. Later calls do nothing."""
        if not self.enabled:
            return
        if self._events is not None:
            self._events.close()
            self._events = None
        self.flush()
        if self._lines is not None:
            self._lines.close()
            self._lines = None
        if self._temporary is not None:
            self._temporary.close()
            self._temporary = None
        self.enabled = False

    def _open_events(self, step: int) -> Any:
        if self._events is None:
            # Imported only here, because it imports torch, which takes seconds: programs that only read metrics are spared that.
            from torch.utils.tensorboard.writer import SummaryWriter

            kept_within.check(self._events_path / "events")
            # From this step on, TensorBoard hides what earlier attempts have written, as read_metrics does.
            self._events = SummaryWriter(str(self._events_path), purge_step=step)
            if self._stage in PANELS:  # in the file of each attempt: an earlier one may have known other plots
                from torch.utils.tensorboard.summary import custom_scalars

                self._events.file_writer.add_summary(custom_scalars(_layout(self._stage)))
        return self._events


def shown_as(name: str) -> str:
    """The tag of a metric in TensorBoard. TensorBoard sorts groups by name, so names get a number in front: the most important group comes first."""
    group, slash, rest = name.partition("/")
    if not slash:
        return name
    if name in _DEBUG:
        return f"9 debug/{rest}"
    if "_row_" in rest:  # one series for each row of image tokens: many, and less important than their mean
        return f"2 validation rows/{rest}"
    if rest.partition("_")[0] == "loss" and group in ("train", "eval"):
        return f"1 loss/{group} {rest}"
    return f"{_GROUPS.get(group, f'7 {group}')}/{rest}"


def _layout(stage: str) -> dict[str, dict[str, list[Any]]]:
    """The report's plots, as TensorBoard's custom layout: losses of training and validation in one plot, and so on."""
    return {TITLES[stage]: {panel.title: ["Multiline", [f"^{re.escape(shown_as(name))}$" for name, _ in panel.curves]] for panel in PANELS[stage]}}


def _leaves(name: str, value: Any) -> Iterator[tuple[str, bool | str | float | int]]:
    """The keys of a section in the form that TensorBoard accepts: plain values as they are, lists as JSON."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(f"{name}.{key}", inner)
    else:
        yield name, value if isinstance(value, bool | str | float | int) else json.dumps(value, ensure_ascii=False)


def _code(text: str) -> str:
    """Indent text so that Markdown shows it as code, unchanged."""
    return "\n".join(f"    {line}" for line in text.splitlines())


def next_attempt(run_url: str, stage: str) -> int:
    """The number of the next file of metrics: one more than the largest in use, 0 for the first."""
    return max(_attempts(run_url, stage), default=-1) + 1


def newest_attempt_times(run_url: str, stage: str) -> dict[int, float]:
    """Step -> when the newest attempt logged it last (seconds since 1970). Empty if there is no attempt."""
    attempts = _attempts(run_url, stage)
    if not attempts:
        return {}
    data = storage.read_bytes(storage.join(_folder(run_url, stage), f"{_PREFIX}{max(attempts)}{_SUFFIX}"))
    return {step: when for step, when, _ in _read_lines(data)}


def read_metrics(run_url: str, stage: str) -> dict[str, list[Point]]:
    """All series of a stage, each in the order of steps, with its attempts merged.

    An attempt whose first step is s repeats the work of earlier attempts from s on. So their values of steps after s are dropped, in every series. At s itself
    its own value replaces theirs, if it has one: an attempt that only had to finish the stage may have none. Incomplete lines, which a killed process leaves,
    are ignored.

    Raises:
        DataError: a file exists and cannot be read.
    """
    kept: list[tuple[int, float, dict[str, float]]] = []
    limit: float = math.inf
    for attempt in sorted(_attempts(run_url, stage), reverse=True):
        lines = list(_read_lines(storage.read_bytes(storage.join(_folder(run_url, stage), f"{_PREFIX}{attempt}{_SUFFIX}"))))
        kept = [line for line in lines if line[0] <= limit] + kept
        limit = min([limit, *(line[0] for line in lines)])
    series: dict[str, dict[int, Point]] = {}
    for step, when, values in kept:
        for name, value in values.items():
            series.setdefault(name, {})[step] = Point(step, float(value), when)
    return {name: [points[step] for step in sorted(points)] for name, points in sorted(series.items())}


def throughput(count: float, seconds: float) -> float:
    """``count`` per second; 0 if no time has passed."""
    return count / seconds if seconds > 0 else 0.0


def _folder(run_url: str, stage: str) -> str:
    return storage.join(run_url, stage, "metrics")


def _attempts(run_url: str, stage: str) -> list[int]:
    names = storage.list_files(_folder(run_url, stage))
    numbers = [name.removeprefix(_PREFIX).removesuffix(_SUFFIX) for name in names if name.startswith(_PREFIX) and name.endswith(_SUFFIX)]
    return [int(number) for number in numbers if number.isdecimal()]


def _read_lines(data: bytes) -> Iterator[tuple[int, float, dict[str, float]]]:
    for line in data.splitlines():
        try:
            found = strict_json.loads_record(line.decode())
            yield int(found["step"]), float(found["time"]), {str(name): float(value) for name, value in found["values"].items()}
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            # An incomplete line that a killed process left, or a damaged one. Lines do not depend on each other, so the others are used.
            continue


def _to_json(value: float) -> float | str:
    """JSON has no NaN and no infinity: such values become strings that ``float()`` reads."""
    return value if math.isfinite(value) else str(value)
