"""Writes the computed part of docs/scale.md and its plot: scaling of the presets over machines by ``plan``'s formulas, and goodput where machines fail.
``python -m train.experiments.scale``"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from infra.errors import ConfigError
from infra.repository import DOCS
from train.config import RunConfig, load_run
from train.experiments.precision_page import alone
from train.planning import estimate, failures
from train.planning.estimate import Setting
from train.planning.failures import Job
from train.planning.flops import train_flops
from train.planning.hardware import GPUS
from train.planning.states import Cluster, count
from train.report.plots import Line, lines

GPU = "H100-80GB"
SIZES = (8, 16, 32, 64, 128, 256, 512, 1024)
_A_NODE = 8
_BEGIN, _END = "<!-- computed: python -m train.experiments.scale -->", "<!-- end of what is computed -->"
PICTURE = "goodput.svg"
WEAK_SAMPLES = 4
"""Samples of each GPU in the tables of weak scaling."""

HOURS = {"Llama 3": 50_700.0, "RSC-1": 8_100.0}
"""Mean hours of one GPU between failures of its job: 419 unexpected interruptions in 54 days of 16,384 GPUs (The Llama 3 Herd of Models, 2024, table 5), and 7.9 hours
between failures of jobs of 1,024 GPUs (Kokolis et al. 2024, Revisiting Reliability in Large-Scale Machine Learning Research Clusters)."""
NOTICED_S, STARTED_S, COMPILED_S, REQUEUED_S = 65.0, 13.0, 60.0, 60.0
"""Measured: until a lost process has ended the others, at most, and the start of processes (docs/simulated_day.md). Assumed: the first update, which compiles, and the
scheduler."""
STORAGE_MB_S, COPY_GB_S = 100.0, 20.0
"""Assumed: what each rank writes to the storage or reads from it, and copies to pinned memory."""
STALL_OF_A_COPY, LEAST_STALL_S = 0.75, 0.002
"""A save's stall: at most so much of copying its bytes, which is the goal, and at least what bench checkpoint measured."""
_HORIZON_S, _SEEDS = 30 * 86400.0, 40
_COMPUTING = "computing"
_PARTS = {
    "compute": _COMPUTING,
    "inside": "links inside machines",
    "outside": "network",
    "optimizer": "memory (optimizer)",
    "gathering": "gathering parameters",
}


@dataclass(frozen=True)
class Row:
    """One size of a table."""

    gpus: int
    batch: int
    seconds: float
    tokens_s: float
    mfu: float
    bound: str
    fits: bool


