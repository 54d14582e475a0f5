"""The seconds of an update that ``plan`` predicts from rates of this machine, and those that it takes. ``launcher.py bench plan``

Updates are those of stage dalle: its engine, optimizer and messages on random tokens. Every process has one core. Around each update the rates of the same cores are
measured, which take the place of a GPU's datasheet in the plan; all sizes come in turns. One number is fitted, on one size: which fraction of those rates an update reaches.

Seconds are those that a core is busy (all threads of a process, the kernel's share included), so that what others on the machine take of its time does not count; what they
take of its caches and memory does. On a quiet machine they are seconds of a clock, but for waits for other processes.
Needs all dependencies.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from infra.world import World
from model.transformer import quick_gelu
from train.bench.harness import Result, main, start
from train.config import RunConfig, load_run
from train.machine.rates import DTYPES, Figure, Options, milliseconds
from train.planning import estimate, passes
from train.planning.demo_time_probe import dalle_update
from train.planning.estimate import Efficiency, Setting
from train.planning.hardware import Gpu
from train.planning.states import Cluster
from train.ranks.device import keep_memory

LOWEST, HIGHEST = 0.8, 1.2
"""Goal: predicted over measured."""
_STREAM = (
    "tokenizer.vocab=4096",
    "tokenizer.max_tokens=64",
    "dvae.vocab=1024",
    "dalle.layers=4",
    "dalle.conv_kernel=11",
    "dalle.attention=structured",
)
"""64 text states and 256 of 16 x 16 codes."""
_PRODUCT = (2560, 512, 2048)
_ROWS, _WIDTH, _KEYS = 1280, 512, 128
"""Of the stream on which passes are measured, and scores of a softmax."""
_COPIED, _BUCKET = 1 << 24, 4_000_000
_MOMENT_S = 0.04
"""Seconds for each rate, each time."""


@dataclass(frozen=True)
class Case:
    """A size that is trained."""

    width: int
    batch: int
    """Samples of each process."""
    precision: str = "bf16"
    stage: int = 2
    processes: int = 1
    more: str = ""
    """One more override of the configuration."""

    @property
    def name(self) -> str:
        """For people."""
        alone = f"{self.precision}, width {self.width}, {self.batch} samples"
        several = f", ZeRO {self.stage} over {self.processes} processes" if self.processes > 1 else ""
        return alone + several + (f", {self.more.partition('.')[2]}" if self.more else "")

    def config(self) -> RunConfig:
        """A run of this size."""
        words = [
            f"dalle.width={self.width}",
            f"dalle.heads={max(1, self.width // 64)}",
            f"dalle_fit.precision={self.precision}",
            f"zero.stage={self.stage}",
        ]
        words += [f"dalle_fit.batch={self.batch * self.processes}", "dalle_fit.accumulation=1", "dalle_fit.ema_every=25"]
        return load_run("demo", [*_STREAM, *words, *([self.more] if self.more else [])])


REFERENCE = Case(512, 4)
"""The one on which the efficiency is fitted."""
CASES = (
    REFERENCE,
    Case(256, 8),
    Case(768, 4),
    Case(1024, 2),
    Case(512, 4, more="dalle_fit.activation_checkpointing=true"),
    Case(512, 4, more="dalle_fit.logits=bf16"),
    Case(256, 8, "fp32"),
    Case(512, 4, "fp32"),
    Case(768, 2, "fp32"),
    Case(256, 8, processes=2),
    Case(512, 4, stage=1, processes=2),
    Case(512, 4, processes=2),
    Case(512, 4, stage=3, processes=2),
    Case(512, 4, "fp32", processes=2),
)


@dataclass(frozen=True)
class Rates:
    """What cores reach: GFLOP/s of products, GB/s of copies, of passes over activations in the case's dtype, and of sums; microseconds of a small sum."""

    fp32: float
    bf16: float
    copies: float
    passes: float
    sums: float
    message: float

    def described(self) -> Gpu:
        """As ``plan`` reads it. Memory and power do not matter to time."""
        return Gpu(
            memory_gb=1.0,
            tflops_16bit=self.bf16 / 1e3,
            memory_gb_s=self.copies,
            link_gb_s=self.sums,
            network_gb_s=self.sums,
            watts=1.0,
            source="measured",
            tflops_fp32=self.fp32 / 1e3,
            passes_gb_s=self.passes,
            message_us=self.message,
            computes_while_sending=False,
        )


@dataclass(frozen=True)
class Turn:
    """One update of a size, with the rates around it."""

    rates: Rates
    seconds: float
    """That the core of a process was busy, as a mean over processes."""
    wall: float


def run(options: Options) -> Result:
    """Measure all sizes."""
    return compare(CASES, REFERENCE, replace(options, device="cpu"))


