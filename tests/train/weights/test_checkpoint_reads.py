"""What restoring a checkpoint reads, and how long ranks wait for each other meanwhile. A real S3 server, and real ranks; about 40 s."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from infra import s3 as objects
from infra import storage
from infra.errors import UnreachableError
from infra.world import World
from tests.data_pipeline.loading.test_loaders import _free_port
from tests.support.fault_proxy import Rule, fault_proxy
from tests.support.ranks import run_in_ranks
from tests.support.s3_server import S3Server
from train.ranks import device
from train.weights import checkpoint, checkpoint_storage
from train.weights.fragments import Fragment, even_slice


def whole(tensors: dict[str, torch.Tensor]) -> dict[str, Fragment]:
    return {name: even_slice(tensor, 0, 1) for name, tensor in tensors.items()}


def save(url: str, step: int, tensors: dict[str, torch.Tensor]) -> str:
    return checkpoint.save(url, step, whole(tensors), {"shapes": {}}, World.single(), keep=3)


@pytest.fixture
def fetched(s3: str) -> Iterator[list[int]]:
    """Bytes of every body that this process fetches from S3, by whatever function."""
    sizes: list[int] = []

    def note(parsed: dict[str, Any], **_: Any) -> None:
        sizes.append(parsed["ContentLength"])

    events = objects._client().meta.events
    events.register("after-call.s3.GetObject", note)
    yield sizes
    events.unregister("after-call.s3.GetObject", note)


def test_a_reader_fetches_the_pieces_that_it_needs_and_not_their_files(s3: str, fetched: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_storage, "PIECE_BYTES", 1 << 16)
    tensors = {f"model/{number}": torch.rand(1 << 17) for number in range(8)} | {"model/large": torch.rand(1 << 20)}
    url = save(s3, 1, tensors)
    around = sum(storage.size(storage.join(url, name)) for name in ("index.json", "meta.json", "rank-0.json"))
    for name, part, parts in (("model/3", 0, 1), ("model/large", 3, 10)):  # one tensor of many, and a rank's tenth of one
        target = even_slice(torch.zeros_like(tensors[name]), part, parts)
        fetched.clear()
        checkpoint.load(s3, 1, {name: target})
        assert torch.equal(target.tensor, even_slice(tensors[name], part, parts).tensor)
        wanted = target.tensor.nbytes
        assert wanted <= sum(fetched) - around <= wanted + 2 * (1 << 16), "of 8 MiB"


@contextmanager
def noted_requests() -> Iterator[list[tuple[int, int]]]:
    """First byte and end of every range that is read."""
    requests: list[tuple[int, int]] = []
    plain = checkpoint_storage.fill

    def read(url: str, start: int, target: memoryview) -> None:
        requests.append((start, start + len(target)))
        plain(url, start, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_storage, "fill", read)
        yield requests


@given(st.data())
def test_any_cut_is_restored_by_requests_of_bounded_size_that_read_nothing_twice(data: st.DataObject) -> None:
    count = st.integers(1, 300)
    tensors = {
        f"model/{number}": torch.randint(-999, 999, (data.draw(count),)).to(dtype)
        for number, dtype in enumerate(data.draw(st.lists(st.sampled_from([torch.int16, torch.float32]), min_size=1, max_size=6)))
    }
    cut, most, gap = (data.draw(st.integers(low, 500)) for low in (4, 1, 0))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        for name, value in {"PIECE_BYTES": cut, "READ_BYTES": most, "GAP_BYTES": gap}.items():
            patch.setattr(checkpoint_storage, name, value)
        save(folder, 1, tensors)
        assert Path(checkpoint.folder(folder, 1), "rank-0.bin").read_bytes() == b"".join(tensor.numpy().tobytes() for tensor in tensors.values())
        parts = data.draw(st.integers(1, 4))
        targets = {name: even_slice(torch.zeros_like(tensor), data.draw(st.integers(0, parts - 1)), parts) for name, tensor in tensors.items()}
        with noted_requests() as requests:
            checkpoint.load(folder, 1, targets)
    for name, target in targets.items():
        assert torch.equal(target.tensor, tensors[name][target.offset : target.offset + target.tensor.numel()])
    requests.sort()
    assert all(end - start <= most for start, end in requests)
    assert all(before[1] <= after[0] for before, after in pairwise(requests))


@pytest.mark.parametrize(("most", "expected"), [(1 << 20, [(0, 1200), (2000, 2400)]), (1000, [(0, 400), (800, 1200), (2000, 2400)])])
def test_neighbours_are_read_in_one_request_and_what_lies_far_away_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int, expected: list[tuple[int, int]]
) -> None:
    save(str(tmp_path), 1, {f"model/{number}": torch.rand(100) for number in range(6)})
    monkeypatch.setattr(checkpoint_storage, "GAP_BYTES", 400)
    monkeypatch.setattr(checkpoint_storage, "READ_BYTES", most)
    with noted_requests() as requests:
        checkpoint.load(str(tmp_path), 1, whole({name: torch.zeros(100) for name in ("model/0", "model/2", "model/5")}))
    assert sorted(requests) == expected


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "changed": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "cut within a piece": lambda data: data[:-1],
    "cut before a piece": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_object_leads_to_the_checkpoint_before(s3: str, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    monkeypatch.setattr(checkpoint_storage, "PIECE_BYTES", 64)
    monkeypatch.setattr(checkpoint_storage, "READ_BYTES", 64)
    for step in (5, 10):
        url = save(s3, step, {"model/w": torch.full((64,), float(step))})
    file = storage.join(url, "rank-0.bin")
    storage.write_bytes(file, DAMAGE[damage](storage.read_bytes(file)))
    for attempt in range(2):
        loaded = {"model/w": torch.zeros(64)}
        meta = checkpoint.load_newest(s3, whole(loaded), World.single())
        assert meta is not None and meta["step"] == 5 and loaded["model/w"].tolist() == [5.0] * 64, attempt
        storage.delete(file)


def test_a_byte_that_changes_on_its_way_costs_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(str(tmp_path), 1, {"model/w": torch.rand(100)})
    plain, read = checkpoint_storage.fill, list[int]()

    def changed_once(url: str, start: int, target: memoryview) -> None:
        plain(url, start, target)
        read.append(start)
        if len(read) == 1:
            target[0] ^= 1

    monkeypatch.setattr(checkpoint_storage, "fill", changed_once)
    checkpoint.load(str(tmp_path), 1, whole({"model/w": torch.zeros(100)}))
    assert len(read) == 2


def test_an_outage_of_the_server_is_no_damage_and_a_broken_body_is_read_again(s3: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (5, 10):
        save(s3, step, {"model/w": torch.full((1 << 10,), float(step))})
    monkeypatch.setattr(objects, "MAX_ATTEMPTS", 2)
    loaded = {"model/w": torch.zeros(1 << 10)}
    with fault_proxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("S3_ENDPOINT_URL", proxy.endpoint)
        proxy.rules = [Rule(r"GET .*step-00000010/rank-0\.bin", "503", -1)]
        with pytest.raises(UnreachableError, match=r"step-00000010/rank-0\.bin: the server answered SlowDown after at most 2 attempts"):
            checkpoint.load_newest(s3, whole(loaded), World.single())
        proxy.rules = [Rule(r"GET .*step-00000010/rank-0\.bin", "reset_body")]
        meta = checkpoint.load_newest(s3, whole(loaded), World.single())
        assert [kind for kind, _ in proxy.injected][-1] == "reset_body"
    assert meta is not None and meta["step"] == 10 and loaded["model/w"].tolist() == [10.0] * (1 << 10)


def once_late(function: Callable[..., Any]) -> Callable[..., Any]:
    """Its first call takes longer than a collective may."""
    calls: list[int] = []

    def late(*arguments: Any) -> Any:
        if not calls:
            calls.append(1)
            time.sleep(4)
        return function(*arguments)

    return late


def restore_slowly(world: World, folder: str) -> tuple[list[str], int, list[float]]:
    """The files of a checkpoint for which one rank alone has tensors; the step that both fall back to, where each is late once; and its tensor."""
    for step in (5, 10):
        tensors = {"model/w": torch.full((8,), float(step))} if world.is_main else {}
        url = checkpoint.save(folder, step, whole(tensors), {"shapes": {}}, world, keep=3)
    dist.barrier()
    names = storage.list_files(url)
    dist.barrier()  # the group that is set up below waits 3 s for its ranks
    dist.destroy_process_group()  # the tests' own
    device._COLLECTIVE_TIMEOUT = timedelta(seconds=3)
    device.set_up(world)
    if world.is_main:
        Path(url, "rank-0.bin").write_bytes(b"damaged")
        storage.list_files = once_late(storage.list_files)
    else:
        storage.read_json = once_late(storage.read_json)
        checkpoint_storage.fill = once_late(checkpoint_storage.fill)
    loaded = {"model/w": torch.zeros(8)}
    meta = checkpoint.load_newest(folder, whole(loaded), world)
    device.wait_for_all()
    device.leave_group()
    assert meta is not None
    return names, int(meta["step"]), loaded["model/w"].tolist()


def test_a_rank_without_tensors_writes_no_file_and_ranks_that_read_slowly_are_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with _free_port() as port:
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        found = run_in_ranks(restore_slowly, 2, str(tmp_path))
    assert found == [(["index.json", "meta.json", "rank-0.bin", "rank-0.json"], 5, [5.0] * 8)] * 2
