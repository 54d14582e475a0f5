"""Estimates a run's memory, time and energy from its configuration and the datasheet of a GPU. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from train.config import DalleFit, RunConfig
from train.config_batch import rows
from train.config_compression import check_rank
from train.optimizer.muon_schedule import FP32, Load, loads, rounds, wire_bytes
from train.planning import activations, network, states, wire
from train.planning.flops import forward_flops, head_products, update_flops
from train.planning.hardware import Gpu
from train.planning.states import Cluster, Layout, Storage

EFFICIENCY = 0.5
"""Fraction of the datasheet's matrix rate that a step reaches, all operations counted. An assumption until a GPU has been measured."""
LINK_EFFICIENCY = 0.7
"""Fraction of a link's rate that collectives reach; an assumption."""
POWER_OVERHEAD = 1.6
"""Total power divided by that of the GPUs: includes processors, network and cooling; an assumption."""
RESERVE = 0.08
"""Fraction of a GPU's memory that is reserved for CUDA, NCCL and fragmentation; an assumption."""

_STARTS = 100
"""Kernels that an update starts for each layer and micro-batch, at the least; an assumption."""
_START_S = 5e-6
"""Seconds that the host takes to start one; an assumption."""

_FP32 = 4
_FP32_RATE = 1 / 8
"""Rate of fp32 products without TF32, which compression uses, divided by that of 16-bit products."""


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


@dataclass(frozen=True)
class Times:
    """Seconds of an update."""

    compute: float
    optimizer: float
    inside: float
    outside: float
    compressing: float = 0.0
    """Time of the products and factorisations of compression."""
    is_exposed: bool = False
    """Whether communication between machines begins only after the backward pass. A machine's shards are summed over machines when they are complete, and ZeRO does not
    tell before the end of the backward pass that any of them is (train/engines/zero/DEEPSPEED.md)."""

    @property
    def expected(self) -> float:
        """Seconds if communication overlaps with computation as far as possible."""
        if self.is_exposed:
            return max(self.compute, self.inside) + self.outside + self.compressing + self.optimizer
        return max(self.compute, self.inside, self.outside) + self.optimizer

    @property
    def unhidden(self) -> float:
        """Seconds if communication does not overlap with computation."""
        return self.compute + self.inside + self.outside + self.compressing + self.optimizer

    @property
    def overlapped(self) -> float:
        """Seconds if communication between machines overlapped too, as in the paper."""
        return max(self.compute + self.compressing, self.inside, self.outside) + self.optimizer


def starting(setting: Setting) -> float:
    """Seconds of an update in which the host starts kernels. Elsewhere the GPU works meanwhile; a small model's GPU waits for them."""
    cfg = setting.cfg
    return cfg.dalle.layers * cfg.dalle_fit.accumulation * _STARTS * _START_S


def times(setting: Setting, gpu: Gpu) -> Times:
    """Seconds of an update, from a GPU's datasheet and the efficiencies above."""
    cfg, fit = setting.cfg, setting.cfg.dalle_fit
    shape = cfg.stream_shape()
    parameters = states.count(cfg.dalle, shape)
    per_gpu = fit.batch / setting.cluster.world
    captions = 2 if fit.contrasts else 1
    operations = update_flops(cfg.dalle, shape, contrasts=fit.contrasts)
    operations += captions * (forward_flops(cfg.dalle, shape) if fit.activation_checkpointing else 0.0)
    if not _casts_logits(fit):
        # Logits are computed by fp32 products. Their rate is at most half that of 16-bit products with TF32, and an eighth or less without; half is assumed.
        operations += (8 if fit.contrasts else 3) * 2.0 * head_products(cfg.dalle, shape)
    sent, matrices, exchange = _reductions(setting), orthogonalising(setting), exchanged(setting)
    shards = setting.cluster.shards(setting.layout) if setting.stage else 1
    # Gradient, master weight and both moments are read, and all but the gradient are written: 28 bytes for each element of the shard if all are fp32.
    touched = (12 + 2 * setting.state_bytes) * parameters.total / shards
    products = gpu.tflops_16bit * 1e12 * EFFICIENCY
    rate = products * (_FP32_RATE if wire_bytes(fit.precision) == FP32 else 1.0)
    whole = max((load.operations for load in matrices), default=0) / rate  # Muon's matrices, and their messages, come after the backward pass
    whole += (exchange.inside / gpu.link_gb_s + exchange.outside / gpu.network_gb_s) / (1e9 * LINK_EFFICIENCY)
    return Times(
        compute=per_gpu * operations / products,
        optimizer=touched / (gpu.memory_gb_s * 1e9 * LINK_EFFICIENCY) + whole,
        inside=sent.inside / (gpu.link_gb_s * 1e9 * LINK_EFFICIENCY),
        outside=sent.outside / (gpu.network_gb_s * 1e9 * LINK_EFFICIENCY),
        compressing=max((one.operations for one in compression(setting)), default=0.0) / (products * _FP32_RATE),
        is_exposed=setting.layout == "node" and setting.cluster.nodes > 1,
    )


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