def rows(preset: str, *, weak: bool) -> list[Row]:
    """The preset on each number of GPUs, with its own batch ('strong'), or with WEAK_SAMPLES a GPU."""
    found = []
    for gpus in SIZES:
        batch = WEAK_SAMPLES * gpus if weak else load_run(preset, []).dalle_fit.batch
        cfg = _fitting(preset, batch, gpus)
        setting = Setting.configured(cfg, Cluster(gpus // _A_NODE, _A_NODE))
        times, gpu = estimate.times(setting, GPUS[GPU]), GPUS[GPU]
        tokens_s = batch * cfg.stream_shape().states / times.expected
        flops = tokens_s * train_flops(cfg.dalle, cfg.stream_shape()) / cfg.stream_shape().states
        if times.is_exposed:
            largest = {
                _COMPUTING if times.compute > times.inside else "links inside machines": max(times.compute, times.inside),
                "network": times.outside,
            }
        else:
            largest = {words: getattr(times, part) for part, words in _PARTS.items()}
        bound = max(largest, key=lambda words: largest[words])
        fits = estimate.memory(setting).total <= estimate.room(gpu.memory_gb)
        found.append(Row(gpus, batch, times.expected, tokens_s, flops / gpus / gpu.tflops_16bit / 1e12, bound, fits))
    return found


def _fitting(preset: str, batch: int, gpus: int) -> RunConfig:
    """The preset with so much accumulation that it fits into memory; with the least there can be, if none does."""
    first = None
    for micro_batches in (1, 2, 4, 8, 16, 32, 64, 128):
        cfg = load_run(preset, [f"dalle_fit.batch={batch}", f"dalle_fit.accumulation={micro_batches}"])
        setting = Setting.configured(cfg, Cluster(gpus // _A_NODE, _A_NODE))
        try:
            needed = estimate.memory(setting).total
        except ConfigError:  # fewer samples than micro-batches
            break
        first = first or cfg
        if needed <= estimate.room(GPUS[GPU].memory_gb):
            return cfg
    assert first is not None
    return first


def job(preset: str, gpus: int, hours: float) -> Job:
    """The preset on so many GPUs, whose failures are as frequent as ``hours`` says."""
    cfg = load_run(preset, [])
    shards = _A_NODE if cfg.zero.sharding == "node" else gpus  # of which one machine writes
    held = 16 * count(cfg.dalle, cfg.stream_shape()).total / shards
    write = held / (STORAGE_MB_S * 1e6)
    restart = NOTICED_S + REQUEUED_S + STARTED_S + COMPILED_S + write
    return Job(hours * 3600 / gpus, max(LEAST_STALL_S, STALL_OF_A_COPY * held / (COPY_GB_S * 1e9)), write, restart)


def computed() -> str:
    """The tables, as Markdown."""
    gpu = GPUS[GPU]
    parts = [
        "## Scaling on paper\n",
        f"By the formulas of `launcher.py plan`, on {GPU} in machines of eight ({gpu.tflops_16bit:g} TFLOP/s, {gpu.link_gb_s:g} GB/s to its neighbours, {gpu.network_gb_s:g} GB/s "
        f"network a GPU; fp32 products, such as those for logits, at {gpu.fp32_rate:g} TFLOP/s, as nothing turns TF32 on; products at {estimate.EFFICIENCY:.0%} of the datasheet, links and memory "
        f"at {estimate.LINK_EFFICIENCY:.0%}: assumed, and confirmed on no GPU). Each table "
        "uses the preset's own ZeRO stage and layout, and as much accumulation as its memory needs. **Share**: of the speed that 8 GPUs would have, multiplied. **Bound by**: "
        "the longest part of an update; computing is products and what is read and written beside them. Bytes and rates alone: no latency of messages, no congestion and no straggler, so the largest sizes are flattered.\n",
    ]
    for preset in ("1.2B", "12B"):
        for weak in (False, True):
            parts += [_scaling(preset, rows(preset, weak=weak), weak=weak)]
    parts += [_goodput()]
    return "\n".join(parts)


def _scaling(preset: str, found: Sequence[Row], *, weak: bool) -> str:
    kind = f"weak scaling, {WEAK_SAMPLES} samples a GPU" if weak else f"strong scaling, {found[0].batch:,} samples in all"
    table = [
        f"### {preset}, {kind}\n",
        "| GPUs | batch | s an update | tokens/s | share | of the datasheet | bound by |",
        "|---:|---:|---:|---:|---:|---:|---|",
    ]
    base = found[0]
    for row in found:
        share = row.tokens_s / base.tokens_s / (row.gpus / base.gpus)
        note = "" if row.fits else " (does not fit)"
        table.append(f"| {row.gpus:,} | {row.batch:,} | {row.seconds:.3g} | {row.tokens_s:,.0f} | {share:.0%} | {row.mfu:.0%} | {row.bound}{note} |")
    return "\n".join(table) + "\n"


def _goodput() -> str:
    table = [
        "## Goodput where machines fail\n",
        f"A failure ends the whole job, which goes on from its newest complete checkpoint. Simulated for 30 days, {_SEEDS} seeds (`train/planning/failures.py`; ± is the standard error). "
        "Mean hours of one GPU between failures: "
        + "; ".join(f"{hours:,.0f} ({name})" for name, hours in HOURS.items())
        + ", by the reports of Llama 3 (419 unexpected interruptions in "
        "54 days of 16,384 GPUs) and of Meta's research cluster RSC-1 (7.9 hours between failures of jobs of 1,024 GPUs).\n",
        f"A restart: {NOTICED_S:g} s until the loss is noticed and {STARTED_S:g} s for the start of processes (measured at two ranks: docs/simulated_day.md), {REQUEUED_S:g} s for the scheduler and "
        f"{COMPILED_S:g} s for the first update (assumed), and reading 16 bytes a parameter at {STORAGE_MB_S:g} MB/s a rank (assumed). A save stalls for {STALL_OF_A_COPY:g} of copying its bytes at "
        f"{COPY_GB_S:g} GB/s (the goal), and is written beside training. **Best interval**: Daly's, and no shorter than the writing. **By formula**: to first order.\n",
        "| preset | GPUs | failures | hours between | restart, s | Young, s | Daly, s | best interval, s | goodput | by formula | at the preset's save_every |",
        "|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for preset in ("1.2B", "12B"):
        usual = {row.gpus: row.seconds for row in rows(preset, weak=False)}
        every = load_run(preset, []).dalle_fit.save_every
        for gpus in (64, 256, 1024):
            for name, hours in HOURS.items():
                found, work = job(preset, gpus, hours), failures.interval(job(preset, gpus, hours))
                good, error = failures.simulated(found, work, _HORIZON_S, _SEEDS)
                own, _ = failures.simulated(found, every * usual[gpus], _HORIZON_S, _SEEDS)
                table.append(
                    f"| {preset} | {gpus:,} | {name} | {found.between_failures / 3600:,.1f} | {found.restart:.0f} | {failures.young(found):.0f} | {failures.daly(found):.0f} | "
                    f"{work:.0f} | {good:.2%} ± {error:.2%} | {failures.expected(found, work):.2%} | {own:.2%} ({every * usual[gpus]:.0f} s) |"
                )
    return "\n".join([*table, "", f"![Goodput over the interval between saves](pictures/{PICTURE})\n"])


def picture() -> str:
    """Goodput of 12B over the interval between saves, for three sizes, as an SVG file."""
    intervals = [30 * 1.6**place for place in range(14)]
    found = [
        Line(
            f"{gpus:,} GPUs",
            [(work / 60, 100 * failures.simulated(job("12B", gpus, HOURS["RSC-1"]), work, _HORIZON_S, _SEEDS)[0]) for work in intervals],
        )
        for gpus in (64, 256, 1024)
    ]
    return alone(lines("goodput", "useful share of the time, %", found, across="minutes of work between saves (12B, failures as on RSC-1)"))


def page(text: str) -> str:
    """docs/scale.md with its computed part made anew."""
    head, _, rest = text.partition(_BEGIN)
    tail = rest.partition(_END)[2]
    return f"{head}{_BEGIN}\n\n{computed()}\n{_END}{tail}"


if __name__ == "__main__":
    (DOCS / "scale.md").write_text(page((DOCS / "scale.md").read_text()))
    (DOCS / "pictures" / PICTURE).write_text(picture())
    print("docs/scale.md")
