"""Which processes shard together: all of them, or those of a node, with replicas on the other nodes (paper 2.5; DEEPSPEED.md beside this file, 5)."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch.distributed as dist

from infra.errors import ConfigError
from infra.world import World


class NodeTopology:
    """An ``mpu`` for DeepSpeed whose data-parallel group is the node, so that ZeRO shards and reduces within the node.

    ``between`` is the group of ranks with the same local rank, one of each node; gradients of equal shards are summed over it.
    """

    def __init__(self, world: World) -> None:
        """Collective. Raises: ConfigError: the nodes do not hold equal numbers of processes."""
        size = world.local_size
        if world.size % size:
            raise ConfigError(
                f"zero.sharding = 'node': {world.size} processes do not divide into nodes of {size}; start equally many on each, or use 'flat'."
            )
        self.nodes, self.node_size, self.local = world.size // size, size, world.rank % size
        within = [dist.new_group(list(range(node * size, (node + 1) * size))) for node in range(self.nodes)]
        between = [dist.new_group(list(range(local, world.size, size))) for local in range(size)]
        alone = [dist.new_group([rank]) for rank in range(world.size)]
        self.node = world.rank // size
        self.within, self.between, self.alone = within[self.node], between[self.local], alone[world.rank]

    def get_data_parallel_group(self) -> Any:
        """The processes of this node."""
        return self.within

    def get_data_parallel_rank(self) -> int:
        """This process's rank in the node."""
        return self.local

    def get_data_parallel_world_size(self) -> int:
        """Number of processes of the node."""
        return self.node_size

    def get_model_parallel_group(self) -> Any:
        """A group of this process only: there is no model parallelism."""
        return self.alone

    def get_model_parallel_rank(self) -> int:
        """0."""
        return 0

    def get_model_parallel_world_size(self) -> int:
        """1."""
        return 1


@cache
def node_topology(world: World) -> NodeTopology:
    """The topology of a world, whose groups are created once in a process."""
    return NodeTopology(world)
