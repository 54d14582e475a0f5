"""Measures the rates of a machine: the median of repeated runs, matrix products, copies. Also describes the device. Needs no library but torch."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def name_of(dtype: torch.dtype) -> str:
    """The name of one of DTYPES."""
    return next(name for name, value in DTYPES.items() if value == dtype)


@dataclass(frozen=True)
class Options:
    """How to run a benchmark."""

    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """'cpu' or 'cuda'."""
    seconds: float = 1.0
    """Time spent on each figure."""
    runs: int = 5
    """Number of runs that share this time; the figure is their median."""
    folder: Path | None = None
    """Where figures are kept while others are still being measured; None keeps them nowhere."""


@dataclass(frozen=True)
class Figure:
    """A measured figure: the median of several runs, with its extremes."""

    value: float
    min: float
    max: float
    unit: str
    runs: int


def describe_device(device: str) -> dict[str, Any]:
    """Name and size of the device: the GPU, or the processor as Linux names it."""
    if device == "cuda":
        found = torch.cuda.get_device_properties(0)
        return {"kind": "cuda", "name": found.name, "memory_gib": round(found.total_memory / 2**30), "cores": found.multi_processor_count}
    facts = _cpu_facts()
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in facts.get("flags", "").split()]
    return {"kind": "cpu", "name": facts.get("model name", platform.machine()), "cores": os.cpu_count() or 1, "flags": flags}


def _cpu_facts() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines()
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def measure(work: Callable[[], object], amount: float, unit: str, options: Options) -> Figure:
    """Measure the rate of ``work`` in ``unit`` per second, where each call does ``amount`` units: one call to warm up, then ``runs`` timed runs."""
    return measure_in_turns({unit: work}, amount, unit, options)[unit]


def measure_in_turns(works: Mapping[str, Callable[[], object]], amount: float, unit: str, options: Options) -> dict[str, Figure]:
    """Like ``measure``, of several works by name: each run of all of them comes before the next run of any, so that a machine whose speed drifts treats them alike."""
    for work in works.values():
        work()
    rates: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(options.runs):
        for name, work in works.items():
            rates[name].append(_rate(work, amount, options.device, options.seconds / options.runs))
    return {name: Figure(statistics.median(of), min(of), max(of), unit, options.runs) for name, of in rates.items()}


def milliseconds(seconds: Sequence[float]) -> Figure:
    """The median of measured times."""
    return Figure(1e3 * statistics.median(seconds), 1e3 * min(seconds), 1e3 * max(seconds), "ms", len(seconds))


def mean_with_error(values: Sequence[float], unit: str) -> Figure:
    """The mean of at least two values, with one standard error below and above it as its extremes."""
    mean, error = statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5
    return Figure(mean, mean - error, mean + error, unit, len(values))


def _rate(work: Callable[[], object], amount: float, device: str, seconds: float) -> float:
    calls, began = 0, now(device)
    while True:
        work()
        calls += 1
        # On a GPU, now waits for the call to end, so that not more is queued than the time allows. The work is large enough for the wait not to matter.
        elapsed = now(device) - began
        if elapsed >= seconds:
            return amount * calls / elapsed


def now(device: str) -> float:
    """Seconds, once the device has done what was asked of it."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use ``count`` threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def matmul_rate(dtype: torch.dtype, options: Options, size: tuple[int, int, int] | None = None) -> Figure:
    """GFLOP/s of a matrix product [m, k] x [k, n] with the current number of threads. The default size depends on the device."""
    m, k, n = size or ((8192, 8192, 8192) if options.device == "cuda" else (1024, 1024, 1024))
    a, b = (torch.randn(shape, device=options.device).to(dtype) for shape in ((m, k), (k, n)))
    out = torch.empty(m, n, dtype=dtype, device=options.device)
    return measure(lambda: torch.mm(a, b, out=out), 2e-9 * m * k * n, "GFLOP/s", options)


def copy_rate(options: Options) -> Figure:
    """GB/s of a large copy with the current number of threads; bytes read and bytes written are both counted."""
    count = (1 << 30) if options.device == "cuda" else (1 << 27)
    source = torch.zeros(count, dtype=torch.uint8, device=options.device)
    target = torch.empty_like(source)
    return measure(lambda: target.copy_(source), 2e-9 * count, "GB/s", options)


def probe(seconds: float = 1.0) -> dict[str, float]:
    """GFLOP/s of matrix products for each dtype, on the CPU with the current number of threads. Takes about ``seconds``.

    The shape is that of a small transformer's MLP. The dtypes are measured in turns, and the best turn of each counts, so that other load on the machine affects
    them equally.
    """
    turns, names = 3, ("fp32", "bf16")
    options = Options(device="cpu", seconds=seconds / (2 * turns * len(names)), runs=1)
    best = dict.fromkeys(names, 0.0)
    for _ in range(turns):
        for name in names:
            best[name] = max(best[name], matmul_rate(DTYPES[name], options, size=(2048, 256, 1024)).value)
    return best
