"""Numbers of parameters, and the bytes of parameters, gradients, optimizer state and error buffers on each GPU. Needs no torch.

Tests compare the formulas with the bytes of live tensors in real runs on 2 and 4 processes (tests/train/planning/test_planning_zero.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from model.config import StreamShape, TransformerConfig
from train.engines.zero import buckets

Layout = Literal["flat", "node"]
"""'flat': parameters are sharded over all GPUs. 'node': they are sharded over the GPUs of a machine, and machines are replicas (paper 6.1)."""
Storage = Literal["cast", "half"]
"""'cast': parameters are fp32 and are cast inside the resblocks. 'half': the matrices of resblocks are fp16 (zero.weights), with fp32 master weights in the
optimizer. 'half' corresponds to 'fp16' in train/engines/zero/groups.py, and 'cast' to both 'cast' and 'fp32' there: both have fp32 parameters."""

_FP32, _HALF = 4, 2


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters, by kind."""

    matrices: int
    """Elements of the matrices of resblocks. Only these may be stored in 16 bits, and compressed (paper D.2)."""
    blocks_rest: int
    """Gains and biases inside resblocks."""
    embeddings: int
    unembeddings: int
    final_norm: int

    @property
    def total(self) -> int:
        return self.matrices + self.rest

    @property
    def rest(self) -> int:
        """All parameters that stay fp32."""
        return self.blocks_rest + self.embeddings + self.unembeddings + self.final_norm


