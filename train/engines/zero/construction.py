"""Building a transformer that no process could hold whole (ZeRO stage 3)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from infra.world import World
from train.config import DalleFit, ZeroSection
from train.engines.zero import internals
from train.engines.zero.engine import deepspeed_config
from train.engines.zero.topology import node_topology


@contextmanager
def sharded_construction(fit: DalleFit, zero: ZeroSection, world: World) -> Iterator[None]:
    """Inside, each module that is made is cut into shards as soon as its constructor ends: a process holds its shards and one whole module. Collective.

    Modules must initialise their parameters in their own constructors, and draw on the CPU what they draw elsewhere: all of model/ does. So a model has the
    weights that it has on other stages. On stages 1 and 2, and on a process alone, nothing happens.

    Raises:
        ConfigError: DeepSpeed is not as we know it; the nodes are unequal.
    """
    if zero.stage < 3 or world.size == 1:
        yield
        return
    topology = node_topology(world) if zero.sharding == "node" else None
    internals.prepare(topology)
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    config = deepspeed_config(fit, zero, world, 1 if topology is None else topology.nodes)
    group = None if topology is None else topology.get_data_parallel_group()
    internals.deepspeed.init_distributed(
        dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False
    )  # it takes over the group that there is
    # Without overrides: DeepSpeed would make every tensor in its own dtype and on its own device.
    with internals.deepspeed.zero.Init(data_parallel_group=group, config_dict_or_path=config, mpu=topology, tensor_overrides=[]):
        yield
