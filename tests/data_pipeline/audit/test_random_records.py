"""Records of a set drawn at random, and read by ranges."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.audit import random_records
from infra import storage
from infra.errors import DataError
from tests.support.made_sets import image, make_images


@given(
    st.integers(0, 60).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, max(0, n - 1)), max_size=n), st.integers(0, 70))),
    st.integers(0, 9),
)
def test_positions_are_visible_sorted_and_not_repeated(case: tuple[int, set[int], int], seed: int) -> None:
    stored, hidden, count = case
    hidden = {position for position in hidden if position < stored}
    found = random_records.visible_positions(stored, np.array(sorted(hidden), np.int64), count, seed).tolist()
    visible = set(range(stored)) - hidden
    assert found == sorted(set(found)) and set(found) <= visible and len(found) == min(count, len(visible))


def test_every_visible_record_is_as_likely_as_any_other() -> None:
    hidden, counts = np.array([0, 3, 4, 9], np.int64), np.zeros(10, np.int64)
    for seed in range(600):
        counts[random_records.visible_positions(10, hidden, 2, seed)] += 1
    assert (counts[hidden] == 0).all() and (abs(np.delete(counts, hidden) - 200) < 60).all()


def test_random_records_are_those_of_the_set_and_are_read_by_ranges(tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [[image(number) for number in range(7)], [], [image(number) for number in range(7, 12)]]
    for url in (str(tmp_path), s3):
        opened = make_images(url, parts, excluded=[3, 8])
        assert opened.shards and opened.count == 10
        read: list[int] = []
        ranged, whole = storage.read_range, storage.read_bytes

        def counting(url: str, start: int, size: int, ranged: Callable[..., bytes] = ranged, read: list[int] = read) -> bytes:
            read.append(size)
            return ranged(url, start, size)

        def refusing(url: str, whole: Callable[[str], bytes] = whole) -> bytes:
            assert not url.endswith(".mds"), "a shard was read whole"
            return whole(url)

        with monkeypatch.context() as patch:
            patch.setattr(storage, "read_range", counting)
            patch.setattr(storage, "read_bytes", refusing)
            everything = random_records.random_rows(opened, 100)
            read.clear()
            few = random_records.random_rows(opened, 3, seed=1)
        assert [record["id"] for record in everything] == [record["id"] for record in opened.records()]
        assert [record for record in everything if record["id"] in {each["id"] for each in few}] == few and len(few) == 3
        assert len(read) == 6 and sum(read) < 3 * 2500, "two ranges a record, and no more bytes than it has"


def test_a_damaged_row_is_named(tmp_path: Path) -> None:
    opened = make_images(str(tmp_path), [[image(0, image=b"x"), image(1, image=b"x")]])
    shard = tmp_path / opened.shards[0].basename
    data = shard.read_bytes()
    shard.write_bytes(data[:4] + bytes(4) + data[8:])
    with pytest.raises(DataError, match=r"shard.00000.mds: row 0 has the offsets 0 and \d+: damaged; run 'launcher.py validate'"):
        random_records.random_rows(opened, 9)
    begin = int.from_bytes(data[4:8], "little")
    shard.write_bytes(data[:begin] + b"\xff" * 12 + data[begin + 12 :])
    with pytest.raises(DataError, match=r"shard.00000.mds: damaged, the columns of a row are"):
        random_records.random_rows(opened, 9)
    shard.write_bytes(data[:-4])
    with pytest.raises(DataError, match=r"shard.00000.mds: ends after"):
        random_records.random_rows(opened, 9)
