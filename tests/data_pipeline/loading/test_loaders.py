"""Loaders: one global order for any number of ranks, exact resumption, and no sample lost in silence."""

from __future__ import annotations

import dataclasses
import itertools
import os
import socket
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from streaming.base.shared import prefix as streaming_prefix

from data_pipeline.loading import loaders
from data_pipeline.shards.shard_set import CODES_SCHEMA, ShardSet
from infra.errors import ConfigError, DataError
from infra.world import World
from tests.support.code_sets import COUNT, code_set, draw, loader, without
from tests.support.ranks import run_in_ranks

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # streaming leaves closing to the garbage collector


def test_every_epoch_holds_every_sample_once_in_another_order(tmp_path: Path) -> None:
    one = loader([code_set(str(tmp_path))], World.single(), batch=1)
    epochs = [[one.next()[0] for _ in range(COUNT)] for _ in range(3)]
    for number, epoch in enumerate(epochs):
        assert sorted(epoch) == sorted(f"id-{i}@{number}" for i in range(COUNT))
    orders = [[sample.split("@")[0] for sample in epoch] for epoch in epochs]
    assert orders[0] != orders[1] != orders[2] and orders[0] != [f"id-{i}" for i in range(COUNT)]


def test_global_batches_are_equal_on_any_number_of_ranks_and_nothing_is_dropped_or_repeated(tmp_path: Path, as_rank: Any) -> None:
    sets = [code_set(str(tmp_path))]
    wanted = draw(as_rank(sets, 1), COUNT)
    assert Counter(sample for batch in wanted for sample in batch) == {f"id-{i}@{epoch}": 1 for i in range(COUNT) for epoch in range(6)}
    for size in (2, 3, 6):
        assert draw(as_rank(sets, size), COUNT) == wanted


def test_a_loader_resumes_to_the_sample_on_another_number_of_ranks(tmp_path: Path, as_rank: Any) -> None:
    sets = [code_set(str(tmp_path))]
    wanted = draw(as_rank(sets, 1), 20)
    for done, before, after in ((0, 1, 2), (3, 2, 1), (6, 3, 2), (7, 1, 3), (13, 2, 3)):
        first = as_rank(sets, before)
        draw(first, done)
        states = [rank.state() for rank in first]
        assert all(state == states[0] for state in states)
        second = as_rank(sets, after)
        for rank in second:
            rank.restore(states[0])
        assert draw(second, 20 - done) == wanted[done:]


def test_a_loader_goes_back_to_a_state_it_has_passed(tmp_path: Path) -> None:
    one = loader([code_set(str(tmp_path))], World.single())
    one.next()
    state = one.state()
    following = [one.next() for _ in range(9)]
    one.restore(state)
    assert [one.next() for _ in range(9)] == following


def test_epochs_take_turns_over_the_sets(tmp_path: Path) -> None:
    sets = [code_set(str(tmp_path / "a"), "a", (5,)), code_set(str(tmp_path / "b"), "b", (4, 3))]
    one = loader(sets, World.single(), batch=3)
    samples = [sample for _ in range(8) for sample in one.next()]
    assert one.epoch == 4
    for epoch, names in enumerate((samples[:5], samples[5:12], samples[12:17], samples[17:24])):
        prefix, count = ("a", 5) if epoch % 2 == 0 else ("b", 7)
        assert sorted(names) == [f"{prefix}-{i}@{epoch}" for i in range(count)]


def test_the_seed_sets_the_order_and_without_shuffling_records_keep_theirs(tmp_path: Path) -> None:
    sets = [code_set(str(tmp_path))]
    a, b, c = (loader(sets, World.single(), batch=COUNT, seed=seed).next() for seed in (1, 1, 2))
    assert a == b != c
    plain = loader(sets, World.single(), batch=COUNT, shuffle=False)
    assert plain.next() == [f"id-{i}@0" for i in range(COUNT)]


def on_two_nodes(world: World, folder: str) -> list[Any]:
    """Loaders of 2 nodes with 2 ranks each, made by 4 processes of this machine: without workers, with them, and left in mid-epoch."""
    import torch.distributed as dist

    from data_pipeline.shards.shard_set import open_set

    here = World(world.rank, world.size, world.rank % 2, 2)
    os.environ |= {"LOCAL_RANK": str(here.local_rank), "LOCAL_WORLD_SIZE": "2"}
    sets = [open_set(folder, CODES_SCHEMA)]
    plain, worked = loader(sets, here, batch=12), loader(sets, here, batch=12, workers=2)
    drawn = [plain.next() for _ in range(8)]
    assert [worked.next() for _ in range(8)] == drawn
    state = worked.state()
    further = [worked.next() for _ in range(4)]
    worked.restore(state)
    assert [worked.next() for _ in range(4)] == further == [plain.next() for _ in range(4)]
    dist.destroy_process_group()
    third = loader(sets, here, batch=12)  # with no process group: streaming makes one for the moment
    last = third.next()
    dist.init_process_group("gloo", f"file://{folder}/store", rank=world.rank, world_size=world.size)  # which run_in_ranks ends
    names = [cache._claim.number for each in (plain, worked, third) for cache in each._caches]
    for each in (plain, worked, third):
        each.close()
    return [drawn + further, last, names, state]


