"""Estimates a run's memory, time and energy from its configuration and the datasheet of a GPU. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from train.config import DalleFit, RunConfig
from train.config_batch import rows
from train.config_compression import check_rank
from train.optimizer.muon_schedule import FP32, Load, loads, rounds, wire_bytes
from train.planning import activations, network, passes, states, wire
from train.planning.flops import head_products, visited_flops
from train.planning.hardware import Gpu
from train.planning.states import Cluster, Layout, Storage
from train.planning.update_times import Times

EFFICIENCY = 0.7
"""Fraction of the datasheet's rates that matrix products reach. An assumption until a GPU has been measured; ``bench plan`` measures it on a CPU."""
LINK_EFFICIENCY = 0.7
"""Fraction of a link's rate that collectives reach, and of the memory's that all else reaches; an assumption."""
POWER_OVERHEAD = 1.6
"""Total power divided by that of the GPUs: includes processors, network and cooling; an assumption."""
RESERVE = 0.08
"""Fraction of a GPU's memory that is reserved for CUDA, NCCL and fragmentation; an assumption."""

_STARTS = 100
"""Kernels that an update starts for each layer and micro-batch, at the least; an assumption."""
_START_S = 5e-6
"""Seconds that the host takes to start one; an assumption."""

_FP32 = 4


@dataclass(frozen=True)
class Setting:
    """The model, the machines and the way of training that an estimate is for."""

    cfg: RunConfig
    cluster: Cluster
    stage: int
    layout: Layout
    storage: Storage = "cast"
    moment_bytes: int = 8
    """Bytes of AdamW's two moments of a matrix element."""
    half_gradients: bool = False
    """Whether gradients of matrices are sent in 16 bits: with fp16 arithmetic, however matrices are stored."""
    rank: int | None = None
    """Total rank of gradient compression between machines."""
    wire: str = "1-6-9"
    """Format of the factors of compression."""
    rest: str = "1-6-9"
    """Format of the error buffers of compression."""
    orthogonal: bool = False
    """Whether Muon updates matrices: they then have a momentum in place of two moments."""

    @classmethod
    def configured(cls, cfg: RunConfig, cluster: Cluster) -> Setting:
        """The setting that a configuration describes.

        Raises:
            ConfigError: the rank of compression does not divide over the GPUs of a machine.
        """
        check_rank(cfg.compression, cluster.nodes, cluster.gpus)
        fit, zero = cfg.dalle_fit, cfg.zero
        is_half = fit.precision == "fp16"
        storage: Storage = "half" if is_half and zero.weights != "cast" else "cast"
        moments = 4 if fit.moments == "16-bit" else 8
        found = cls(cfg, cluster, zero.stage, zero.sharding, storage, moments, is_half, orthogonal=fit.optimizer == "muon")
        if cfg.compression.method == "exact" or cluster.nodes == 1:
            return found
        return replace(found, rank=cfg.compression.rank, wire=cfg.compression.wire, rest=cfg.compression.rest)

    @property
    def state_bytes(self) -> int:
        """Bytes of the optimizer's state of a matrix element."""
        return self.moment_bytes // 2 if self.orthogonal else self.moment_bytes

    @property
    def micro_batch(self) -> int:
        """Number of samples in a micro-batch of one process.

        Raises:
            ConfigError: the batch cannot be divided evenly among processes and micro-batches.
        """
        fit = self.cfg.dalle_fit
        return rows(fit.batch, fit.accumulation, self.cluster.world, "dalle_fit")


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU."""

    states: states.States
    kept: int
    """Activations that are kept from the forward to the backward pass."""
    working: int
    """What the backward pass needs on top of them at its widest."""
    host: float
    """Bytes in the machine's memory for each GPU: the average of its shard and the pinned copy from which it is computed (paper B.2, train/optimizer/averaging.py); the
    copy of master weights, moments and average from which a checkpoint is written (train/weights/checkpointer.py; with zero.sharding = "node" only on the first
    node); where captions are contrasted, the frozen shard and its copy for a checkpoint; with zero.offload_optimizer also master weights, moments and gradients."""
    evaluation: int = 0
    """Activations of evaluate.batch samples in a forward pass of evaluation, which comes between updates."""

    @property
    def total(self) -> float:
        """At the widest point: inside the backward pass, in the optimizer's update, or in evaluation."""
        return max(self.training, self.evaluating)

    @property
    def training(self) -> float:
        """The same without evaluation."""
        return self.states.total + max(self.kept + self.working, self.states.update - self.states.buckets - self.states.gradients)

    @property
    def evaluating(self) -> float:
        """At the widest point of evaluation: there are no gradients then but stage 3's, which keeps its shards and a bucket."""
        gone = 0.0 if self.states.keeps_gradients else self.states.gradients + self.states.buckets
        return self.states.total - gone + self.evaluation


