"""Faults of storage and of streaming: nothing is skipped in silence, and what is broken is named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from streaming import StreamingDataset

from data_pipeline.loading import shard_cache
from data_pipeline.shards.part_writer import write_part
from data_pipeline.shards.shard_set import CODES_SCHEMA, open_set, read_marker
from data_pipeline.shards.versions import Part, collect
from infra import storage
from infra.errors import ConfigError, DataError, MissingError
from tests.support import data_faults
from tests.support.data_faults import FAULTS, Fault, code_set, read_epoch
from tests.support.fault_proxy import FaultProxy, Rule, fault_proxy
from tests.support.ranks import ROOT
from tests.support.s3_server import S3Server

pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")


@pytest.fixture(scope="module")
def proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    """A proxy in front of the real server."""
    with fault_proxy(s3_server.endpoint) as running:
        yield running


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.what for fault in FAULTS])
def test_a_fault_ends_with_every_sample_or_with_the_name_of_the_object(s3: str, proxy: FaultProxy, fault: Fault) -> None:
    data_faults.check(fault, proxy, data_faults.run(fault, proxy, code_set(s3)))


def test_the_page_of_faults_has_a_line_for_each() -> None:
    page = data_faults.PAGE.read_text()
    assert all(f"| {fault.what} | " in page for fault in FAULTS), "run python -m tests.support.data_faults"


# --- The four traps of streaming 0.13, each beside what streaming itself does ----------------------------------------------------------------


def test_an_epoch_that_streaming_ends_early_and_silently_is_an_error_here(s3: str, tmp_path: Path) -> None:
    shard_set = code_set(s3)
    storage.delete(storage.join(s3, "part-00000/shard.00002.mds"))
    with pytest.raises(DataError, match=rf"{s3}/part-00000/shard\.00002\.mds: does not exist"):
        read_epoch(shard_set, str(tmp_path / "ours"))
    # In a process of its own: its threads never end.
    script = f"""