def count(cfg: TransformerConfig, shape: StreamShape) -> Parameters:
    """Count the parameters of a model (paper 3.1: the matrices of each layer have 12 d^2)."""
    width = cfg.width
    starts, places = 2, 2 * shape.grid + 2 * shape.text_tokens  # rows and columns; positions and padding
    return Parameters(
        matrices=cfg.layers * 12 * width**2,
        # Two norms of two vectors, and biases of d for all but the first MLP matrix, which has 4 d; and the gains of the norms of queries and keys.
        blocks_rest=cfg.layers * (13 * width + 2 * cfg.qk_norm * (width // cfg.heads)),
        embeddings=(shape.text_vocab + shape.image_vocab + places + starts) * width,
        unembeddings=(shape.text_vocab + shape.image_vocab) * width,
        final_norm=2 * width,
    )


@dataclass(frozen=True)
class Cluster:
    """A number of machines of the same size."""

    nodes: int
    gpus: int
    """GPUs in each machine."""

    @property
    def world(self) -> int:
        return self.nodes * self.gpus

    def shards(self, layout: Layout) -> int:
        """How many GPUs together hold one copy of what is sharded."""
        return self.world if layout == "flat" else self.gpus


@dataclass(frozen=True)
class States:
    """Bytes on one GPU."""

    parameters: float
    masters: float
    moments: float
    gradients: float
    buckets: float
    error_buffers: float
    update: float = 0.0
    """What the optimizer's update holds when activations, buckets and gradients of the backward pass are gone; or on stage 3 the end of the backward pass, when only
    activations are."""
    keeps_gradients: bool = False
    """Stage 3 keeps its shards of gradients, and buckets, from update to update; the others let go of them."""

    @property
    def total(self) -> float:
        """The sum of all but ``update``."""
        return self.parameters + self.masters + self.moments + self.gradients + self.buckets + self.error_buffers


def states(
    parameters: Parameters,
    stage: int,
    shards: int,
    *,
    storage: Storage = "cast",
    moment_bytes: int = 8,
    half_gradients: bool = False,
    bucket_elements: int = 0,
    live_elements: int = 0,
    error_bytes: float = 0.0,
    micro_batches: int = 1,
    touched: float = 0.0,
    overlaps: bool = False,
    orthogonalising: float = 0.0,
) -> States:
    """Bytes of model states on one GPU under DeepSpeed ZeRO, as train/engines/zero/ configures it.

    Args:
        parameters: numbers of parameters.
        stage: 0 (replicated, torch AdamW), 1, 2 or 3.
        shards: how many GPUs together hold one copy.
        storage: how matrices are stored.
        moment_bytes: bytes of the moments of a matrix element: AdamW's two take 8 in fp32, 4 in 1-6-9 and 0-6-10; Muon's momentum half of that. Those of other
            parameters are fp32.
        half_gradients: gradients of matrices are sent in 16 bits (fp16 arithmetic); there is then a bucket for them, and one for the rest.
        bucket_elements: largest number of elements of a gradient reduction (zero.reduce_bucket_size).
        live_elements: largest number of parameters that stage 3 holds gathered (``gathered``).
        error_bytes: bytes of gradient compression (``train.planning.estimate.error_bytes``).
        micro_batches: number of micro-batches of an update.
        touched: elements of all parameters of which a rank's flat shards hold some, on stages 1 and 2 (``train.planning.wire.touched``).
        overlaps: gradients are reduced during the backward pass (zero.overlap_comm).
        orthogonalising: bytes that Muon holds beside the gradients, in messages and whole matrices (``train.optimizer.muon_schedule.loads``).

    Raises:
        ValueError: the stage is unknown.
    """
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"ZeRO stage {stage}: accepted are 0, 1, 2 and 3")
    matrix = _HALF if storage == "half" else _FP32
    stored = matrix * parameters.matrices + _FP32 * parameters.rest
    moments = moment_bytes * parameters.matrices + 2 * _FP32 * parameters.rest
    if stage == 0:
        return States(stored, 0.0 if storage == "cast" else _FP32 * parameters.matrices, moments, stored, 0.0, error_bytes)
    share = _FP32 * parameters.total / shards  # partitions are reduced in fp32 (grad_accum_dtype)
    gathered_bytes = matrix * min(live_elements, parameters.total) if shards > 1 else 0.0  # one process computes with its shards
    inside, at_end = _buckets(parameters, stage, shards, bucket_elements, half_gradients=half_gradients, overlaps=overlaps)
    gradients = _gradients(stage, micro_batches, _FP32 * parameters.total, share, max(share, _FP32 * touched), overlaps)
    return States(
        parameters=stored / shards + gathered_bytes if stage == 3 else stored,
        masters=share,  # also in stage 3: an fp32 shard could serve as its own master copy, but DeepSpeed keeps a second copy
        moments=moments / shards,
        gradients=gradients,
        buckets=inside,
        error_buffers=error_bytes,
        # Gradients, and the same laid end to end; beside Muon's messages; beside the last bucket.
        update=max(2 * share, gradients + orthogonalising, gradients + at_end if stage == 3 else 0.0),
        keeps_gradients=stage == 3,
    )


def _buckets(parameters: Parameters, stage: int, shards: int, most: int, *, half_gradients: bool, overlaps: bool) -> tuple[float, float]:
    """Bytes of the buckets in the backward pass, and at its end. They are allocated whole (train/engines/zero/buckets.py). On stages 1 and 2 all are fp32, the dtype
    in which shards are summed, and there are two of each if gradients are reduced during the backward pass. Stage 3 reduces into a second buffer, as large as what
    the bucket holds: where one process holds all shards and that is the whole model, only at the end, when activations are gone."""
    kinds = [(_HALF, parameters.matrices), (_FP32, parameters.rest)] if half_gradients else [(_FP32, parameters.total)]
    elements = buckets.elements(most, (count for _, count in kinds))
    if stage < 3:
        whole = _FP32 * elements * len(kinds) * (2 if overlaps else 1)
        return whole, whole
    whole, second = sum(size * elements for size, _ in kinds), sum(size * min(elements, count) for size, count in kinds)
    at_end = shards == 1 and all(count <= most for _, count in kinds)
    return (whole if at_end else whole + second), whole + second


def _gradients(stage: int, micro_batches: int, whole: float, share: float, touched: float, overlaps: bool) -> float:
    """Stages 1 and 2 keep the whole gradient of each parameter that their shard touches, in fp32: at 8 ranks up to three times the shard, at 1,024 hundreds of
    times. With several micro-batches, stage 1 holds whole sums in fp32 between them (train/engines/zero/accumulation.py), which go as they are reduced if
    that does not overlap with the backward pass, and stage 2 a micro-batch's beside the sum so far."""
    if stage == 3:
        return share
    if micro_batches == 1:
        return touched
    return whole + overlaps * touched if stage == 1 else 2 * touched


def gathered(width: int, prefetch: int, max_live: int) -> int:
    """The largest number of parameters that stage 3 holds gathered at a time. DeepSpeed fetches parameters ahead of each matrix until it holds
    zero.stage3_max_live_parameters; in any case it holds the matrix in use and one prefetch."""
    return max(max_live, 4 * width**2 + prefetch)
