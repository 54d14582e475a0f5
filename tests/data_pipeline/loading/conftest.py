"""What tests of loaders share."""

from __future__ import annotations

from typing import Any

import pytest

from data_pipeline.loading.loaders import ShardLoader
from data_pipeline.shards.shard_set import ShardSet
from infra.world import World
from tests.support.code_sets import loader


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes loaders of ranks that are each alone on their node, one after the other in this process: they share no memory and need no peer."""
    monkeypatch.setattr("streaming.base.dataset.maybe_init_dist", lambda: False)

    def make(sets: list[ShardSet], size: int, **options: Any) -> list[ShardLoader[str, list[str]]]:
        made = []
        for rank in range(size):
            for name, value in (("RANK", rank), ("WORLD_SIZE", size), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)):
                monkeypatch.setenv(name, str(value))
            made.append(loader(sets, World(rank, size, 0, 1), **options))
        return made

    return make
