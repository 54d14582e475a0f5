"""The index of a checkpoint in parts: any cut is described and read back, in few bytes, by no more parts than are needed; damage of any of them is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from infra import schemas, storage
from infra.digests import digest
from infra.errors import CheckpointError, ConfigError
from infra.world import World
from tests.support import index_size
from tests.train.weights.schema_1 import as_schema_1
from train.weights import checkpoint, checkpoint_storage, layout
from train.weights.checkpoint_index import OlderIndex, Wanted, catalogue, index_of
from train.weights.fragments import Fragment, even_slice

Cut = list[dict[str, Fragment]]
"""Fragments by rank."""


def write(stage: Path, step: int, cut: Cut) -> str:
    """A checkpoint as these ranks would write it, made in one process; see ``checkpoint.save``."""
    url = checkpoint.folder(str(stage), step)
    own = [layout.held(fragments) for fragments in cut]
    expected = layout.Expected(layout.Expected.of(own[0]))
    tensors = layout.described(expected, [expected.differences(rows, rank) for rank, rows in enumerate(own)])
    writers = [checkpoint_storage.Writer(url, rank) for rank in range(len(cut))]
    for writer, fragments in zip(writers, cut, strict=True):
        writer.write(fragments)
    seal(url, checkpoint_storage.write_index(url, tensors, [writer.part for writer in writers]), step=step, schema=schemas.CHECKPOINT, shapes={})
    return url


def seal(url: str, index: str, **facts: Any) -> None:
    """Write the marker: of an index with this digest."""
    place = storage.join(url, "meta.json")
    meta = facts or {key: value for key, value in storage.read_json(place).items() if key != "sha256"}
    meta |= {"index": index}
    storage.write_json(place, meta | {"sha256": digest(meta)})


def evenly(tensors: dict[str, torch.Tensor], ranks: int) -> Cut:
    return [{name: even_slice(tensor, rank, ranks) for name, tensor in tensors.items()} for rank in range(ranks)]


def some(count: int = 3, elements: int = 100) -> dict[str, torch.Tensor]:
    return {f"model/{number}": torch.rand(elements + 7 * number) for number in range(count)}


@st.composite
def cuts(draw: st.DrawFn) -> tuple[dict[str, torch.Tensor], Cut]:
    """Tensors, and any ranks that hold their pieces, each rank at most one of a tensor."""
    ranks = draw(st.integers(1, 5))
    tensors = {f"model/{number}": torch.arange(float(draw(st.integers(1, 40)))) for number in range(draw(st.integers(1, 4)))}
    cut: Cut = [{} for _ in range(ranks)]
    for name, tensor in tensors.items():
        if draw(st.booleans()):  # as the engines do
            parts = draw(st.integers(1, ranks))
            for rank in range(ranks):
                cut[rank][name] = even_slice(tensor, min(rank, parts), parts)
            continue
        holders = draw(st.permutations(range(ranks)))[: draw(st.integers(1, ranks))]
        bounds = sorted(draw(st.lists(st.integers(0, len(tensor)), min_size=len(holders) - 1, max_size=len(holders) - 1)))
        for rank, start, end in zip(holders, [0, *bounds], [*bounds, len(tensor)], strict=True):
            cut[rank][name] = Fragment(tensor[start:end], start, len(tensor))
    return tensors, cut


@given(cuts(), st.data())
def test_whatever_ranks_hold_is_described_and_read_back_in_any_other_cut(
    tmp_path_factory: Any, made: tuple[dict[str, torch.Tensor], Cut], data: Any
) -> None:
    tensors, cut = made
    folder = tmp_path_factory.mktemp("stage")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_storage, "PIECE_BYTES", data.draw(st.sampled_from([8, 20, 1 << 20])))
        write(folder, 1, cut)
        parts = data.draw(st.integers(1, 4))
        for part in range(parts):
            target = {name: even_slice(torch.full_like(tensor, -1.0), part, parts) for name, tensor in tensors.items()}
            checkpoint.load(str(folder), 1, target)
            for name, fragment in target.items():
                assert torch.equal(fragment.tensor, even_slice(tensors[name], part, parts).tensor)


def test_a_reader_of_few_elements_reads_the_parts_that_hold_them_and_of_many_keeps_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, ranks = some(elements=640), 40
    write(tmp_path, 1, evenly(tensors, ranks))
    plain, read = storage.read_at_most, list[str]()

    def noted(url: str, most: int) -> bytes:
        read.append(url.rpartition("/")[2])
        return plain(url, most)

    monkeypatch.setattr(storage, "read_at_most", noted)
    for number, (part, parts, expected) in enumerate([(7, 40, {7}), (1, 10, {4, 5, 6, 7}), (0, 1, set(range(40)))]):
        read.clear()
        target = {"model/0": even_slice(torch.zeros(640), part, parts)}
        checkpoint.load(str(tmp_path), 1, target)
        assert torch.equal(target["model/0"].tensor, even_slice(tensors["model/0"], part, parts).tensor), number
        assert sorted(name for name in read if name.startswith("rank-")) == sorted(f"rank-{rank}.json" for rank in expected)


def test_many_parts_are_never_in_memory_together(tmp_path: Path) -> None:
    url = write(tmp_path, 1, evenly(some(elements=640), 40))
    known = catalogue(url, storage.read_json(f"{url}/index.json"))
    for _ in known.files([Wanted("model/1", 0, 647)]):
        assert len(known._known) <= 4  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        ([(0, 4), None, (8, 2)], "elements 4 to 8 on no rank"),
        ([(0, 6), (4, 4), (8, 2)], "elements 4 to 6 on two ranks"),
        ([(0, 4), (4, 4), None], "elements 8 to 10 on no rank"),
        ([None, (4, 4), (8, 2)], "elements 0 to 4 on no rank"),
        ([(0, 10), (0, 10), None], "elements 0 to 10 on two ranks"),
        ([(0, 4)], "elements 4 to 10 on no rank"),
    ],
)
def test_pieces_that_do_not_make_up_a_tensor_are_refused(pieces: list[tuple[int, int] | None], words: str) -> None:
    kind = layout.kind_of(10, "float32")
    own: list[dict[str, layout.Row]] = [{} if piece is None else {"model/w": (*piece, kind)} for piece in pieces]
    expected = layout.Expected(layout.Expected.of(own[0]))
    with pytest.raises(CheckpointError, match=rf"'model/w' has {words}: no checkpoint can be written"):
        layout.described(expected, [expected.differences(rows, rank) for rank, rows in enumerate(own)])


def test_an_even_cut_is_one_run_wherever_it_begins() -> None:
    """As on stage 1, where a large tensor begins in the middle of a rank's part: the main rank holds nothing of it."""
    kind = layout.kind_of(10_005, "float32")
    own: list[dict[str, layout.Row]] = [{}, {"w": (0, 5, kind)}, *({"w": (5 + 1000 * place, 1000, kind)} for place in range(10))]
    expected = layout.Expected(layout.Expected.of(own[0]))
    found = layout.described(expected, [expected.differences(rows, rank) for rank, rows in enumerate(own)])
    first, rest = ({"rank": 1, "ranks": 1, "start": 0, "each": 5, "last": 5}, {"rank": 2, "ranks": 10, "start": 5, "each": 1000, "last": 1000})
    assert found == {"w": {"dtype": "float32", "size": 10_005, "runs": [first, rest]}}