def compare(cases: Sequence[Case], reference: Case, options: Options) -> Result:
    """Predicted and measured seconds of some sizes, with the efficiency that fits one of them."""
    result = start(
        "plan", "Seconds of an update: predicted by plan, and measured", options, cores_of_a_process=1, layers=4, states=320, turns=options.runs
    )
    found: dict[Case, list[Turn]] = {}
    for processes in sorted({case.processes for case in cases}):
        found |= measured([case for case in cases if case.processes == processes], processes, options)
    reached = fitted(reference, found[reference])
    _describe(result, found)
    result.measured["share of the rates that an update reaches"] = Figure(100 * reached, 100 * reached, 100 * reached, "%", options.runs)
    met = 0
    for case in cases:
        add(result, case, found[case], reached, is_fitted=case == reference)
        met += case != reference and is_met(ratio(case, found[case], reached))
    result.settings["load_at_end"] = round(os.getloadavg()[0], 1)
    result.notes += [
        f"Fitted: one number, the share, on '{reference.name}' alone. All other sizes are predictions: {met} of {len(cases) - 1} within the goal of {LOWEST:g} to {HIGHEST:g} "
        "times what was measured. The ratio is that of the smaller to the larger of both, so that either goal is a lower limit.",
        "Rates are those of each turn, measured right before and after its update on the same cores: a projection's three products, copies of 64 MB, passes "
        "(norm, casts, sum, GELU, softmax and copies, forward and backward, alone), sums between the processes.",
        "Seconds are those that a core is busy, as others share the machine; how much longer the clock ran is said above.",
        "Updates are those of stage dalle without reading data and logging: one core each, the structured engine, a vocabulary of 4,096 and 1,024 codes.",
    ]
    return result


def predicted(case: Case, rates: Rates, reached: float) -> float:
    """Seconds of an update by the plan's formulas."""
    setting = Setting.configured(case.config(), Cluster(1, case.processes))
    return estimate.times(setting, rates.described(), Efficiency(reached, reached)).expected


def fitted(case: Case, found: Sequence[Turn]) -> float:
    """The share of the rates with which the prediction is right in the middle of the turns."""
    return ratio(case, found, 1.0)


def ratio(case: Case, found: Sequence[Turn], reached: float) -> float:
    """Predicted over measured seconds, each in the middle of the turns."""
    return statistics.median(predicted(case, turn.rates, reached) for turn in found) / statistics.median(turn.seconds for turn in found)


def is_met(value: float) -> bool:
    """Whether a ratio is as close to one as it should be."""
    return LOWEST <= value <= HIGHEST


def add(result: Result, case: Case, found: Sequence[Turn], reached: float, *, is_fitted: bool) -> None:
    """Both figures of a size, and the smaller over the larger."""
    said, took = f"predicted, {case.name}", f"update, {case.name}"
    result.measured[took] = milliseconds([turn.seconds for turn in found])
    result.measured[said] = milliseconds([predicted(case, turn.rates, reached) for turn in found])
    below = result.measured[said].value < result.measured[took].value
    words = "fitted" if is_fitted else "predicted below" if below else "predicted above"
    smaller, larger = (said, took) if below else (took, said)
    result.ratio(f"{words}, {case.name}", smaller, larger, goal=None if is_fitted else LOWEST if below else 1 / HIGHEST)


def _describe(result: Result, found: Mapping[Case, Sequence[Turn]]) -> None:
    """The rates as figures: of all turns, by the number of processes."""
    units = {"fp32": "GFLOP/s", "bf16": "GFLOP/s", "copies": "GB/s", "passes": "GB/s", "sums": "GB/s", "message": "microseconds"}
    for processes in sorted({case.processes for case in found}):
        over = f"{processes} process{'es' if processes > 1 else ''}"
        stretched = [turn.wall / turn.seconds for case, turns in found.items() if case.processes == processes for turn in turns]
        middle = statistics.median(stretched)
        result.measured[f"seconds of the clock over those of the core, {over}"] = Figure(
            middle, min(stretched), max(stretched), "times", len(stretched)
        )
        for name, unit in units.items():
            for precision in sorted({case.precision for case in found}) if name == "passes" else ("",):
                values = [
                    getattr(turn.rates, name)
                    for case, turns in found.items()
                    if case.processes == processes and precision in ("", case.precision)
                    for turn in turns
                ]
                if values and not (name in ("sums", "message") and processes == 1):
                    what = f"{name}{f' in {precision}' if precision else ''}, {over}"
                    result.floor[what] = Figure(statistics.median(values), min(values), max(values), unit, len(values))


# --- Measuring ----------------------------------------------------------------------------------------------------------------------------