def test_two_nodes_of_two_ranks_share_an_order_that_three_ranks_go_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_rank: Any) -> None:
    sets = [code_set(str(tmp_path))]
    wanted = draw([loader(sets, World.single(), batch=12)], 12)
    with _free_port() as port:
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        results = run_in_ranks(on_two_nodes, 4, str(tmp_path))
    assert [sorted(itertools.chain(*parts)) for parts in zip(*(result[0] for result in results), strict=True)] == wanted
    assert sorted(itertools.chain(*(result[1] for result in results))) == wanted[0]
    assert results[0][2] == results[1][2] != results[2][2] == results[3][2], "names in shared memory are those of the node"
    assert len(set(results[0][2])) == 3, "and of the loader"
    assert all(result[3] == results[0][3] for result in results)
    after = as_rank(sets, 3, batch=12)
    for rank in after:
        rank.restore(results[0][3])
    assert draw(after, 4) == wanted[8:]


@contextmanager
def _free_port() -> Iterator[int]:
    """A port for a store of torch. Bound meanwhile, so that the kernel gives it to nobody else; by SO_REUSEADDR, which the store sets too, it can listen."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", 0))
        yield int(probe.getsockname()[1])


def test_no_thread_of_a_loader_keeps_the_process_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[threading.Thread] = []

    class Recorded(threading.Thread):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            made.append(self)

    shard_set = code_set(str(tmp_path))
    monkeypatch.setattr("data_pipeline.loading.shard_cache.threading.Thread", Recorded)
    loader([shard_set], World.single()).next()
    assert made and all(thread.daemon for thread in made), "Python waits at exit for threads that are no daemons"


def test_a_closed_loader_leaves_nothing_behind(tmp_path: Path) -> None:
    one = loader([code_set(str(tmp_path / "set"))], World.single(), workers=1)
    one.next()
    number, (pid,) = one._caches[0]._claim.number, one.worker_pids
    assert len(list(Path("/dev/shm").glob(f"{number:06}_*"))) >= 5
    one.close()
    one.close()
    assert not [path for folder in ("/dev/shm", tempfile.gettempdir()) for path in Path(folder).glob(f"{number:06}_*")]
    assert not Path(f"/proc/{pid}").exists()


def test_names_in_shared_memory_belong_to_one_loader(tmp_path: Path) -> None:
    sets = [code_set(str(tmp_path))]
    a, b = (loader(sets, World.single())._caches[0]._claim.number for _ in range(2))
    assert a != b
    assert streaming_prefix._each_prefix_int().__next__() == 0, "other users of streaming in this process are left alone"


# --- Weights, records taken down, caches ----------------------------------------------------------------------------------------------------


def from_sources(shard_set: ShardSet, *sources: str) -> ShardSet:
    """The set with its parts told apart by source."""
    parts = sorted({shard.basename.split("/")[0] for shard in shard_set.shards})
    named = dict(zip(parts, sources, strict=True))
    vars(shard_set)["shards"] = [dataclasses.replace(shard, source=named[shard.basename.split("/")[0]]) for shard in shard_set.shards]
    return shard_set


@pytest.mark.parametrize("workers", [0, 2])
def test_weights_say_how_often_the_records_of_a_source_come(tmp_path: Path, workers: int) -> None:
    shard_set = from_sources(code_set(str(tmp_path), parts=(6, 4, 5)), "twice", "half", "plain")
    one = loader([shard_set], World.single(), batch=19, weights={"twice": 2, "half": 0.5, "unheard of": 3}, workers=workers)
    counts: Counter[str] = Counter()
    for epoch in range(4):
        names = one.next()
        assert {int(name.split("@")[1]) for name in names} == {epoch, epoch + (1 << 32)}, "a copy is augmented anew"
        counts.update(name.split("@")[0] for name in names)
    one.close()
    assert [counts[f"id-{number}"] for number in range(15)] == [8] * 6 + [2] * 4 + [4] * 5


def test_records_taken_down_in_mid_epoch_are_gone_and_no_other_is_lost_or_repeated(tmp_path: Path, as_rank: Any) -> None:
    whole = code_set(str(tmp_path))
    before = as_rank([without(whole, 3, 11)], 2)
    drawn = [name for batch in draw(before, 3) for name in batch]
    state = before[0].state()
    gone = [int(name.split("@")[0][3:]) for name in drawn[:2]] + [30, 31, 32]  # some were drawn already
    after = as_rank([without(whole, *gone)], 3)  # and 3 and 11 are back
    for rank in after:
        rank.restore(state)
    rest = []
    while after[0].epoch == 0:
        rest += [name for rank in after for name in rank.next() if name.endswith("@0")]
    assert len(set(drawn + rest)) == len(drawn + rest)
    expected = {f"id-{number}@0" for number in range(COUNT) if number not in (30, 31, 32)}
    assert expected - set(drawn + rest) <= {"id-3@0", "id-11@0"}, "which may have had their turn while they were down"
    assert set(drawn + rest) - expected <= {f"id-{number}@0" for number in (30, 31, 32)} & set(drawn)


def test_a_bounded_cache_stays_within_its_limit_and_gives_the_same_batches(s3: str, tmp_path: Path) -> None:
    shard_set = code_set(s3, parts=(400,))
    limit = 12_000
    assert sum(shard.entry["raw_data"]["bytes"] for shard in shard_set.shards) > 2 * limit
    free, bounded = (loader([shard_set], World.single(), batch=8, block=16, cache_bytes=each, cache_dir=tmp_path) for each in (0, limit))
    folder, sizes = bounded._caches[0].folder, []
    for _ in range(100):
        assert bounded.next() == free.next()
        with suppress(FileNotFoundError):  # evicted while we look
            sizes.append(sum(path.stat().st_size for path in folder.rglob("*.mds")))
    assert limit / 4 < max(sizes) <= limit
    for each in (free, bounded):
        each.close()
    assert not folder.exists()


def test_a_cache_too_small_is_refused_by_its_key(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard_set = code_set(s3, parts=(400,))
    with pytest.raises(
        ConfigError, match=r"data.cache_bytes = 5000: s3://.* needs \d+ on each node, for two blocks of 16 samples .* data.shuffle_block"
    ):
        loader([shard_set], World.single(), block=16, cache_bytes=5000)
    monkeypatch.setattr(loaders, "_limit", lambda *_: 500)
    with pytest.raises(ConfigError, match=r"data.cache_bytes = 500: .*"):
        loader([shard_set], World.single(), block=16, cache_bytes=500)


# --- What is refused ------------------------------------------------------------------------------------------------------------------------


def test_a_batch_that_does_not_divide_is_refused_by_the_key_that_sets_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"clip_fit.batch = 6 does not divide over 4 processes; use a multiple of 4"):
        loader([code_set(str(tmp_path))], World(0, 4, 0, 4), batch_key="clip_fit.batch")


def test_a_process_that_is_another_rank_than_its_environment_says_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sets = [code_set(str(tmp_path))]
    with pytest.raises(ConfigError, match=r"rank 1 of 2 \(2 on this node\), but its environment says rank 0 of 1"):
        loader(sets, World(1, 2, 1, 2))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ConfigError, match=r"rank 0 of 1 .* says rank 1 of 2"):
        loader(sets, World.single())


def test_no_set_and_empty_sets_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing to load: no shard set was given"):
        loader([], World.single())
    with pytest.raises(DataError, match=rf"nothing to load: {tmp_path} has no records; run the stage that writes it again"):
        loader([code_set(str(tmp_path), parts=(0,))], World.single())
    few = code_set(str(tmp_path), parts=(2,))
    with pytest.raises(DataError, match=rf"nothing to load: {tmp_path} has no records"):
        loader([without(few, 0, 1)], World.single())


def test_an_index_of_another_length_than_the_manifest_is_refused(tmp_path: Path) -> None:
    found = code_set(str(tmp_path))
    with pytest.raises(DataError, match=rf"its index has {COUNT} records, its manifest 99; run its stage again"):
        loader([ShardSet(found.url, found.manifest | {"stored": 99})], World.single())


def test_a_state_of_another_order_is_refused(tmp_path: Path) -> None:
    a, b = code_set(str(tmp_path / "a"), "a"), code_set(str(tmp_path / "b"), "b")
    state = loader([a], World.single()).state()
    with pytest.raises(DataError, match=r"another order of samples \(seed: 0 in the checkpoint, 7 now\); go back to"):
        loader([a], World.single(), seed=7).restore(state)
    with pytest.raises(DataError, match=rf"sets: \['{a.content_hash}'\] in the checkpoint, \['{b.content_hash}'\] now"):
        loader([b], World.single()).restore(state)
    with pytest.raises(DataError, match=r"block: 262144 in the checkpoint, 9 now; weights: {} in the checkpoint, {'x': 2.0} now"):
        loader([a], World.single(), block=9, weights={"x": 2.0}).restore(state)
    with pytest.raises(DataError, match=r"the loader's state is damaged \(position 99 of an epoch of 37 samples\); resume from an earlier"):
        loader([a], World.single()).restore(state | {"index": 99})


# --- Evaluation ---------------------------------------------------------------------------------------------------------------------------


# --- Batches ------------------------------------------------------------------------------------------------------------------------------