def test_ranks_that_disagree_about_a_tensor_are_refused() -> None:
    own = [layout.held({"model/w": Fragment(torch.zeros(4, dtype=dtype), offset, 8)}) for offset, dtype in ((0, torch.float32), (4, torch.float16))]
    expected = layout.Expected(layout.Expected.of(own[0]))
    with pytest.raises(CheckpointError, match="'model/w' has 8 elements of float32 and 8 elements of float16 on different ranks"):
        layout.described(expected, [expected.differences(rows, rank) for rank, rows in enumerate(own)])
    with pytest.raises(CheckpointError, match="'model/w' is of dtype complex64, a checkpoint keeps float32, float16"):
        layout.held({"model/w": even_slice(torch.zeros(4, dtype=torch.complex64), 0, 1)})


def flipped(data: bytes) -> bytes:
    return data.replace(b'"offset": 34', b'"offset": 35')


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flipped, r"rank-1\.json: damaged: its hash is not the one in index\.json, also when it is read again"),
        (lambda data: data[:-9], r"rank-1\.json: damaged: its hash"),
        (lambda data: data + b" ", r"rank-1\.json: larger than"),
        (None, r"rank-1\.json: .*(missing|does not exist|No such file)"),
    ],
)
def test_a_damaged_or_missing_part_leads_to_the_checkpoint_before(tmp_path: Path, damage: Callable[[bytes], bytes] | None, words: str) -> None:
    tensors = some()
    for step in (5, 10):
        url = write(tmp_path, step, evenly({name: tensor + step for name, tensor in tensors.items()}, 3))
    file = Path(url, "rank-1.json")
    file.unlink() if damage is None else file.write_bytes(damage(file.read_bytes()))
    target = {name: even_slice(torch.zeros_like(tensor), 0, 1) for name, tensor in tensors.items()}
    with pytest.raises(CheckpointError, match=words):
        checkpoint.load(str(tmp_path), 10, target)
    meta = checkpoint.load_newest(str(tmp_path), target, World.single())
    assert meta is not None and meta["step"] == 5 and torch.equal(target["model/0"].tensor, tensors["model/0"] + 5)
    own = {name: even_slice(torch.zeros_like(tensor), 0, 3) for name, tensor in tensors.items()}
    assert checkpoint.load(str(tmp_path), 10, own)["step"] == 10, "who needs nothing of it does not read it"


