"""DeepSpeed ZeRO stages 1, 2 and 3 as a training engine: fp32, bf16, and fp16 with a gradient scale for each resblock (paper 2.4, D; DEEPSPEED.md beside this file).

An update consists of: backward passes, in which DeepSpeed reduces gradients into shards; ``measure``, which sums shards between nodes and computes overflow flags
and norms of this rank's shards; one small all-reduce, the only point where our code makes the host wait for the GPU (DeepSpeed does so in backward passes on
stage 3, and on all stages with overlap_comm); and ``step``, which updates scales, clips, runs AdamW on the shards, and gathers the parameters.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from math import isfinite
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from infra import stored
from infra.world import World
from model.transformer import Transformer, parameter_tags
from train.config import DalleFit, ScaleSection, ZeroSection
from train.config_compression import CompressionSection
from train.engines.protocol import Histogram, Update
from train.engines.zero import exponents, internals, measures, one_pass
from train.engines.zero.accumulation import HalfGradients
from train.engines.zero.between_nodes import Exchanged, sum_exactly
from train.engines.zero.compression.construction import build
from train.engines.zero.compression.state import Compression
from train.engines.zero.compression.update import Watched
from train.engines.zero.configuration import deepspeed_config, reduced
from train.engines.zero.exponents import Exponents
from train.engines.zero.frozen import FrozenShards
from train.engines.zero.groups import make_optimizer, parameter_groups, store_weights, weight_storage
from train.engines.zero.scales import EngineState, GradientScales
from train.engines.zero.shards import GradientReader, Gradients, StateViews, pieces
from train.engines.zero.topology import node_topology
from train.engines.zero.whole_matrices import Ranks, WholeMatrices, matrices_of
from train.optimizer.averaging import Average
from train.optimizer.loss_scale import LossScale
from train.optimizer.muon import Muon
from train.optimizer.protocol import OnePassOptimizer, ShardGroup
from train.weights.fragments import Fragment, full_shape

log = logging.getLogger(__name__)


class ZeroEngine:
    """A transformer whose gradients and optimizer state (and, on stage 3, parameters) are sharded over ranks."""

    def __init__(
        self,
        module: Transformer,
        fit: DalleFit,
        zero: ZeroSection,
        world: World,
        scales: ScaleSection | None = None,
        compression: CompressionSection | None = None,
        seed: int = 0,
    ) -> None:
        """Wrap a model. Collective.

        Args:
            seed: seed of the run, which compression uses.

        Raises:
            ConfigError: DeepSpeed differs from the known version, nodes have different numbers of processes, or the rank of compression does not divide over them.
        """
        topology = node_topology(world) if zero.sharding == "node" else None
        internals.prepare(topology)
        self.module, self.fit, self.zero, self.world, self.rules = module, fit, zero, world, (rules := scales or ScaleSection())
        self.tags = parameter_tags(module)
        self.resblocks = len(module.resblocks)
        scaled = fit.precision == "fp16" and rules.scope != "none"
        self.scales = GradientScales(self.resblocks, world.size * fit.accumulation, rules) if scaled else None
        self.topology, self.nodes = topology, 1 if topology is None else topology.nodes
        self.shard_rank = world.rank if topology is None else topology.local
        os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # not set in a single process, but DeepSpeed requires it
        self.storage = weight_storage(fit, zero)
        store_weights(module, self.tags, self.storage)
        groups = parameter_groups(module, self.tags, fit, by_resblock=scaled)
        self.shard_optimizer = make_optimizer(groups, fit)  # ours; self._optimizer is the one of DeepSpeed that wraps it
        self._halves: HalfGradients | None = None
        if zero.stage == 1 and self.storage == "fp16" and fit.accumulation > 1:
            self._halves = HalfGradients(p for p in module.parameters() if p.dtype == torch.float16)  # before ZeRO's hooks
        self.config = deepspeed_config(fit, zero, world, self.nodes, reduced=reduced(module.parameters()))
        self._engine, self._optimizer, _, _ = internals.deepspeed.initialize(
            model=module, optimizer=self.shard_optimizer, config=self.config, mpu=topology, dist_init_required=False
        )
        self._take_over()
        self.pieces = pieces(self._optimizer, zero.stage, module, self.shard_rank)
        self._views = StateViews(self.pieces)
        self.gradients = GradientReader(self._optimizer, zero.stage, module, self.pieces, self.tags, zero.offload_optimizer)
        self.device = next(module.parameters()).device
        self._compression_section, self._seed = compression or CompressionSection(), seed
        self._whole_matrices = self._gathering_matrices()
        self.compression = found if (found := self._build_compression()).is_active else None
        self.average = Average(((str(index), flat) for index, flat in enumerate(self._masters())), fit.ema, fit.ema_every, on_cpu=True)
        self._frozen = FrozenShards(self._masters() if fit.contrasts else [])
        self.updates = self.attempts = 0
        self._exponents = Exponents(self.resblocks + 1, self.device)
        self._is_summed = False  # whether this update's shards have been summed over nodes already
        self._squares: Tensor | None = None  # their squared norms, if compression has computed them
        self._watched: Watched | None = None  # what it owes, where numerics are logged
        self._exchanged = Exchanged(self.nodes, self.device)
        self.loss_scale: LossScale | None = None
        self._scale_tensor = torch.ones(self.resblocks, dtype=torch.float32, device=self.device)
        self._constant = 2.0**rules.before_reduction if scaled else 1.0
        if scaled:
            self._scale_resblocks()

    def _take_over(self) -> None:
        """Check DeepSpeed's optimizer, switch off what our engine does itself, and replace its step by ours if possible."""
        optimizer, zero = self._optimizer, self.zero
        internals.check(optimizer, zero.stage, self.module.named_parameters())
        internals.take_over(optimizer, zero.stage)
        if isinstance(self.shard_optimizer, OnePassOptimizer) and not zero.offload_optimizer:
            if internals.is_followed():
                one_pass.install(optimizer, zero.stage, self.shard_optimizer)
            else:
                log.warning(
                    "deepspeed is not %s: its own optimizer step runs, which reads and writes more (train/engines/zero/one_pass.py)",
                    internals.FOLLOWED,
                )

    def _gathering_matrices(self) -> WholeMatrices | None:
        """What brings whole matrices to an optimizer that needs them."""
        rule, topology = self.shard_optimizer, self.topology
        if not isinstance(rule, Muon):
            return None
        ranks = Ranks(self.world.size, self.shard_rank)
        if topology is not None:
            ranks = Ranks(topology.node_size, self.shard_rank, topology.within)
            if self._compression_section.method == "exact":
                ranks = replace(ranks, machines=topology.nodes, machine=topology.node, between=topology.between)
        matrices = matrices_of(self._optimizer, self.zero.stage, self.module, self.tags, ranks.count)
        return WholeMatrices(rule, matrices, self.pieces, self.gradients.names, self.fit.precision, ranks)

    def _scale_resblocks(self) -> None:
        """Connect each resblock to its gradient scale, and multiply its gradients by the constant before reductions."""
        for index, block in enumerate(self.module.resblocks):
            block.gradient_scale = self._scale_tensor[index]  # type: ignore[union-attr, assignment]
            block.filter_gradients = self.rules.filter  # type: ignore[union-attr, assignment]
            if self.rules.before_reduction:
                for p in block.parameters():
                    p.register_hook(lambda gradient: gradient * self._constant)
        self._publish_scales()

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        return self._engine(*inputs, **named)

    def micro_batch(self, *, last: bool) -> None:
        """Say whether the micro-batch to come ends its update, and check that DeepSpeed counts as we do."""
        if self._halves is not None:
            self._halves.is_last = last
        assert self._engine.is_gradient_accumulation_boundary() == last, "DeepSpeed's accumulation boundary is out of step"

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients. The loss is this rank's share of the global mean, and is not divided again (paper D.3)."""
        self._is_summed = False
        self._engine.backward(loss, scale_wrt_gas=False)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()

    def measure(self) -> Tensor:
        """This rank's part of what ranks must know before ``step``: float64, to be summed over all ranks. The first call in an update is collective between nodes:
        it sums their shards in place. Further calls measure the same sums again."""
        found = self.gradients.read()
        count = (self.attempts + 1) % self.fit.numerics_every == 0
        if not self._is_summed:
            self._sum_over_nodes(found, watch=count)
            self._is_summed = True
            if self.fit.histograms_every and (self.attempts + 1) % self.fit.histograms_every == 0:
                self._exponents.ask(found)
        return measures.local(found, self.resblocks + 1, count=count, device=self.device, squares=self._squares, watched=self._watched)

    def _sum_over_nodes(self, found: Gradients, *, watch: bool) -> None:
        """Sum shards over the nodes, if there are several, exactly or compressed; and pay what compression still owes."""
        self._squares = self._watched = None
        if self.compression is not None:
            self.compression.pay(found.tensors, self.factors())
        self._exchanged.begin()
        if self.compression is not None and self.compression.is_active:
            update = self.compression.update
            self._squares = update.exchange(found.tensors, self.factors(), self.attempts, watch=watch)
            self._watched = update.watched
            self._exchanged.end(self.compression.wire.payload)
        elif self.topology is not None and self.nodes > 1:
            layout, half = found.layout, self.storage != "fp32"
            self._exchanged.end(sum_exactly(found.tensors, layout.is_block_matrix, half=half, device=self.device, group=self.topology.between))

    def step(self, lr: float, measured: Sequence[float] | None = None) -> Update:
        """Apply the update, or skip it, on every rank alike.

        Args:
            lr: step size.
            measured: the sum of ``measure`` over all ranks; computed here if the caller has not done it.
        """
        if measured is None:
            vector = self.measure()
            if dist.is_initialized():
                dist.all_reduce(vector)
            measured = vector.tolist()
        self.attempts += 1
        # What all ranks know now: which resblocks have a gradient that is not finite, and the true norms of the others.
        slots = self.resblocks + 1
        found = measures.agreed(measured, slots, replicas=self.nodes)
        values = self.scales.values() if self.scales is not None else [1.0] * self.resblocks
        factors = self.factors()
        norms = [factor * square**0.5 for factor, square in zip(factors, found.squares, strict=True)]
        norm = sum(value**2 for value in norms) ** 0.5
        in_block, outside = any(found.bad[:-1]), found.bad[-1] or norm == float("inf")
        # Every rank moves its scales by the same rules; ``factors`` above were computed with the scales that this update's gradients have.
        if self.scales is not None:
            self.scales.update(self.attempts, found.bad[:-1])
            self._publish_scales()
        applied = not outside and (not in_block or (self.rules.skip == "resblock" and self.scales is not None))
        # Tell the optimizer, group by group, the step size, the factor that turns raw gradients into true clipped ones, and whether to skip the group.
        clip = min(1.0, self.fit.clip_norm / (norm + 1e-6))
        group: ShardGroup
        for group in self.shard_optimizer.param_groups:
            slot = self.resblocks if group["resblock"] is None else group["resblock"]
            group["lr"], group["factor"] = lr * group["step_ratio"], factors[slot] * clip
            group["skip"] = not applied or (self.scales is not None and found.bad[slot])
        if self.compression is not None:
            self.compression.settle([applied and not (self.scales is not None and bad) for bad in found.bad])
            self.compression = None if self.compression.is_done else self.compression
        if self._whole_matrices is not None and applied:
            self._whole_matrices.replace(self.gradients.read().tensors, self._masters(), self._group_of)
        # DeepSpeed runs the step (ours, see one_pass.py) and gathers the parameters; then the average follows.
        self.shard_optimizer.count = self.updates + 1
        self.average.before_step()
        self._engine.step()
        if applied:
            self.updates += 1
            self.average.update(self.updates)
        # Without filters, an overflow in a resblock spreads to the resblocks before it and to the embeddings, so then one outside proves nothing.
        overflow = self.scales is not None and in_block and not (outside and self.rules.filter)
        numerics = self._numerics(values, found, norms) if self.attempts % self.fit.numerics_every == 0 else {}
        norm = float("inf") if outside or (in_block and not applied) else norm
        return Update(applied, norm, overflow, numerics, self._histograms())

    def factors(self) -> list[float]:
        """The factors that turn reduced gradients into true ones: one for each resblock, and the last for parameters outside resblocks.

        DeepSpeed has averaged over the sharding group, but the true gradient is a sum, without the scale and the constant.
        """
        values = self.scales.values() if self.scales is not None else [1.0] * self.resblocks
        return [self.world.size / self.nodes / factor for factor in [*(value * self._constant for value in values), 1.0]]

    def state(self) -> dict[str, Any]:
        """What a checkpoint's meta.json stores of the engine."""
        compression = None if self.compression is None else self.compression.state()
        return {"attempts": self.attempts, "scales": None if self.scales is None else self.scales.state(), "compression": compression}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's state. Scales adapt to another number of micro-batches in the global batch.

        Raises:
            DataError: the state is damaged.
        """
        stored.check(state, EngineState, "meta.json of the checkpoint, engine", "go back to an earlier checkpoint")
        self.attempts = state["attempts"]
        if self.scales is not None and state["scales"] is not None:
            self.scales.restore(state["scales"])
            self._publish_scales()

    def more_to_load(self, state: dict[str, Any]) -> Iterator[dict[str, Fragment]]:
        """The error buffers of compression, if a checkpoint with this ``state`` has some or this run needs some, as groups of fragments to fill."""
        stored = state.get("compression")
        if self.compression is None and stored is not None:
            self.compression = self._build_compression(again=True)
        if self.compression is not None:
            yield from self.compression.restored(stored)
            self.compression = None if self.compression.is_done else self.compression

    def _build_compression(self, *, again: bool = False) -> Compression:
        shapes = {name: full_shape(p) for name, p in self.module.named_parameters()}
        widths = {name: shape[-1] for name, shape in shapes.items()}
        devices = (torch.device("cpu") if self.zero.offload_optimizer else self.device, self.device)
        return build(self._compression_section, self.gradients.names, self.pieces, widths, self.tags, self.topology, devices, self._seed, again=again)

    def fragments(self, *, to_load: bool) -> dict[str, Fragment]:
        """This rank's pieces of masters, moments and averages, as views of ZeRO's flat shards. Replicas on other nodes only load them. Buffers of compression are
        saved by every rank, and loaded by ``more_to_load``.

        Averages in CPU memory are up to date only after ``average.wait``, which is called here when loading.
        """
        if to_load:
            self.average.wait()
        found: dict[str, Fragment] = {} if to_load or self.compression is None else self.compression.fragments()
        if not to_load and self.topology is not None and self.topology.node:
            return found
        masters = self._masters()
        states = {flat: self._states_of(flat, masters[flat]) for flat in {piece.flat for piece in self.pieces}}
        return found | self._views.of(states)

    def _states_of(self, flat: int, master: Tensor) -> dict[str, Tensor]:
        group = self._group_of(flat)
        moments = self.shard_optimizer.moments(group, master)  # zeros if no update has been applied yet
        tensors = {"model": master, "average": self.average.values[str(flat)]}
        tensors |= {f"optimizer/{name}": moments[name] for name in self.shard_optimizer.state_names(group)}
        return {kind: tensor.detach() for kind, tensor in (tensors | self._frozen.of(flat)).items()}

    def loaded(self, updates: int) -> None:
        """Finish a restore: compute every rank's parameters from the masters, and set the number of applied updates."""
        self.updates = updates
        internals.refresh(self._optimizer, self.zero.stage)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """During the block, forward passes use the averaged weights. Collective. Afterwards the masters are restored bit for bit; but not after an error, because
        restoring would wait for other ranks, which may not have had the error."""
        self._swap()
        self._engine.eval()
        yield
        self._engine.train()
        self._swap()

    def frozen(self, *, evaluates: bool) -> AbstractContextManager[None]:
        """During the block, forward passes use the weights that training started from; see ``FrozenEngine``. Collective."""
        return self._frozen.in_place_of_masters(self._engine, self._optimizer, self.zero.stage, evaluates=evaluates)

    @torch.no_grad()
    def _swap(self) -> None:
        self.average.wait()
        for index, flat in enumerate(self._masters()):
            average = self.average.values[str(index)]
            kept = flat.detach().to(average.device, copy=True)
            flat.copy_(average)
            average.copy_(kept)
        internals.refresh(self._optimizer, self.zero.stage)

    def _masters(self) -> list[Tensor]:
        return internals.masters(self._optimizer, self.zero.stage)

    def _group_of(self, flat: int) -> ShardGroup:
        index = self._optimizer.sub_group_to_group_id[flat] if self.zero.stage == 3 else flat
        group: ShardGroup = self.shard_optimizer.param_groups[index]
        return group

    def _publish_scales(self) -> None:
        if self.scales is not None:
            self._scale_tensor.copy_(torch.tensor(self.scales.values(), dtype=torch.float32), non_blocking=True)

    def _histograms(self) -> dict[str, Histogram]:
        counted = self._exponents.read(self.nodes)
        edges = [0.5 + exponent for exponent in range(exponents.LOWEST, exponents.HIGHEST + 1)]
        return {f"gradient_exponents/{name}": Histogram(edges, row) for name, row in zip([*self._names(), "outside"], counted, strict=False)}

    def _names(self) -> list[str]:
        return [f"{index:03d}-{'mlp' if index % 2 else 'attention'}" for index in range(self.resblocks)]

    def _numerics(self, values: list[float], found: measures.Measures, norms: list[float]) -> dict[str, float]:
        out = {}
        for index, name in enumerate(self._names()):
            out[f"grad_norm/{name}"] = norms[index]
            out[f"zero_share/{name}"], out[f"subnormal_share/{name}"] = found.zeros[index], found.subnormals[index]
            if self.scales is not None:
                out[f"scale/{name}"], out[f"overflows/{name}"] = values[index], float(self.scales.overflows[index])
            if isfinite(found.owed[index]):
                out[f"owed/{name}"] = found.owed[index]
        if self.nodes > 1:
            out |= self._exchanged.numerics()
        return out | ({"owed": found.owed_in_all} if isfinite(found.owed_in_all) else {})