def activation_run(setting: Setting) -> activations.Run:
    """The computation of one GPU, with FlexAttention or the engine that dalle.attention names."""
    cfg, fit = setting.cfg, setting.cfg.dalle_fit
    return activations.Run(
        cfg=cfg.dalle,
        shape=cfg.stream_shape(),
        batch=setting.micro_batch * (2 if fit.contrasts else 1),  # every picture under two captions
        branch_bytes=4 if fit.precision == "fp32" else 2,
        engine="flex" if cfg.dalle.attention == "auto" else cfg.dalle.attention,
        checkpoint_every=fit.checkpoint_every if fit.activation_checkpointing else 0,
        casts_weights=setting.storage == "cast",
        casts_logits=_casts_logits(fit),
    )


def _casts_logits(fit: DalleFit) -> bool:
    return fit.has_bf16_logits("bf16" if fit.precision == "auto" else fit.precision)  # as a GPU decides it


def memory(setting: Setting) -> Memory:
    """Bytes on one GPU at the peak of an update."""
    run = activation_run(setting)
    parameters = states.count(run.cfg, run.shape)
    shards = setting.cluster.shards(setting.layout)
    zero = setting.cfg.zero
    found = states.states(
        parameters,
        setting.stage,
        shards,
        storage=setting.storage,
        moment_bytes=setting.state_bytes,
        half_gradients=setting.half_gradients,
        bucket_elements=zero.reduce_bucket_size,
        live_elements=states.gathered(run.cfg.width, zero.stage3_prefetch_bucket_size, zero.stage3_max_live_parameters),
        error_bytes=error_bytes(setting),
        micro_batches=setting.cfg.dalle_fit.accumulation,
        touched=wire.touched(fragments(setting)) if setting.stage in (1, 2) and not zero.offload_optimizer else 0.0,
        overlaps=zero.overlap_comm,
        orthogonalising=max((load.held for load in orthogonalising(setting)), default=0),
    )
    kept = activations.kept_by_forward(run)
    host = (2 + 2) * _FP32 * parameters.total / (shards if setting.stage else 1) + found.moments + 2 * frozen(setting)
    if zero.offload_optimizer and setting.stage:
        host += found.masters + found.moments + found.gradients
        found = replace(found, masters=0.0, moments=0.0, gradients=0.0, update=0.0)
    evaluated = activations.peak_of_forward(replace(run, batch=setting.cfg.evaluate.batch))
    return Memory(found, kept, activations.peak(run) - kept, host, evaluated)


def frozen(setting: Setting) -> float:
    """Bytes of the frozen weights' shard, in the machine's memory, where captions are contrasted (train/engines/zero/frozen.py)."""
    cfg = setting.cfg
    if not cfg.dalle_fit.contrasts:
        return 0.0
    return _FP32 * states.count(cfg.dalle, cfg.stream_shape()).total / (setting.cluster.shards(setting.layout) if setting.stage else 1)


def compression(setting: Setting) -> list[wire.Sent]:
    """What each GPU of a machine sends to other machines if gradients are compressed; empty otherwise."""
    if setting.rank is None or setting.cluster.nodes == 1:
        return []
    held, every = fragments(replace(setting, layout="node")), setting.cfg.compression.refresh_every
    return [wire.sent(one, setting.rank, setting.wire, setting.cluster.nodes, every) for one in held]


