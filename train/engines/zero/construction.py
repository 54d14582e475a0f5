"""Construction of a transformer that is too large for a single process (ZeRO stage 3)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from infra.world import World
from train.config import DalleFit, ZeroSection
from train.engines.zero import internals
from train.engines.zero.configuration import deepspeed_config
from train.engines.zero.topology import node_topology


@contextmanager
def sharded_construction(fit: DalleFit, zero: ZeroSection, world: World) -> Iterator[None]:
    """During the block, each module is cut into shards as soon as its constructor ends, so that a process holds its shards and one whole module. Collective.

    Modules must initialise their parameters in their own constructors and on the CPU, as all of model/ does; then a model has the same initial weights as on the
    other ZeRO stages. On stages 1 and 2, and with a single process, nothing happens.

    Raises:
        ConfigError: DeepSpeed differs from the known version, or nodes have different numbers of processes.
    """
    if zero.stage < 3 or world.size == 1:
        yield
        return
    topology = node_topology(world) if zero.sharding == "node" else None
    internals.prepare(topology)
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    config = deepspeed_config(fit, zero, world, 1 if topology is None else topology.nodes)
    group = None if topology is None else topology.get_data_parallel_group()
    internals.deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)  # uses the existing process group
    # No overrides, because DeepSpeed would create every tensor with its own dtype and on its own device.
    with internals.deepspeed.zero.Init(data_parallel_group=group, config_dict_or_path=config, mpu=topology, tensor_overrides=[]):
        yield
