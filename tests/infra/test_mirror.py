"""A copy of files that grow reads each byte once, and notices a file that was replaced: local folders, and a real S3 server behind a counting proxy. About 6 s."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from infra import mirror, s3, storage
from infra.mirror import Look, Mirror
from tests.support.fault_proxy import Rule, fault_proxy
from tests.support.s3_server import S3Server


def _any(name: str) -> bool:
    return True


def test_a_copy_of_files_that_grow_at_random_is_equal_after_each_look_and_reads_hardly_more_than_what_is_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "_PIECE", 1000)  # so that a read takes several
    rng, source, copy = random.Random(1), tmp_path / "run", tmp_path / "copy"
    (source / "dvae").mkdir(parents=True)
    files = [source / "dvae" / f"events.{number}" for number in range(3)]
    followed, total, looks = Mirror(str(source), copy, _any), 0, 0
    for turn in range(30):
        grown = 0
        for path in files:
            if rng.random() < 0.5:
                data = rng.randbytes(rng.choice((1, 63, 64, 65, 999, 4000)))
                with path.open("ab") as file:
                    file.write(data)
                grown += 1
                total += len(data)
        if turn == 20:
            followed = Mirror(str(source), copy, _any)  # another process goes on with the same copy
        found = followed.look()
        looks += found.read
        assert found.grown == grown and not found.replaced and not found.failed
        assert {path.name: path.read_bytes() for path in (copy / "dvae").iterdir()} == {
            path.name: path.read_bytes() for path in files if path.exists()
        }
    assert total <= looks <= total + 64 * 100


def test_a_file_that_was_replaced_cut_or_deleted_is_told_apart_from_one_that_grew(tmp_path: Path) -> None:
    source, copy = tmp_path / "run", tmp_path / "copy"
    storage.write_bytes(str(source / "a"), b"x" * 500)
    storage.write_bytes(str(source / "b"), b"y" * 500)
    followed = Mirror(str(source), copy, _any)
    assert followed.look() == Look(2, 2, 1000)
    assert followed.look() == Look(2, 0, 0), "nothing is read where nothing changed"
    storage.write_bytes(str(source / "a"), b"x" * 436 + b"z" * 64 + b"longer")
    assert followed.look().replaced == ("a",) and (copy / "a").read_bytes() == (source / "a").read_bytes()
    storage.write_bytes(str(source / "a"), b"w" * 506)
    assert followed.look().replaced == ("a",), "equally long"
    storage.write_bytes(str(source / "a"), b"short")
    assert followed.look().replaced == ("a",) and (copy / "a").read_bytes() == b"short"
    (source / "b").unlink()
    assert followed.look().replaced == ("b",) and storage.list_files(str(copy)) == ["a"]
    assert Mirror(str(source / "missing"), tmp_path / "other", _any).look() == Look()


def test_on_s3_a_look_is_a_listing_and_a_range_of_what_grew_and_an_outage_is_made_up_for(
    request: pytest.FixtureRequest, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    url, data = str(request.getfixturevalue("s3")), random.Random(2).randbytes(300_000)
    for name, size in (("dvae/events.1", 200_000), ("clip/events.2", 50_000)):
        storage.write_bytes(storage.join(url, "tensorboard", name), data[:size])
    monkeypatch.setattr(s3, "MAX_ATTEMPTS", 1)
    with fault_proxy(s3_server.endpoint) as proxy:
        monkeypatch.setenv("S3_ENDPOINT_URL", proxy.endpoint)
        followed = Mirror(storage.join(url, "tensorboard"), tmp_path, _any)

        def look() -> tuple[Look, list[str], int]:
            """A look, its requests, and the bytes that came."""
            proxy.requests.clear()
            before = proxy.answered
            found = followed.look()
            asked = ["LIST" if "list-type" in line else line.partition("/tensorboard/")[2].partition("?")[0] for line in proxy.requests]
            return found, asked, proxy.answered - before

        found, asked, came = look()
        assert found == Look(2, 2, 250_000) and asked == ["LIST", "clip/events.2", "dvae/events.1"] and came >= 250_000
        found, asked, came = look()
        assert found == Look(2, 0, 0) and asked == ["LIST"] and came < 5_000
        storage.write_bytes(storage.join(url, "tensorboard", "dvae/events.1"), data[:260_000])  # a writer uploads the whole file at each flush
        found, asked, came = look()
        assert found == Look(2, 1, 60_064) and asked == ["LIST", "dvae/events.1"] and 60_064 <= came < 65_000, "not the whole object"
        assert (tmp_path / "dvae/events.1").read_bytes() == data[:260_000]
        storage.write_bytes(storage.join(url, "tensorboard", "dvae/events.1"), data)
        proxy.rules = [Rule(r"GET .*dvae/events", "503", count=-1)]
        assert "dvae/events.1" in look()[0].failed
        proxy.rules = []
        assert look()[0] == Look(2, 1, 40_064) and (tmp_path / "dvae/events.1").read_bytes() == data


ODD = [
    *("a/../../evil.tfevents", "/etc/x.tfevents", "a//b.tfevents", "./x.tfevents", "..", "a.tfevents/b.tfevents", "x" * 300, f"{'d/' * 1500}x"),
    *("a\0b.tfevents", "a\ud800.tfevents", ".copied-from/x.tfevents", "a/.copied-from"),
]


@pytest.mark.parametrize("odd", ODD)
def test_an_object_whose_name_no_file_of_the_copy_can_have_costs_itself_alone(odd: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the bucket of somebody else, where names are any text."""
    infos = [storage.FileInfo(name, 4, "v") for name in ("a.tfevents", odd, "z.tfevents")]
    monkeypatch.setattr(mirror.storage, "glob", lambda url: (url, infos))
    monkeypatch.setattr(mirror.storage, "read_range", lambda url, start, size: b"good"[:size])
    copy = Mirror("s3://bucket/run", tmp_path / "copy", _any)
    with copy.claimed():
        for _ in range(2):
            found = copy.look()
    assert found.files == 2 and "1 objects have names that no file here can have" in found.failed and "\0" not in found.failed
    there = sorted(path.relative_to(tmp_path / "copy").as_posix() for path in (tmp_path / "copy").rglob("*"))
    assert there == [".copied-from", "a.tfevents", "z.tfevents"] and sorted(path.name for path in tmp_path.iterdir()) == ["copy"]
