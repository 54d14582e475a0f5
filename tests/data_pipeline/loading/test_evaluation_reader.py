"""Reading a split for an evaluation: the same records on any number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipeline.loading.loaders import SequentialReader
from data_pipeline.shards.shard_set import ShardSet
from infra.errors import DataError
from infra.world import World
from tests.support.code_sets import COUNT, code_set, without

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # streaming leaves closing to the garbage collector


def read_ids(shard_set: ShardSet, world: World, limit: int, batch: int = 4) -> list[list[str]]:
    reader = SequentialReader(shard_set, world, limit, batch, lambda record, epoch: record["id"], list)
    batches = list(reader)
    assert batches == list(reader), "a second pass reads the same"
    assert len(reader) == len(batches)
    return batches


def test_evaluation_reads_the_same_records_on_any_number_of_ranks(tmp_path: Path) -> None:
    shard_set = code_set(str(tmp_path))
    for limit in (1, 10, COUNT, 1000):
        ids = [name for batch in read_ids(shard_set, World.single(), limit) for name in batch]
        assert len(ids) == len(set(ids)) == min(limit, COUNT)
        for size in (2, 5):
            dealt = [[name for batch in read_ids(shard_set, World(rank, size, rank, size), limit) for name in batch] for rank in range(size)]
            assert sorted(name for names in dealt for name in names) == sorted(ids)
            assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


def test_evaluation_spreads_over_the_whole_set_and_its_last_batch_may_be_small(tmp_path: Path) -> None:
    batches = read_ids(code_set(str(tmp_path), parts=(50, 50)), World.single(), 10)
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert [name for batch in batches for name in batch] == [f"id-{i}" for i in range(0, 100, 10)]


def test_evaluation_leaves_out_what_was_taken_down(tmp_path: Path) -> None:
    shard_set = without(code_set(str(tmp_path), parts=(6, 4)), 0, 1, 4, 9)
    assert [name for batch in read_ids(shard_set, World.single(), 100) for name in batch] == [f"id-{number}" for number in (2, 3, 5, 6, 7, 8)]


def test_evaluation_names_a_damaged_shard(tmp_path: Path) -> None:
    shard_set = code_set(str(tmp_path))
    path = tmp_path / "part-00002" / "shard.00000.mds"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(DataError, match=r"part-00002/shard.00000.mds: damaged \(its xxh64 is"):
        read_ids(shard_set, World.single(), 1000)


def test_evaluation_names_a_missing_shard(tmp_path: Path) -> None:
    shard_set = code_set(str(tmp_path))
    (tmp_path / "part-00002" / "shard.00000.mds").unlink()
    with pytest.raises(DataError, match=r"part-00002/shard.00000.mds: missing; run the stage that writes it again"):
        read_ids(shard_set, World.single(), 1000)