def measured(cases: Sequence[Case], processes: int, options: Options) -> dict[Case, list[Turn]]:
    """Rates and seconds of each turn."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, args=(processes, folder, list(cases), options), nprocs=processes)  # type: ignore[no-untyped-call]
        rows = json.loads(Path(folder, "found.json").read_text())
    return {case: [Turn(Rates(*rates), seconds, wall) for rates, seconds, wall in turns] for case, turns in zip(cases, rows, strict=True)}


def _rank(rank: int, processes: int, folder: str, cases: list[Case], options: Options) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    keep_memory()
    world = World(rank, processes, rank, processes)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", processes), rank=rank, world_size=processes)
    updates = [dalle_update(case.config(), DTYPES[case.precision], world) for case in cases]
    for update in updates:
        update()
    found: list[list[tuple[list[float], float, float]]] = [[] for _ in cases]
    seconds = _MOMENT_S * options.seconds
    for _ in range(options.runs):
        for case, update, turns in zip(cases, updates, found, strict=True):
            before = _rates(case, seconds, processes)
            dist.barrier()
            began, clock = time.process_time(), time.perf_counter()
            update()
            took, waited = time.process_time() - began, time.perf_counter() - clock
            after = _rates(case, seconds, processes)
            busy = torch.tensor([took], dtype=torch.float64)
            dist.all_reduce(busy)
            turns.append(([(a + b) / 2 for a, b in zip(before, after, strict=True)], busy.item() / processes, waited))
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # gloo's thread may need the GIL while the interpreter ends (train/planning/demo_time_probe.py)


def _rates(case: Case, seconds: float, processes: int) -> list[float]:
    """The fields of Rates, as a mean over processes that measure at the same time."""
    dist.barrier()
    m, k, n = _PRODUCT
    found = [6e-9 * m * k * n / _each(products(dtype), seconds) for dtype in (torch.float32, torch.bfloat16)]
    source, target = torch.ones(_COPIED), torch.empty(_COPIED)
    found.append(8e-9 * _COPIED / _each(partial(target.copy_, source), seconds))
    work, count = passing(DTYPES[case.precision])
    found.append(1e-9 * count / _each(work, seconds))
    if processes == 1:
        return [*found, 1.0, 0.0]
    values = torch.tensor(found, dtype=torch.float64)
    dist.all_reduce(values)
    bucket, small = torch.zeros(_BUCKET), torch.zeros(100, dtype=torch.float64)
    sent = 4e-9 * _BUCKET * 2 * (processes - 1) / processes
    return [*(values / processes).tolist(), sent / _equally(bucket, 2), 1e6 * _equally(small, 20)]


def products(dtype: torch.dtype) -> Callable[[], None]:
    """The product of a projection, and the two of its backward pass, whose operands lie the other way."""
    m, k, n = _PRODUCT
    x, weight, gradient = torch.ones(m, k, dtype=dtype), torch.ones(n, k, dtype=dtype), torch.ones(m, n, dtype=dtype)

    def work() -> None:
        torch.mm(x, weight.t())
        torch.mm(gradient, weight)
        torch.mm(gradient.t(), x)

    return work


def passing(dtype: torch.dtype) -> tuple[Callable[[], None], float]:
    """What a resblock does beside products, forward and backward, and the bytes that the plan's formulas count for it."""
    norm, size = nn.LayerNorm(_WIDTH), torch.empty((), dtype=dtype).element_size()
    x = torch.randn(_ROWS, _WIDTH, requires_grad=True)
    wide = torch.randn(_ROWS, 4 * _WIDTH, dtype=dtype).requires_grad_()
    scores = torch.randn(_ROWS * _WIDTH // _KEYS, _KEYS, dtype=dtype).requires_grad_()
    gradients: list[Tensor] = [torch.ones(_ROWS, _WIDTH), torch.ones_like(wide), torch.ones_like(scores)]

    def work() -> None:
        h = norm(x).to(dtype).view(_WIDTH // 64, -1, 64).transpose(0, 1).contiguous().view(_ROWS, _WIDTH)
        outputs = (x + h.to(torch.float32), quick_gelu(wide), scores.softmax(-1))
        torch.autograd.backward(outputs, gradients)
        x.grad = wide.grad = scores.grad = None

    elements = _ROWS * _WIDTH
    stream = 4 * (passes.NORM + passes.NORM_BACKWARD + 2 * passes.ADD) + (4 * (4 + size) if size != 4 else 0)
    branch = size * (4 * (passes.GELU + passes.GELU_BACKWARD) + passes.SOFTMAX + passes.SOFTMAX_BACKWARD + 2 * passes.COPY)
    return work, float(elements * (stream + branch))


def _each(work: Callable[[], object], seconds: float) -> float:
    """Seconds of the core for one call, after one to warm up."""
    work()
    calls, began = 0, time.process_time()
    while True:
        work()
        calls += 1
        if (elapsed := time.process_time() - began) >= seconds:
            return elapsed / calls


def _equally(values: Tensor, times: int) -> float:
    """Seconds of the core for one sum, equally often in all processes."""
    dist.barrier()
    began = time.process_time()
    for _ in range(times):
        dist.all_reduce(values)
    return (time.process_time() - began) / times


if __name__ == "__main__":
    main(run)