import threading
threading.excepthook = lambda arguments: None
from streaming import StreamingDataset
stock = StreamingDataset(remote={s3!r}, local={str(tmp_path / "stock")!r}, batch_size=1, validate_hash="xxh64")
print("ended after", sum(1 for _ in stock), flush=True)
import os; os._exit(0)
"""
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=ROOT)
    if found.returncode == 0:  # depending on which thread meets the fault first, it may be an error; it must not be trusted to be
        assert int(found.stdout.split("ended after")[1]) < shard_set.count


def test_a_corrupt_shard_never_lies_in_the_cache_for_the_next_run(s3: str, tmp_path: Path) -> None:
    shard_set = code_set(s3)
    name = storage.join(s3, "part-00000/shard.00002.mds")
    original = storage.read_bytes(name)
    storage.write_bytes(name, original[:-1] + bytes([original[-1] ^ 1]))
    kept: dict[str, bytes] = {}

    def keep(folder: Any, **options: Any) -> None:
        kept.update({str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()})
        shutil.rmtree(folder, **options)

    with mock.patch("data_pipeline.loading.shared_memory.shutil", mock.Mock(rmtree=keep)), pytest.raises(DataError, match="also when fetched again"):
        read_epoch(shard_set, str(tmp_path))
    assert "part-00000/shard.00002.mds" not in kept and not [name for name in kept if "/." in name], sorted(kept)
    assert not list((tmp_path / "cache").iterdir()), "and a loader takes its cache with it"


def test_what_lies_in_a_cache_folder_is_not_trusted(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard_set = code_set(s3)
    damaged = storage.read_bytes(storage.join(s3, "part-00000/shard.00002.mds")).replace(b"id-", b"BAD")
    build = shard_cache._Dataset.__init__

    def plant(self: Any, **options: Any) -> None:
        place = options["streams"][0]._folder / "part-00000/shard.00002.mds"
        place.parent.mkdir(parents=True)
        place.write_bytes(damaged)
        build(self, **options)

    monkeypatch.setattr(shard_cache._Dataset, "__init__", plant)
    assert sorted(read_epoch(shard_set, str(tmp_path))) == sorted(f"id-{number}" for number in range(shard_set.count))
    # Stock, a file that is present is used as it is: streaming does not look at its hash.
    local = tmp_path / "stock"
    storage.download_folder(s3, local)
    (local / "part-00000/shard.00002.mds").write_bytes(damaged)
    stock = StreamingDataset(remote=s3, local=str(local), batch_size=1, predownload=1, validate_hash="xxh64")
    assert any(stock[index]["id"].startswith("BAD") for index in range(len(stock)))


def test_no_index_and_no_marker_appear_when_a_shard_cannot_be_written(s3: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S3_ENDPOINT_URL", proxy.endpoint)
    shard_set = code_set(s3)
    records = [data_faults.CodeRecord(f"id-{number}", ["x"] * 99, data_faults.np.zeros(8, "u2"), {}, 0, 0) for number in range(20)]
    proxy.rules, proxy.injected = [Rule(r"PUT .*shard\.00001\.mds", "503", -1)], []
    with data_faults.impatient(), pytest.raises(DataError, match=r"part-other/shard\.00001\.mds: the server answered SlowDown"):
        write_part(s3, "other", records, shard_bytes=1000)
    assert proxy.injected
    proxy.rules = []
    assert read_marker(s3, "other") is None, "the marker is the last file of a part"
    with pytest.raises(DataError, match=r"1 of 1 parts are not finished"):
        collect(s3, [Part("other", "")], "encode")
    assert open_set(s3, CODES_SCHEMA) == shard_set and shard_set.count == data_faults.RECORDS


# (The fourth, cleaning that removes other jobs' shared memory, stands in test_loaders_memory.py.)

# --- Damage, and its repair -----------------------------------------------------------------------------------------------------------------


def test_a_shard_with_a_wrong_hash_is_fetched_once_more(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shard_set, fetched, original = code_set(s3), [], storage.download_file

    def damaged_at_first(url: str, local: Path, sha256: str = "") -> None:
        original(url, local, sha256)
        if url.endswith("shard.00002.mds"):
            fetched.append(url)
            if len(fetched) == 1:
                local.write_bytes(local.read_bytes()[:-1] + b"\xff")

    monkeypatch.setattr(storage, "download_file", damaged_at_first)
    assert len(set(read_epoch(shard_set, str(tmp_path)))) == shard_set.count
    assert len(fetched) == 2 and "shard.00002.mds: its xxh64 is" in caplog.text and "in download 1 of 2" in caplog.text


def test_workers_hand_on_the_error_as_it_was(s3: str, tmp_path: Path) -> None:
    shard_set = code_set(s3)
    storage.delete(storage.join(s3, "part-00000/shard.00002.mds"))
    with pytest.raises(DataError) as caught:
        read_epoch(shard_set, str(tmp_path), workers=2)
    assert type(caught.value) is MissingError and str(caught.value) == f"{s3}/part-00000/shard.00002.mds: does not exist."


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.unlink(), "missing; run the stage that writes it again"),
        (lambda path: path.write_bytes(path.read_bytes()[:-5]), r"damaged \(\d+ bytes instead of \d+\)"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\xff"), r"damaged \(its xxh64 is \w+ instead of \w+\); delete its part"),
        (lambda path: (path.unlink(), path.mkdir()), "missing"),
    ],
    ids=["missing", "cut", "flipped", "a folder"],
)
def test_a_damaged_shard_of_a_local_set_is_never_trained_on(tmp_path: Path, damage: Any, words: str) -> None:
    shard_set = code_set(str(tmp_path))
    damage(tmp_path / "part-00000/shard.00002.mds")
    with pytest.raises(DataError, match=rf"{tmp_path}/part-00000/shard\.00002\.mds: {words}"):
        read_epoch(shard_set, "")


def test_shards_without_a_hash_are_refused(tmp_path: Path) -> None:
    place = Path(code_set(str(tmp_path)).version_url, "index.json")
    index = json.loads(place.read_text())
    for shard in index["shards"]:
        shard["raw_data"]["hashes"] = {}
    place.write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"shard\.\d+\.mds: its index entry has no xxh64 hash, so damage would not be seen"):
        read_epoch(open_set(str(tmp_path), CODES_SCHEMA), "")


def test_a_shard_that_failed_is_given_back_so_that_nobody_waits_for_it(tmp_path: Path) -> None:
    shard_set = code_set(str(tmp_path))
    path = tmp_path / "part-00000/shard.00002.mds"
    data = path.read_bytes()
    cache = shard_cache.ShardCache(shard_set, tmp_path, data_faults.World.single(), 10_001)
    path.write_bytes(b"")
    for _ in range(2):  # the second would wait for ever for what the first left as 'preparing'
        with pytest.raises(DataError, match="damaged"):
            cache.rows(2)
    cache.close()
    path.unlink()
    cache = shard_cache.ShardCache(shard_set, tmp_path, data_faults.World.single(), 10_002)
    with pytest.raises(DataError, match="missing"):
        cache.rows(2)
    path.write_bytes(data)
    assert cache.rows(2)[0]["id"].startswith("id-"), "what was missing may come back"
    cache.close()


def test_a_cache_full_of_shards_in_use_names_its_key(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = shard_cache.ShardCache(code_set(s3), tmp_path, data_faults.World.single(), 10_004, cache_bytes=1 << 30)

    def full(self: object, shard: int, blocking: bool = True) -> None:
        raise ValueError("Tried to evict a shard, but no shards are present to evict")

    monkeypatch.setattr(StreamingDataset, "prepare_shard", full)
    with pytest.raises(ConfigError, match=r"data\.cache_bytes = \d+: Tried to evict a shard"):
        cache.rows(2)
    cache.close()


def test_a_shard_that_vanishes_from_a_cache_is_fetched_again_and_from_a_local_set_named(s3: str, tmp_path: Path) -> None:
    for url in (s3, str(tmp_path / "set")):
        cache = shard_cache.ShardCache(code_set(url), tmp_path, data_faults.World.single(), 10_003)
        cache.rows(2)
        cache.use([])  # which closes it
        (cache.folder / "part-00000/shard.00002.mds").unlink()
        if url == s3:
            assert cache.rows(2)[0]["id"].startswith("id-")
        else:
            with pytest.raises(
                DataError, match=r"shard\.00002\.mds: vanished from .* while in use; raise data.cache_bytes, or find who deletes there"
            ):
                cache.rows(2)
        cache.close()
