"""Bytes that one GPU sends in an update, within its machine and to others. Needs no torch. Assumes ring algorithms: an all-reduce sends twice as much as a gather."""

from __future__ import annotations

from dataclasses import dataclass

from model.config import TransformerConfig
from train.planning.states import Cluster, Layout, Parameters, Storage

_FP32, _HALF = 4, 2
_TABLE_1 = {1920: 512, 2688: 640, 3968: 896}
"""Width -> smallest total rank at which the training loss is as good as without compression (paper, Table 1)."""


def smallest_rank(width: int) -> int | None:
    """The total rank of Table 1 for a width; None for widths that are not in that table."""
    return _TABLE_1.get(width)


def factor_elements(width: int, rank: int, gpus: int) -> tuple[int, int]:
    """Numbers of elements of P and of Q that one GPU sends for one layer (paper, Table 2). ``rank`` is the total over the machine's GPUs.

    Raises:
        ValueError: the rank is not a multiple of the number of GPUs.
    """
    if rank % gpus:
        raise ValueError(f"rank {rank} does not divide over {gpus} GPUs of a machine; use a multiple of {gpus}")
    # (5 d r m + 4 d r) / m^2 and (d r m + 8 d r) / m^2
    each = width * rank
    return (5 * each * gpus + 4 * each) // gpus**2, (each * gpus + 8 * each) // gpus**2


def sent_share(width: int, rank: int, gpus: int) -> float:
    """Size of the factors divided by that of the gradients, r (m + 2) / (2 d m), if matrices are divided into whole rows (paper E.1)."""
    return sum(factor_elements(width, rank, gpus)) / (12 * width**2 / gpus)


@dataclass(frozen=True)
class Traffic:
    """Bytes sent by one GPU in one update."""

    inside: float
    """Within its machine."""
    outside: float
    """To other machines, through its share of the machine's network."""


def traffic(
    cfg: TransformerConfig,
    parameters: Parameters,
    cluster: Cluster,
    stage: int,
    layout: Layout,
    *,
    storage: Storage = "cast",
    half_gradients: bool = False,
    all_reduces: bool = True,
    micro_batches: int = 1,
    contrasts: bool = False,
) -> Traffic:
    """The bytes that one GPU sends in an update.

    Stages 0 to 2 reduce gradients, stage 2 in each micro-batch; stages 1 and 2 gather the parameters after the update. Stage 3 gathers parameters for each forward and
    backward pass, and reduce-scatters gradients in each micro-batch. Between machines, the layout 'node' reduces only each GPU's own shard (for compression see
    train/planning/wire.py).

    Args:
        half_gradients: gradients of matrices are sent in 16 bits.
        all_reduces: stages 1 and 2 all-reduce gradients, although a reduction to each owner would be enough (zero.use_multi_rank_bucket_allreduce).
        contrasts: forward passes with frozen weights come before the others: stages 1 and 2 gather those, and then the parameters again; stage 3 gathers for each pass.
    """
    stored = (_HALF if storage == "half" else _FP32) * parameters.matrices + _FP32 * parameters.rest
    matrix_gradient = _HALF if half_gradients else _FP32
    gradients = matrix_gradient * parameters.matrices + _FP32 * parameters.rest
    shards = cluster.shards(layout)
    share = (shards - 1) / shards
    if stage == 3:
        sent = micro_batches * share * ((3 if contrasts else 2) * stored + gradients)
    else:
        reductions = micro_batches if stage == 2 else 1
        sent = share * ((2 if all_reduces or not stage else 1) * gradients * reductions + ((3 if contrasts else 1) * stored if stage else 0))
    if layout == "flat":
        return _ring(sent, cluster)
    if cluster.nodes == 1:
        return Traffic(sent, 0.0)
    between = 2 * (cluster.nodes - 1) / cluster.nodes
    own_matrices, own_rest = parameters.matrices / cluster.gpus, parameters.rest / cluster.gpus
    return Traffic(sent, between * (matrix_gradient * own_matrices + _FP32 * own_rest))


def gathered(parameters: Parameters, cluster: Cluster, stage: int, layout: Layout, *, storage: Storage = "cast", contrasts: bool = False) -> Traffic:
    """The part of ``traffic`` that no computation hides: stages 1 and 2 gather the parameters after the update, and what follows needs them."""
    if stage not in (1, 2):
        return Traffic(0.0, 0.0)
    stored = (_HALF if storage == "half" else _FP32) * parameters.matrices + _FP32 * parameters.rest
    shards = cluster.shards(layout)
    sent = (shards - 1) / shards * (3 if contrasts else 1) * stored
    return _ring(sent, cluster) if layout == "flat" else Traffic(sent, 0.0)


def _ring(sent: float, cluster: Cluster) -> Traffic:
    """What each GPU sends in a ring over all. Only one GPU of a machine sends to another machine, so each GPU's share of the network carries 1/gpus of its bytes."""
    return Traffic(sent if cluster.gpus > 1 else 0.0, sent / cluster.gpus if cluster.nodes > 1 else 0.0)


def messages(parameters: Parameters, tensors: int, stage: int, bucket_elements: int, micro_batches: int, shards: int) -> int:
    """Number of messages of an update whose latency counts: the two that carry figures, reductions by buckets, and gathers by groups or, on stage 3, by parameters."""
    if shards == 1:
        return 2
    buckets = -(-parameters.total // bucket_elements)
    if stage == 3:
        return 2 + micro_batches * (buckets + 2 * tensors)
    return 2 + buckets * (micro_batches if stage == 2 else 1) + (2 if stage else 0)
