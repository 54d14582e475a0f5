"""Loaders: one global order for any number of ranks, exact resumption, and no sample lost in silence."""

from __future__ import annotations

import io
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from streaming.base.shared import prefix as streaming_prefix

from data_pipeline import loaders
from data_pipeline.images import center, decode
from data_pipeline.loaders import (
    SequentialReader,
    ShardLoader,
    code_collate,
    code_transform,
    dvae_transform,
    image_collate,
    pair_transform,
    view_transform,
)
from data_pipeline.shards import CODES_SCHEMA, IMAGE_SCHEMA, CodeRecord, ImageRecord, ShardSet, merge, write_part
from data_pipeline.text import Tokenizer, train_tokenizer
from infra import storage
from infra.errors import ConfigError, DataError
from infra.world import World
from tests.ranks import run_in_ranks

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # streaming leaves closing to the garbage collector

PARTS = (11, 0, 3, 23)  # a prime number of records, in parts of uneven size with one empty
COUNT = sum(PARTS)


def code_set(url: str, prefix: str = "id", parts: tuple[int, ...] = PARTS, shard_bytes: int = 600) -> ShardSet:
    number = 0
    for part, count in enumerate(parts):
        records = [CodeRecord(f"{prefix}-{number + i}", [f"red {i}", "blue"], np.full(4, number + i, np.uint16), {}, 0, 0) for i in range(count)]
        write_part(url, part, records, "inputs", shard_bytes)
        number += count
    return merge(url, len(parts), CODES_SCHEMA, {"prefix": prefix})


def loader(sets: list[ShardSet], world: World, batch: int = 6, seed: int = 0, **options: Any) -> ShardLoader[str, list[str]]:
    return ShardLoader(sets, "", world, batch, seed, transform=lambda record, epoch: f"{record['id']}@{epoch}", collate=list, **options)


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


def draw(ranks: list[ShardLoader[str, list[str]]], batches: int) -> list[list[str]]:
    """Global batches, each sorted."""
    return [sorted(sample for rank in ranks for sample in rank.next()) for _ in range(batches)]


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


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 100))
def test_positions_of_the_endless_order_count_up_through_sets_of_any_sizes(counts: list[int], samples: int) -> None:
    blank = object.__new__(ShardLoader)
    blank.sets, blank._counts = [ShardSet("", {})] * len(counts), counts
    epoch, rest = blank._locate(samples)
    assert 0 <= rest < counts[epoch % len(counts)]
    assert sum(counts[e % len(counts)] for e in range(epoch)) + rest == samples


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


def in_two_processes(world: World, folder: str) -> list[Any]:
    """Two loaders in each process, one left in mid-epoch."""
    import torch.distributed as dist

    from data_pipeline.shards import open_set

    sets = [open_set(folder, CODES_SCHEMA)]
    first, second = loader(sets, world), loader(sets, world, seed=5)
    drawn = [first.next() for _ in range(15)]
    second.next()
    state = first.state()
    further = [first.next() for _ in range(4)]
    first.restore(state)
    assert [first.next() for _ in range(4)] == further
    dist.destroy_process_group()
    third = loader(sets, world)  # with no process group: streaming makes one for the moment
    last = third.next()
    dist.init_process_group("gloo")  # which run_in_ranks ends
    return [drawn, last, sorted({dataset._shm_prefix_int for each in (first, second, third) for dataset in each._datasets})]


def test_two_processes_share_the_order_of_one_and_end_in_mid_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sets = [code_set(str(tmp_path))]
    wanted = draw([loader(sets, World.single())], 15)
    with _free_port() as port:
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        results = run_in_ranks(in_two_processes, 2, str(tmp_path))
    assert [sorted(a + b) for a, b in zip(results[0][0], results[1][0], strict=True)] == wanted
    assert sorted(results[0][1] + results[1][1]) == wanted[0]
    assert results[0][2] == results[1][2] and len(results[0][2]) == 3, "one name in shared memory for each loader, the same on both ranks"


class _free_port:
    def __enter__(self) -> int:
        import socket

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])

    def __exit__(self, *_: object) -> None:
        return None