def forged(url: str, change: Callable[[dict[str, Any]], object], part: int | None = None) -> None:
    """Change the index, or a rank's part, and make all hashes fit."""
    index = storage.read_json(f"{url}/index.json")
    if part is None:
        change(index)
    else:
        found = storage.read_json(f"{url}/rank-{part}.json")
        change(found)
        data = json.dumps(found).encode()
        Path(url, f"rank-{part}.json").write_bytes(data)
        index["parts"][part] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    storage.write_json(f"{url}/index.json", index)
    seal(url, digest(index))


def runs(index: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = index["tensors"]["model/0"]["runs"][0]
    return found


def nested(depth: int) -> Any:
    found: Any = []
    for _ in range(depth):
        found = [found]
    return found


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        (None, lambda index: runs(index).update(each=33), "its runs do not make up its 100 elements"),
        (None, lambda index: runs(index).update(last=35, each=34), "the last rank of a run holds more than the others"),
        (None, lambda index: runs(index).update(rank=1), "'model/0' lies on ranks that have no part"),
        (None, lambda index: index["parts"].__setitem__(1, None), "'model/0' lies on ranks that have no part"),
        (None, lambda index: runs(index).update(rank=(1 << 53) - 1), "'model/0' lies on ranks that have no part"),
        (None, lambda index: runs(index).update(rank="../../other/rank-0"), "tensors.model/0.runs.0.rank: .*integer"),
        (None, lambda index: index["parts"][1].update(bytes=1 << 40), "parts.1.bytes: "),
        (None, lambda index: index.update(nested=nested(80)), "nested more than 64 deep"),
        (1, lambda part: part["tensors"].pop("model/0"), r"rank-1\.json: damaged: it does not hold of 'model/0' what index\.json says"),
        (1, lambda part: part["tensors"]["model/0"].update(offset=0), "does not hold of 'model/0' what"),
        (1, lambda part: part["tensors"]["model/0"]["sha256"].clear(), "does not hold of 'model/0' what"),
        (1, lambda part: part["tensors"]["model/0"].update(start=1 << 40), r"rank-1\.bin: ends after"),
        (1, lambda part: part.update(piece=3), "does not hold of 'model/0' what"),
        (1, lambda part: part.update(rank=2), r"rank-1\.json: damaged: it is the part of rank 2"),
        (1, lambda part: part.update(nested=nested(80)), "nested more than 64 deep"),
    ],
)
def test_what_the_index_and_its_parts_must_not_say_is_refused_though_hashes_fit(
    tmp_path: Path, part: int | None, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    tensors = some()
    forged(write(tmp_path, 1, evenly(tensors, 3)), change, part)
    with pytest.raises(CheckpointError, match=words):
        checkpoint.load(str(tmp_path), 1, {name: even_slice(torch.zeros_like(tensor), 0, 1) for name, tensor in tensors.items()})


@pytest.mark.parametrize("part", [None, 1])
def test_an_index_or_a_part_of_another_schema_is_refused_and_is_no_damage(tmp_path: Path, part: int | None) -> None:
    tensors = some()
    forged(write(tmp_path, 1, evenly(tensors, 3)), lambda found: found.update(schema="checkpoint/9"), part)
    with pytest.raises(ConfigError, match=r"schema 'checkpoint/9', and this version reads 'checkpoint/2'"):
        checkpoint.load(str(tmp_path), 1, {name: even_slice(torch.zeros_like(tensor), 0, 1) for name, tensor in tensors.items()})


@given(cuts(), st.integers(1, 4))
def test_the_older_index_is_read_in_any_cut(tmp_path_factory: Any, made: tuple[dict[str, torch.Tensor], Cut], parts: int) -> None:
    tensors, cut = made
    folder = tmp_path_factory.mktemp("stage")
    url = write(folder, 1, cut)
    seal(url, as_schema_1(url), step=1, schema="checkpoint/1", shapes={})
    for part in range(parts):
        target = {name: even_slice(torch.full_like(tensor, -1.0), part, parts) for name, tensor in tensors.items()}
        checkpoint.load(str(folder), 1, target)
        for name, fragment in target.items():
            assert torch.equal(fragment.tensor, even_slice(tensors[name], part, parts).tensor)


def test_an_older_index_whose_pieces_overlap_is_refused() -> None:
    chunk = {"file": "rank-0.bin", "start": 0, "bytes": 16, "sha256": "0" * 64, "offset": 0, "length": 4}
    entry = {"dtype": "float32", "size": 8, "chunks": [chunk, chunk | {"offset": 4, "start": 16}]}
    OlderIndex.model_validate({"tensors": {"w": entry}})
    with pytest.raises(ValueError, match="its pieces do not make up its 8 elements"):
        OlderIndex.model_validate({"tensors": {"w": entry | {"chunks": [chunk, chunk]}}})


def test_a_rank_of_1024_reads_less_than_ten_megabytes_of_index_for_the_largest_preset_and_tells_nothing() -> None:
    found = index_size.cut("12B", 1024)
    index, told = index_size.newer_index(found, [0, 1, 511, 1023])
    size, part = len(index_size.written(index)), len(index_size.newer_part(found, 0))
    assert len(index["tensors"]) > 4000 and size + part < 10e6, (size, part)
    assert told == [b""] * 4
    few = index_size.Cut(dict(list(found.sizes.items())[:40]), 1024)
    older = len(index_size.written(index_size.older_index(few)))
    assert older / len(few.sizes) * len(found.sizes) > 0.9e9, "a gigabyte, as it was"


def test_a_part_list_names_ranks_by_their_place() -> None:
    assert index_of({}, [(3, bytes(32)), None])["parts"] == [{"bytes": 3, "sha256": "0" * 64}, None]
