"""``launcher.py plan PRESET``: estimates the memory, time and cost of training the transformer, without a GPU. Needs no torch."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

from infra import progress
from infra.errors import ConfigError, ReportedError, UsageError
from infra.run_folder import RunFolder
from train.config import load_run
from train.evaluation import data_limit
from train.planning import estimate, network, requests, samples, states
from train.planning.estimate import Setting
from train.planning.flops import layer_pairs, train_flops
from train.planning.hardware import Gpu, named
from train.planning.out_of_memory import smaller
from train.planning.states import Cluster, Layout
from train.planning.update_times import Times
from train.planning.wire import Sent

_GB, _MB = 1e9, 1e6
_MUCH_LESS = 0.67
"""Share of the bytes below which another ZeRO stage is named."""


def main(
    preset: str,
    overrides: list[str],
    *,
    nodes: int,
    gpus: int,
    memory: float,
    gpu: str,
    tokens: float,
    rank: int,
    price: float = 0.0,
    check: bool = False,
) -> None:
    """Print the estimates.

    Args:
        nodes: number of machines; 0: cluster.nodes.
        gpus: number of GPUs in each; 0: cluster.gpus, or one if that is 0.
        memory: GB of memory of a GPU; 0: from its datasheet.
        tokens: length of the training in positions of the stream; 0: dalle_fit.steps updates.
        gpu: name of a datasheet, the beginning of one, or its numbers (``hardware.named``).
        price: price of one GPU for one hour, in any currency; 0: no cost is shown.
        check: also compare them with the engine, for one rank in this process (``train.planning.check``), which needs torch and minutes.
        rank: total rank of gradient compression between machines; 0: the rank of the paper's Table 1 for its widths, otherwise no compression.

    Raises:
        UsageError: the GPU is unknown.
        ConfigError: with the preset's ZeRO stage it does not fit into the memory, or its batch cannot be divided evenly.
        ReportedError: the engine does otherwise than planned.
    """
    try:
        gpu, figures = named(gpu)
    except ValueError as error:
        raise UsageError(f"--gpu {gpu}: {error}") from error
    cfg = load_run(preset, overrides)
    own = Setting.configured(cfg, Cluster(nodes or cfg.cluster.nodes, gpus or cfg.cluster.gpus or 1))
    room = estimate.room(memory or figures.memory_gb)
    print("\n".join([*describe(preset, own), "", *table(own, room, rank or own.rank or network.smallest_rank(cfg.dalle.width)), ""]))
    print("\n".join(costs(own, figures, gpu, tokens or None)))
    aligned = aligning(own)
    if aligned:
        print("\n".join(aligned_lines(aligned, figures, gpu)))
    if limit := data(preset, own):
        print(limit)
    print("\n".join(requests.lines(own.cluster.nodes, own.cluster.gpus, cfg.dalle_fit.keep)))
    print("\n".join(samples.line(cfg)), end="\n" if cfg.samples.every else "")
    if price:
        hours = estimate.bill(own, figures, tokens or None).gpu_hours
        print(
            f"cost                 {hours * price:,.0f} at {price:g} for each of {_short(hours)} GPU hours; the dVAE, storage and failed attempts come on top"
        )
    _refuse_too_large(preset, own, aligned, room)
    if check:
        compare(own)


def _refuse_too_large(preset: str, own: Setting, aligned: Setting | None, room: float) -> None:
    cfg = own.cfg
    needed = estimate.memory(own).total + (samples.memory(cfg) if cfg.samples.every and cfg.samples.device == "cuda" else 0)
    if needed > room:
        raise ConfigError(
            f"{preset} as configured (zero.stage = {own.stage}, {own.micro_batch} samples at once) needs {needed / _GB:.1f} GB of "
            f"{room / _GB:.1f} GB on each GPU: {remedies(own, room)}."
        )
    if aligned and (needed := estimate.memory(aligned).total) > room:
        raise ConfigError(
            f"{preset}: stage align needs {needed / _GB:.1f} GB of {room / _GB:.1f} GB on each GPU, as it computes each picture under two captions: "
            f"{remedies(aligned, room).replace('dalle_fit.accumulation', 'align_fit.accumulation')}."
        )


def aligning(setting: Setting) -> Setting | None:
    """Stage align as stage dalle would be configured to train like it; None if the run has none."""
    cfg = setting.cfg
    if not cfg.align_fit.steps:
        return None
    found = replace(setting, cfg=cfg.model_copy(update={"dalle_fit": cfg.fit("align")}))
    try:
        found.micro_batch  # noqa: B018 - computed to be checked
    except ConfigError as error:
        raise ConfigError(str(error).replace("dalle_fit.", "align_fit.")) from error
    return found


def aligned_lines(setting: Setting, figures: Gpu, gpu: str) -> list[str]:
    """What stage align takes."""
    fit, bill = setting.cfg.dalle_fit, estimate.bill(setting, figures, None)
    return [
        f"stage align          {fit.steps} updates of {fit.batch} pictures, {_short(bill.gpu_hours)} GPU hours on {gpu}; {estimate.memory(setting).total / _GB:,.2f} GB on each GPU",
        *contrasting(setting),
    ]


def data(preset: str, setting: Setting) -> str:
    """Whether data would be the limit; empty unless the preset is a run whose pictures are prepared."""
    cfg = setting.cfg
    done = RunFolder(preset).done("prepare") if "/" in preset and not preset.endswith((".toml", ".json")) else None
    splits = done["summary"].get("splits") if done else None
    images = splits.get("train") if isinstance(splits, dict) else None
    if not isinstance(images, int) or images <= 0:
        return ""
    return (
        f"data                 {data_limit.described(data_limit.Facts(images, cfg.dalle_fit.steps * cfg.dalle_fit.batch / images, cfg.encode.crops))}"
    )


def compare(setting: Setting) -> None:
    """Print the plan of rank 0 beside what the engine does there.

    Raises:
        ConfigError: a package is missing, or this configuration cannot be compared.
        ReportedError: they differ by more than they may.
    """
    try:
        from train.planning import check as checking  # imports torch and DeepSpeed
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"plan --check computes with {error.name}, which is not installed: pip install -r requirements.txt, or leave --check out."
        ) from error
    print(
        f"\nrank 0 of {setting.cluster.world}, in this process, without memory for its tensors; the second of two updates (some minutes) ...",
        flush=True,
    )
    found = checking.findings(setting)
    print(f"{'':50}{'plan':>15}{'engine':>15}")
    print("\n".join(finding.line for finding in found))
    if wrong := [finding.what for finding in found if not finding.is_right]:
        raise ReportedError(f"the engine does otherwise than planned: {', '.join(wrong)}. The formulas are in train/planning/.")
    most = max(found, key=lambda finding: abs(finding.apart) if finding.tolerance else 0.0)
    print(f"as planned: all {len(found)} figures; of those that may differ, '{most.what}' does most, by {most.apart:+.2%}")


def describe(preset: str, setting: Setting) -> list[str]:
    """Describe the model and the run: sizes and numbers of operations."""
    cfg = setting.cfg
    shape, found = cfg.stream_shape(), states.count(cfg.dalle, cfg.stream_shape())
    flops = train_flops(cfg.dalle, shape)
    return [
        f"{preset}: {cfg.dalle.layers} layers of width {cfg.dalle.width}, {cfg.dalle.heads} heads; {shape.text_tokens} + {shape.image_tokens} states",
        f"parameters           {found.total:,} (matrices {found.matrices:,}; embeddings {found.embeddings:,}; unembeddings {found.unembeddings:,}; "
        f"gains and biases {found.blocks_rest + found.final_norm:,})",
        f"operations           {flops / shape.states:.4g} for each token, forward and backward, without recomputation "
        f"({layer_pairs(cfg.dalle, shape):,} allowed pairs in a sample)",
        f"batch                {cfg.dalle_fit.batch} = {setting.cluster.nodes} nodes x {setting.cluster.gpus} GPUs x {cfg.dalle_fit.accumulation} micro-batches "
        f"x {setting.micro_batch} samples",
        *contrasting(setting),
    ]


def contrasting(setting: Setting) -> list[str]:
    """If captions are contrasted: what that takes."""
    if not setting.cfg.dalle_fit.contrasts:
        return []
    return [
        f"captions contrasted  each sample under two captions, so {2 * setting.micro_batch} at once in activations; frozen weights take {estimate.frozen(setting) / _GB:,.2f} GB "
        f"of the machine's memory for each GPU, and as much again for a checkpoint"
    ]


def variants(setting: Setting, rank: int | None) -> list[tuple[str, Setting]]:
    """The same model on the same machines with every ZeRO stage, layout and place of storage, by name. The configured one has a star."""
    layouts: tuple[Layout, ...] = get_args(Layout) if setting.cluster.nodes > 1 else ("flat",)
    if len(layouts) == 1:
        setting = replace(setting, layout="flat")  # with one machine, both layouts are the same
    plain = replace(setting, storage="cast", moment_bytes=8, half_gradients=False, rank=None)
    half = replace(setting, storage="half", moment_bytes=4, half_gradients=True, rank=None)
    found = [("DDP, fp32", replace(plain, stage=0, layout="flat"))]
    for layout in layouts:
        found += [(f"ZeRO {stage}, {layout}, fp32", replace(plain, stage=stage, layout=layout)) for stage in (1, 2, 3)]
    layout = layouts[-1]
    found += [(f"ZeRO {stage}, {layout}, 16-bit", replace(half, stage=stage, layout=layout)) for stage in (1, 2, 3)]
    if rank is not None and setting.cluster.nodes > 1 and rank % setting.cluster.gpus == 0:
        rest = setting.rest if setting.rank is not None else "1-6-9"
        found.append((f"ZeRO 3, node, 16-bit, rank {rank}", replace(half, stage=3, layout="node", rank=rank, rest=rest)))
    if all(variant != setting for _, variant in found):
        found.append(("as configured", setting))
    return [(f"* {name}" if variant == setting else f"  {name}", variant) for name, variant in found]


def table(setting: Setting, room: float, rank: int | None) -> list[str]:
    """Table of GB on each GPU and MB sent in each update, for every variant."""
    names = ("params", "masters", "moments", "gradients", "buckets", "errors", "kept", "working", "total")
    unit, word = (_GB, "GB") if estimate.memory(setting).total > _GB else (_MB, "MB")
    lines = [
        f"{word} on each GPU, of which {room / unit:,.1f} may be filled; MB sent in an update, inside and outside the machine; "
        f"host: the iterate average, the copy that it is made from and a checkpoint's, {word}"
    ]
    lines.append(f"{'':32}" + "".join(f"{name:>10}" for name in names) + f"{'inside':>10}{'outside':>10}{'host':>8}")
    for name, variant in variants(setting, rank):
        found, sent = estimate.memory(variant), estimate.traffic(variant)
        s = found.states
        values = (s.parameters, s.masters, s.moments, s.gradients, s.buckets, s.error_buffers, found.kept, found.working, found.total)
        row = "".join(f"{value / unit:10.2f}" for value in values) + f"{sent.inside / _MB:10,.0f}{sent.outside / _MB:10,.0f}{found.host / unit:8.2f}"
        over = found.total - room
        lines.append(f"{name:32}{row}" + (f"  does not fit: {over / unit:,.1f} {word} too much" if over > 0 else ""))
    return [
        *lines,
        "* as configured. total: at the widest point of an update or of evaluation. 16-bit: fp16 matrices, moments in 1-6-9 and 0-6-10 (paper B.2); fp32 is also what bf16 arithmetic stores. Ranks are those of "
        "gradient compression between machines ([compression], docs/compression.md).",
    ]


def costs(setting: Setting, figures: Gpu, gpu: str, tokens: float | None) -> list[str]:
    """Time of an update, days and energy of the configured run."""
    cfg, times, whole = setting.cfg, estimate.times(setting, figures), estimate.bill(setting, figures, tokens)
    states_per_s = cfg.dalle_fit.batch * cfg.stream_shape().states / times.expected
    useful = states_per_s * train_flops(cfg.dalle, cfg.stream_shape()) / cfg.stream_shape().states / setting.cluster.world
    exposed = f"; of it {_short(times.outside + times.compressing)} between machines after the backward pass, {_short(times.overlapped)} s in all if that were hidden"
    return [
        *compressing(setting),
        *orthogonalising(setting),
        evaluating(setting),
        f"time of an update    {_short(times.expected)} s expected (compute {_short(times.compute)}, inside {_short(times.inside)}, outside {_short(times.outside)}, "
        f"optimizer {_short(times.optimizer)}, parameters gathered {_short(times.gathering)}; {_short(times.unhidden)} if nothing is hidden){exposed if times.is_exposed else ''}",
        f"throughput           {states_per_s:,.0f} tokens/s; {useful / 1e12:.0f} TFLOP/s a GPU without recomputation, "
        f"{useful / figures.tflops_16bit / 1e12:.0%} of the datasheet",
        f"the whole run        {whole.updates:,.0f} updates: {_lasting(whole.days)}, {_short(whole.gpu_hours)} GPU hours, {_short(whole.megawatt_hours)} MWh at the wall",
        *_too_small(setting, times),
        f"from                 {gpu}: {figures.tflops_16bit:g} TFLOP/s in 16 bits, {figures.fp32_rate:g} in fp32, {figures.memory_gb_s:g} GB/s memory, {figures.link_gb_s:g} GB/s to its neighbours, "
        f"{figures.network_gb_s:g} GB/s network, {figures.watts:g} W ({figures.source})",
        f"assumed              matrix products at {estimate.EFFICIENCY:.0%} of the datasheet, links and memory (all else) at {estimate.LINK_EFFICIENCY:.0%}, "
        f"{estimate.POWER_OVERHEAD:g} times the GPUs' power at the wall, {estimate.RESERVE:.0%} of memory in reserve. Nothing here has been seen on a GPU.",
    ]


def compressing(setting: Setting) -> list[str]:
    """If gradient compression between machines is configured: what it sends, holds in memory and stores in checkpoints."""
    sent = estimate.compression(setting)
    if not sent or setting.rank is None:
        return _not_compressing(setting)
    most, exact = max(sent, key=lambda one: one.total), estimate.traffic(replace(setting, rank=None)).outside
    gpus, nodes, kept = setting.cluster.gpus, setting.cluster.nodes, setting.cfg.compression.error_buffers
    matrices = states.count(setting.cfg.dalle, setting.cfg.stream_shape()).matrices
    stored = matrices * (nodes * (4 if setting.rest == "fp32" else 2) if kept == "own" else 4)
    elements = (most.basis + most.short) / most.compressed if most.compressed else 1.0
    closed = network.sent_share(setting.cfg.dalle.width, setting.rank, gpus)
    return [
        f"compression          rank {setting.rank}, {setting.rank // gpus} a GPU; {most.factors / _MB:,.1f} MB of factors in {setting.wire}, {most.exact / _MB:,.1f} MB exact"
        f"{f', {most.refresh / _MB:,.1f} MB of new projections' if most.refresh else ''}: {most.total / exact:.1%} of the bytes of exact sums; "
        f"factors have {elements:.2%} of the elements that they stand for (even shards: {closed:.2%})",
        f"error buffers        {estimate.error_bytes(setting) / _MB:,.1f} MB a GPU with the projections, in {setting.rest}; {stored / _MB:,.1f} MB in a checkpoint "
        f"(compression.error_buffers = '{kept}')",
        *_less_compressed(setting, sent),
    ]


def _not_compressing(setting: Setting) -> list[str]:
    """Why nothing is compressed, where the configuration says something of compression."""
    section = setting.cfg.compression
    if section.method != "exact":
        return ["compression          none: there is one machine, so nothing is sent between machines"]
    if section.rank:
        return [
            f"compression          none: compression.method = 'exact', so that compression.rank = {section.rank} has no effect; set the method to 'powersgd'"
        ]
    return []


def _less_compressed(setting: Setting, sent: list[Sent]) -> list[str]:
    """What would compress more, where the rank or the ZeRO stage leaves little of it."""
    if not any(one.compressed for one in sent):
        return ["little compressed    factors would be no smaller than the gradients, so all are sent exactly; a lower compression.rank compresses"]
    most = max(one.total for one in sent)
    other = max(one.total for one in estimate.compression(replace(setting, stage=3)))
    if other > _MUCH_LESS * most:
        return []
    return [
        f"little compressed    the GPU that sends most holds many embeddings, or parts of matrices, which are sent exactly; with zero.stage=3, which cuts every parameter evenly, "
        f"it would send {other / _MB:,.1f} instead of {most / _MB:,.1f} MB"
    ]


def orthogonalising(setting: Setting) -> list[str]:
    """If Muon updates matrices: what that sends, holds in memory and computes."""
    loads, sent = estimate.orthogonalising(setting), estimate.exchanged(setting)
    if not loads:
        return []
    cfg, most = setting.cfg, max(load.operations for load in loads)
    whole = sum(load.operations for load in loads) * (setting.cluster.world // len(loads))
    share = whole / (train_flops(cfg.dalle, cfg.stream_shape()) * cfg.dalle_fit.batch)
    return [
        f"muon                 {most:.3g} operations on the busiest GPU, {share:.2%} of those of all forward and backward passes; it sends {sent.inside / _MB:,.1f} MB inside the "
        f"machine and {sent.outside / _MB:,.1f} MB outside, and holds {max(load.held for load in loads) / _MB:,.1f} MB for that beside the gradients"
    ]


def evaluating(setting: Setting) -> str:
    """What a forward pass of evaluation takes beside an update."""
    found = estimate.memory(setting)
    widest = "wider than an update: a smaller evaluate.batch makes room" if found.evaluating > found.training else "an update is wider"
    return (
        f"evaluation           {setting.cfg.evaluate.batch} samples at once (evaluate.batch): {found.evaluation / _GB:,.2f} GB of activations, "
        f"{found.evaluating / _GB:,.2f} GB in all; {found.training / _GB:,.2f} GB in an update ({widest})"
    )


def _too_small(setting: Setting, times: Times) -> list[str]:
    """A warning where a GPU would wait for its host: the figures above leave that out."""
    starting = estimate.starting(setting)
    if times.compute >= starting:
        return []
    return [
        f"too small            to start the kernels of an update takes {_short(starting)} s or more (assumed), longer than to compute it: on a GPU expect that time, and "
        "no use of these throughputs"
    ]


def _lasting(days: float) -> str:
    """A duration: days, or of less than one hours, minutes or seconds."""
    seconds = days * 86400
    if seconds < 60:
        return f"{_short(seconds)} s"
    return f"{_short(days)} days" if days >= 1 else f"{progress.duration(seconds)} {'hours' if seconds >= 3600 else 'minutes'}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}" if value >= 1 else f"{value:.2g}"


def remedies(setting: Setting, room: float) -> str:
    """Changes of the configuration, each of which alone would make it fit."""
    fitting = [words for words, other in smaller(setting) if estimate.memory(other).total <= room]
    return "any of these would fit: " + ", ".join(fitting) if fitting else "use more or larger GPUs, or a smaller model"
