"""gs:// and az:// through storage, on stand-ins for their servers: names, ranges, one creator of many, requests that break, and a run folder. About 25 s."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra import cloud, cloud_errors, lease, storage
from infra.errors import ConfigError, DataError, MissingError, UnreachableError
from infra.job import Job
from tests.support import cloud_servers, drawable_run, made_sets
from tests.support.fault_proxy import FaultProxy, Rule, fault_proxy
from tests.support.made_sets import image
from train.drawing.source import open_models

SCHEMES = ("gs", "az")


@pytest.fixture(scope="module", params=SCHEMES)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """(scheme, endpoint) of a server."""
    if lacking := cloud_servers.lacking(request.param):
        pytest.skip(f"{request.param}://: not installed here: {lacking}")
    with cloud_servers.serve(request.param, tmp_path_factory.mktemp(request.param)) as endpoint:
        yield request.param, endpoint


@pytest.fixture
def proxy(server: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """What stands before the server, and breaks requests by its rules."""
    with fault_proxy(server[1]) as running:
        for name, value in cloud_servers.variables(server[0], running.endpoint).items():
            monkeypatch.setenv(name, value)
        yield running


@pytest.fixture
def root(server: tuple[str, str], proxy: FaultProxy) -> str:
    """A fresh prefix."""
    bucket = f"{server[0]}://bucket-{secrets.token_hex(4)}"
    cloud._files(bucket).mkdir(bucket.partition("://")[2])
    proxy.requests.clear()
    return f"{bucket}/runs"


def test_what_is_written_is_read_back_listed_and_deleted(root: str) -> None:
    names = ["a/x", "a/y z.txt", "b/[odd] %20#*?.bin", "ü/你好.txt", "a/.tmp-0123"]
    for name in names:
        storage.write_bytes(storage.join(root, name), name.encode())
    assert [storage.read_bytes(storage.join(root, name)) for name in names] == [name.encode() for name in names]
    assert storage.list_files(root) == sorted(name for name in names if ".tmp-" not in name)
    assert [found.name for found in storage.glob(f"{root}/a/*")[1]] == ["x", "y z.txt"]
    assert storage.size(storage.join(root, "a/x")) == 3 and storage.modified(storage.join(root, "a/x")) > 1e9
    assert not storage.exists(storage.join(root, "a")) and storage.exists(storage.join(root, "a/x"))
    assert storage.read_range(storage.join(root, "a/y z.txt"), 2, 3) == b"y z"
    before = storage.stat(storage.join(root, "a/x")).version
    storage.write_bytes(storage.join(root, "a/x"), b"new")
    assert storage.stat(storage.join(root, "a/x")).version != before
    storage.delete(storage.join(root, "a/x"))
    storage.delete(storage.join(root, "a/x"))
    storage.delete_prefix(storage.join(root, "a"))
    assert storage.list_files(root) == sorted(["b/[odd] %20#*?.bin", "ü/你好.txt"])


def test_of_racing_creators_exactly_one_wins_and_its_data_stay(root: str) -> None:
    wins: list[int] = []
    barrier = threading.Barrier(8)

    def claim(number: int) -> None:
        barrier.wait()
        if storage.create_once(f"{root}/lock", str(number).encode()):
            wins.append(number)

    threads = [threading.Thread(target=claim, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1 and storage.read_bytes(f"{root}/lock") == str(wins[0]).encode()
    cloud.check_creation(f"{root}/lock")


def test_a_creator_whose_answer_is_lost_knows_its_own_object(root: str, proxy: FaultProxy) -> None:
    method = "POST" if root.startswith("gs") else "PUT"
    proxy.rules = [Rule(rf"^{method} .*(uploadType|lock)", "truncate", after=0)]
    assert storage.create_once(f"{root}/lock", b"mine"), proxy.requests
    assert proxy.injected and storage.read_bytes(f"{root}/lock") == b"mine"
    assert not storage.create_once(f"{root}/lock", b"mine"), "another caller with the same bytes is another creator"


def test_a_large_file_travels_whole_through_broken_requests(root: str, proxy: FaultProxy, tmp_path: Path) -> None:
    content = secrets.token_bytes(2 * cloud.RANGE_BYTES + 12345)
    (tmp_path / "big").write_bytes(content)
    storage.upload_file(tmp_path / "big", f"{root}/big")
    # Azure's own client notices a body that ends early and goes on; so does Google's where the length is known.
    proxy.rules = [Rule(r"^GET .*big", "reset"), Rule(r"^GET .*big", "truncate", after=1000)]
    if root.startswith("gs"):  # Azure's client waits 20 seconds after a 503, and goes on too
        proxy.rules.append(Rule(r"^GET .*big", "503"))
    faults = len(proxy.rules)
    storage.download_file(f"{root}/big", tmp_path / "copy", storage.sha256_file(tmp_path / "big"))
    assert (tmp_path / "copy").read_bytes() == content and len(proxy.injected) == faults
    proxy.rules = [Rule(r"^GET .*big", "reset")]
    with storage.open_stream(f"{root}/big", 100) as stream:
        assert stream.read() == content[100:]
    with storage.open_seekable(f"{root}/big") as file:
        file.seek(-5, 2)
        assert file.read() == content[-5:]


def test_a_byte_that_flips_on_its_way_is_refused_where_the_hash_is_known(root: str, proxy: FaultProxy, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123456789" * 1000)
    storage.upload_file(tmp_path / "file", f"{root}/file")
    proxy.rules = [Rule(r"^GET .*(/download/storage|devstoreaccount1).*file", "corrupt", count=-1)]
    with pytest.raises(DataError, match="file"):
        storage.download_file(f"{root}/file", tmp_path / "copy", storage.sha256_file(tmp_path / "file"))
    assert not (tmp_path / "copy").exists()


def test_what_changes_while_it_is_read_is_refused(root: str) -> None:
    storage.write_bytes(f"{root}/file", b"x" * 100)
    with pytest.raises(DataError, match="has changed while it was being read"), storage.open_stream(f"{root}/file") as stream:
        stream.read(10)
        storage.write_bytes(f"{root}/file", b"y" * 100)
        stream.read()


def test_missing_objects_and_buckets_are_told_apart(root: str, tmp_path: Path) -> None:
    for action in (
        storage.read_bytes,
        storage.size,
        lambda url: storage.read_range(url, 0, 1),
        lambda url: storage.download_file(url, tmp_path / "x"),
    ):
        with pytest.raises(MissingError, match=r"/runs/no: does not exist"):
            action(f"{root}/no")
    nowhere = f"{root.partition('://')[0]}://no-such-bucket-{secrets.token_hex(4)}/x"
    for act in (lambda: storage.write_bytes(nowhere, b""), lambda: storage.list_files(nowhere), lambda: storage.create_once(nowhere, b"")):
        with pytest.raises(ConfigError, match="the bucket does not exist; create it, or name another one"):
            act()
    with pytest.raises(DataError, match="larger than 3 bytes"):
        storage.write_bytes(f"{root}/four", b"four")
        storage.read_at_most(f"{root}/four", 3)
    with pytest.raises(ConfigError, match="refusing to delete a whole bucket"):
        storage.delete_prefix(root.rpartition("/")[0])


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (
            PermissionError("no"),
            ConfigError,
            r"refused, or no usable credentials \(no\); .*(GOOGLE_APPLICATION_CREDENTIALS|AZURE_STORAGE_CONNECTION_STRING)",
        ),
        (TimeoutError(), UnreachableError, r"failed after repeated attempts \(TimeoutError\); check the network"),
        (OSError("odd"), UnreachableError, r"failed \(odd\); check the network"),
        (UnicodeDecodeError("utf-8", b"x", 0, 1, "odd"), UnreachableError, r"an answer came damaged"),
        (ValueError("odd"), ConfigError, r"not a valid name or setting \(odd\)"),
        (KeyError("odd"), DataError, r"the server answered an error \(KeyError: 'odd'\)"),
    ],
)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_other_errors_say_what_to_look_at(scheme: str, error: Exception, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=rf"{scheme}://b/k: {words}"), cloud_errors.told(f"{scheme}://b/k"):
        raise error


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_library_that_is_not_installed_is_named_with_its_command(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cloud, "_known", {})
    monkeypatch.setitem(__import__("sys").modules, {"gs": "gcsfs", "az": "adlfs"}[scheme], None)
    with pytest.raises(ConfigError, match=rf"{scheme}:// needs a library that is not installed .*: pip install -c constraints.txt"):
        storage.read_bytes(f"{scheme}://bucket/key")
    with pytest.raises(ConfigError, match=rf"{scheme}://: the bucket is missing; expected {scheme}://bucket/prefix"):
        storage.read_bytes(f"{scheme}://")


def test_a_run_folder_with_its_sets_checkpoints_exports_and_leases_lies_there(root: str, tmp_path: Path) -> None:
    here, there = drawable_run.make(str(tmp_path / "run"), live=True), drawable_run.make(f"{root}/run", live=True)
    assert storage.list_files(there.url) == storage.list_files(here.url)
    models = open_models(there.url)
    assert models.lineage == open_models(here.url).lineage and "after update 10" in models.description
    images = [image(number) for number in range(5)]
    remote, local = made_sets.make_images(f"{root}/images", [images]), made_sets.make_images(str(tmp_path / "images"), [images])
    assert remote.content_hash == local.content_hash
    assert [record["image"] for record in remote.records()] == [record["image"] for record in local.records()]
    second = lease.hold(there.url, "dalle", Job())
    with lease.hold(there.url, "dalle", Job()), pytest.raises(ConfigError, match="another launcher runs 'dalle' in this folder"), second:
        raise AssertionError("held twice")