def fragments(setting: Setting) -> list[list[wire.Fragment]]:
    """The fragments of parameters that each of the GPUs holds that together hold a copy."""
    cfg = setting.cfg
    return wire.fragments(
        list(wire.parameters(cfg.dalle, cfg.stream_shape())),
        setting.stage,
        setting.cluster.shards(setting.layout),
        by_resblock=setting.half_gradients and cfg.scales.scope != "none",
        half=setting.half_gradients,
        packed=setting.moment_bytes == 4,
        orthogonal=setting.orthogonal,
    )


@lru_cache(4)  # memory, messages and times each ask for it, and on 1,024 GPUs it takes a third of a second
def orthogonalising(setting: Setting) -> tuple[Load, ...]:
    """What Muon takes on each GPU; with compression between machines on each of a machine, as all machines do the same. Empty without it."""
    if not setting.orthogonal or not setting.stage:
        return ()
    size, ranks = wire_bytes(setting.cfg.dalle_fit.precision), setting.cluster.shards(setting.layout)
    machines = setting.cluster.world // ranks if setting.rank is None else 1
    return tuple(loads(rounds(wire.matrices(fragments(setting)), ranks, size, machines), ranks, size))


def exchanged(setting: Setting, rank: int | None = None) -> network.Traffic:
    """Bytes that Muon sends from a GPU, by its number, or from those that send most."""
    gpus, inside, outside = setting.cluster.gpus, [0.0], [0.0]
    for sender, load in enumerate(orthogonalising(setting)):
        if rank in (None, sender):
            near = [size for other, size in enumerate(load.sent) if setting.layout == "node" or other // gpus == sender // gpus]
            inside.append(sum(near))
            outside.append(sum(load.sent) - sum(near) + load.between)
    return network.Traffic(max(inside), max(outside))


def error_bytes(setting: Setting) -> float:
    """Bytes of the error buffers and of the fixed projections on one GPU."""
    sent = compression(setting)
    if not sent:
        return 0.0
    matrices = states.count(setting.cfg.dalle, setting.cfg.stream_shape()).matrices
    return (_FP32 if setting.rest == "fp32" else 2) * matrices / setting.cluster.gpus + _FP32 * max(one.basis for one in sent)


def starting(setting: Setting) -> float:
    """Seconds of an update in which the host starts kernels. Elsewhere the GPU works meanwhile; a small model's GPU waits for them."""
    cfg = setting.cfg
    return cfg.dalle.layers * cfg.dalle_fit.accumulation * _STARTS * _START_S


@dataclass(frozen=True)
class Efficiency:
    """Which fraction of a description's rates is reached."""

    products: float = EFFICIENCY
    links: float = LINK_EFFICIENCY
    """Of links, and of memory."""


def times(setting: Setting, gpu: Gpu, reached: Efficiency | None = None) -> Times:
    """Seconds of an update, from a GPU's datasheet and the efficiencies above, or from measured rates and their own."""
    reached = reached or Efficiency()
    cfg, fit, zero = setting.cfg, setting.cfg.dalle_fit, setting.cfg.zero
    run, parameters = activation_run(setting), states.count(cfg.dalle, cfg.stream_shape())
    rates = _rates(gpu, reached)
    sent, matrices, exchange = _reductions(setting), orthogonalising(setting), exchanged(setting)
    after = network.gathered(parameters, setting.cluster, setting.stage, setting.layout, storage=setting.storage, contrasts=fit.contrasts)
    shards = setting.cluster.shards(setting.layout) if setting.stage else 1
    # Gradient, master weight and both moments are read, and all but the gradient are written: 28 bytes for each element of the shard if all are fp32. The gradient's norm
    # reads it once more, and the copy that forward passes read is written.
    touched = (12 + 2 * setting.state_bytes + 2 * _FP32) * parameters.total / shards
    rate = rates.fp32 if wire_bytes(fit.precision) == FP32 else rates.half
    whole = max((load.operations for load in matrices), default=0) / rate  # Muon's matrices, and their messages, come after the backward pass
    whole += exchange.inside / rates.link + exchange.outside / rates.network
    count = network.messages(
        parameters, len(list(wire.parameters(cfg.dalle, run.shape))), setting.stage, zero.reduce_bucket_size, fit.accumulation, setting.cluster.world
    )
    return Times(
        compute=_computing(setting, run, parameters, rates),
        optimizer=touched / rates.memory + whole,
        inside=(sent.inside - after.inside) / rates.link,
        outside=(sent.outside - after.outside) / rates.network,
        gathering=max(after.inside / rates.link, after.outside / rates.network),
        compressing=max((one.operations for one in compression(setting)), default=0.0) / rates.fp32,
        latency=1e-6 * gpu.message_us * count,
        is_exposed=setting.layout == "node" and setting.cluster.nodes > 1,
        overlaps=zero.overlap_comm and gpu.computes_while_sending,
    )


@dataclass(frozen=True)
class _Rates:
    """Operations and bytes a second that are reached."""

    half: float
    fp32: float
    memory: float
    passes: float
    link: float
    network: float


def _rates(gpu: Gpu, reached: Efficiency) -> _Rates:
    bytes_s = 1e9 * reached.links
    products = 1e12 * reached.products
    return _Rates(
        gpu.tflops_16bit * products,
        gpu.fp32_rate * products,
        gpu.memory_gb_s * bytes_s,
        gpu.pass_rate * bytes_s,
        gpu.link_gb_s * bytes_s,
        gpu.network_gb_s * bytes_s,
    )


def _computing(setting: Setting, run: activations.Run, parameters: states.Parameters, rates: _Rates) -> float:
    """Seconds of the forward and backward passes of one process: products at the rate of their dtype, and everything else at the memory's."""
    fit = setting.cfg.dalle_fit
    recomputes = fit.activation_checkpointing
    heads = 2.0 * run.batch * head_products(run.cfg, run.shape)
    blocks = run.batch * visited_flops(run.cfg, run.shape, run.engine) - heads
    forwards = 3 + recomputes + fit.contrasts  # a backward pass is two; frozen weights are passed through forwards
    branches = rates.fp32 if fit.precision == "fp32" else rates.half
    seconds = forwards * (blocks / branches + heads / (rates.half if run.casts_logits else rates.fp32))
    seconds += (passes.of_activations(run, recomputes=recomputes) + fit.contrasts * passes.forward(run)) / rates.passes
    seconds += passes.of_casts(run, parameters, forwards=1 + recomputes + fit.contrasts) / rates.memory
    reductions = fit.accumulation if setting.stage > 1 else 1
    return fit.accumulation * seconds + reductions * passes.of_gradients(parameters, setting.stage) / rates.memory


def traffic(setting: Setting) -> network.Traffic:
    """Bytes that one GPU sends in an update."""
    found, more = _reductions(setting), exchanged(setting)
    return network.Traffic(found.inside + more.inside, found.outside + more.outside)


def _reductions(setting: Setting) -> network.Traffic:
    """Bytes of gradients and parameters."""
    cfg = setting.cfg
    found = network.traffic(
        cfg.dalle,
        states.count(cfg.dalle, cfg.stream_shape()),
        setting.cluster,
        setting.stage,
        setting.layout,
        storage=setting.storage,
        half_gradients=setting.half_gradients,
        all_reduces=cfg.zero.use_multi_rank_bucket_allreduce,
        micro_batches=cfg.dalle_fit.accumulation,
        contrasts=cfg.dalle_fit.contrasts,
    )
    sent = compression(setting)
    return replace(found, outside=max(one.total for one in sent)) if sent else found


@dataclass(frozen=True)
class Bill:
    """Time, energy and operations of a whole run."""

    updates: float
    days: float
    gpu_hours: float
    megawatt_hours: float


def bill(setting: Setting, gpu: Gpu, tokens: float | None) -> Bill:
    """The bill for a number of tokens (positions of the stream), or for dalle_fit.steps updates."""
    cfg = setting.cfg
    updates = cfg.dalle_fit.steps if tokens is None else tokens / (cfg.dalle_fit.batch * cfg.stream_shape().states)
    hours = updates * times(setting, gpu).expected / 3600
    return Bill(updates, hours / 24, hours * setting.cluster.world, hours * setting.cluster.world * gpu.watts * POWER_OVERHEAD / 1e6)


def room(gpu_memory_gb: float) -> float:
    """How many bytes of a GPU's memory an estimate may use."""
    return gpu_memory_gb * 1e9 * (1 - RESERVE)