def test_no_thread_of_a_loader_keeps_the_process_alive_in_mid_epoch(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    one = loader([code_set(str(tmp_path), parts=(6000,), shard_bytes=1 << 20)], World.single(), batch=2)  # more than threads look ahead
    one.next()
    mine = set(threading.enumerate()) - before
    assert mine and all(thread.daemon for thread in mine), "Python waits at exit for threads that are no daemons, and these wait for us"


def test_names_in_shared_memory_belong_to_one_loader_and_no_other_job(tmp_path: Path) -> None:
    sets = [code_set(str(tmp_path))]
    a, b = (loader(sets, World.single())._datasets[0]._shm_prefix_int for _ in range(2))
    assert a != b and min(a, b) > 1_000_000, "streaming counts from 0, where other jobs' names are"
    assert streaming_prefix._each_prefix_int().__next__() == 0, "and other users of streaming in this process are left alone"


# --- Faults: an epoch never ends early in silence -----------------------------------------------------------------------------------------


def test_a_missing_shard_is_an_error_that_names_the_set(tmp_path: Path) -> None:
    sets = [code_set(str(tmp_path))]
    (tmp_path / "part-00003" / "shard.00001.mds").unlink()
    one = loader(sets, World.single())
    with pytest.raises(DataError, match=rf"{tmp_path}: .* of {COUNT} samples of this rank"):
        draw([one], COUNT)


def test_an_epoch_that_streaming_ends_early_and_silently_is_an_error(tmp_path: Path) -> None:
    one = loader([code_set(str(tmp_path), parts=(50, 50))], World.single(), batch=4)
    one.next()
    one._datasets[0]._event.set()  # what a failed look-ahead thread leaves behind
    with pytest.raises(DataError, match=r"epoch 0 ended after \d+ of 100 samples of this rank; a shard is missing, damaged or cannot be"):
        draw([one], 30)


@pytest.mark.parametrize("fault", ["missing", "corrupt"])
def test_a_shard_that_is_missing_or_corrupt_on_s3_is_an_error(s3: str, tmp_path: Path, fault: str) -> None:
    sets = [code_set(s3)]
    name = storage.join(s3, "part-00003/shard.00001.mds")
    data = bytearray(storage.read_bytes(name))
    data[-1] ^= 1
    storage.delete(name)
    if fault == "corrupt":
        storage.write_bytes(name, bytes(data))
    one = ShardLoader(sets, tmp_path, World.single(), 1, 0, transform=lambda record, epoch: record["id"], collate=list)
    with pytest.raises(DataError, match=rf"{s3}: .* of {COUNT} samples of this rank"):
        draw([one], COUNT)


def test_a_set_on_s3_gives_the_batches_of_the_same_set_on_disk(s3: str, tmp_path: Path) -> None:
    remote, local = code_set(s3), code_set(str(tmp_path / "set"))
    a = ShardLoader([remote], tmp_path, World.single(), 5, 0, transform=lambda record, epoch: record["id"], collate=list)
    b = ShardLoader([local], s3, World.single(), 5, 0, transform=lambda record, epoch: record["id"], collate=list)
    assert [a.next() for _ in range(10)] == [b.next() for _ in range(10)]
    assert list((tmp_path / "cache").rglob("*.mds")), "shards of a remote set are kept here"
    readers = [SequentialReader(each, World.single(), 9, 4, lambda record, epoch: record["id"], list, tmp_path) for each in (remote, local)]
    assert list(readers[0]) == list(readers[1])


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


def test_an_index_of_another_length_than_the_manifest_is_refused(tmp_path: Path) -> None:
    found = code_set(str(tmp_path))
    with pytest.raises(DataError, match=rf"its index has {COUNT} records, its manifest 99; run its stage again"):
        loader([ShardSet(found.url, found.manifest | {"count": 99})], World.single())


def test_a_state_of_another_order_is_refused(tmp_path: Path) -> None:
    a, b = code_set(str(tmp_path / "a"), "a"), code_set(str(tmp_path / "b"), "b")
    state = loader([a], World.single()).state()
    with pytest.raises(DataError, match=r"another order of samples \(seed: 0 in the checkpoint, 7 now\); go back to"):
        loader([a], World.single(), seed=7).restore(state)
    with pytest.raises(DataError, match=rf"sets: \['{a.content_hash}'\] in the checkpoint, \['{b.content_hash}'\] now"):
        loader([b], World.single()).restore(state)


# --- Evaluation ---------------------------------------------------------------------------------------------------------------------------


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


def test_evaluation_names_a_missing_shard(tmp_path: Path) -> None:
    shard_set = code_set(str(tmp_path))
    (tmp_path / "part-00002" / "shard.00000.mds").unlink()
    with pytest.raises(DataError, match=r"part-00002/shard.00000.mds: missing; run the stage that writes"):
        read_ids(shard_set, World.single(), 1000)


# --- Batches ------------------------------------------------------------------------------------------------------------------------------


def png(seed: int, size: int = 40) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def image_set(url: str, count: int = 12) -> ShardSet:
    captions = ["a red apple", "an apple", "the redder of two apples"]
    write_part(url, 0, [ImageRecord(f"id-{i}", captions, png(i), 40, 40, "s", "l", "g", "train") for i in range(count)], "inputs")
    return merge(url, 1, IMAGE_SCHEMA, {})


TOKENIZER = Tokenizer(train_tokenizer(["a red apple", "an apple", "the redder of two apples"], 400), 16)


def test_image_batches_are_floats_between_zero_and_one_made_from_their_counters_alone(tmp_path: Path) -> None:
    sets = [image_set(str(tmp_path))]
    batches = []
    for size in (1, 2):
        one = ShardLoader(sets, "", World.single(), 12 // size, 3, dvae_transform(16, 9 / 8, 12 / 8, 3), image_collate)
        drawn = [one.next() for _ in range(2 * size)]
        batches.append(
            {(name, k // size): pixels for k, batch in enumerate(drawn) for name, pixels in zip(batch["ids"], batch["pixels"], strict=True)}
        )
    assert batches[0].keys() == batches[1].keys() and all(torch.equal(batches[0][key], batches[1][key]) for key in batches[0])
    pixels = batches[0]["id-0", 0]
    assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.float32 and 0 <= pixels.min() < 0.3 and 0.7 < pixels.max() <= 1
    assert not torch.equal(pixels, batches[0]["id-0", 1]), "another epoch, another crop"


def test_colours_keep_their_channels(tmp_path: Path) -> None:
    picture = np.zeros((1, 2, 2, 3), np.uint8)
    picture[0, 0, 1] = (255, 51, 0)
    pixels = loaders.to_pixels(picture)
    assert pixels[0, :, 0, 1].tolist() == [1.0, pytest.approx(0.2), 0.0] and pixels.sum() == pytest.approx(1.2)


def test_pairs_carry_one_caption_drawn_anew_each_epoch(tmp_path: Path) -> None:
    sets = [image_set(str(tmp_path))]
    one = ShardLoader(sets, "", World.single(), 12, 3, pair_transform(16, 9 / 8, TOKENIZER, 3), image_collate)
    drawn: Counter[str] = Counter()
    for _ in range(8):
        batch = one.next()
        assert batch["text"].shape == (12, 16) and batch["text"].dtype == batch["lengths"].dtype == torch.int64
        drawn.update(TOKENIZER.decode(ids[:length]) for ids, length in zip(batch["text"], batch["lengths"], strict=True))
    assert set(drawn) == {"a red apple", "an apple", "the redder of two apples"}
    assert min(drawn.values()) > 96 / 3 / 2


def test_code_batches_carry_codes_as_int64_and_captions_under_dropout(tmp_path: Path) -> None:
    sets = [code_set(str(tmp_path))]
    one = ShardLoader(sets, "", World.single(), COUNT, 0, code_transform(TOKENIZER, 0, dropout=0.5), code_collate)
    batch = one.next()
    assert batch["codes"].dtype == torch.int64 and batch["codes"].shape == (COUNT, 4)
    assert all(f"id-{codes[0]}" == name for name, codes in zip(batch["ids"], batch["codes"], strict=True))
    record = {"id": "x", "captions": ["redder apples", "apple"], "codes": np.zeros(4, np.uint16)}
    transform = code_transform(TOKENIZER, 0, dropout=0.5)
    assert np.array_equal(transform(record, 3)["text"], transform(record, 3)["text"])
    assert len({tuple(transform(record, epoch)["text"]) for epoch in range(30)}) > 5
    first = code_transform(TOKENIZER, 0, first_caption=True)
    assert {TOKENIZER.decode(first(record, epoch)["text"]) for epoch in range(30)} == {"redder apples"}


def test_the_view_of_evaluation_is_the_central_crop_and_the_first_caption(tmp_path: Path) -> None:
    reader = SequentialReader(image_set(str(tmp_path)), World.single(), 12, 12, view_transform(16, TOKENIZER), image_collate)
    (batch,) = reader
    expected, _ = center(decode(png(5)), 16)
    assert torch.equal(batch["pixels"][5], loaders.to_pixels(expected[None])[0])
    assert {TOKENIZER.decode(ids) for ids in batch["text"]} == {"a red apple"}
    (plain,) = SequentialReader(image_set(str(tmp_path)), World.single(), 12, 12, view_transform(16), image_collate)
    assert set(plain) == {"ids", "pixels"}
