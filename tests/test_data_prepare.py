"""Stage 'prepare': parts, splits, restarts and the summary."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import pytest
from PIL import Image

from data_pipeline import prepare
from data_pipeline.config import DataConfig
from data_pipeline.prepare import split_of
from infra import storage
from infra.errors import DataError
from infra.world import World


def pictures(folder: Path, count: int, size: int = 16) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        out = io.BytesIO()
        Image.new("RGB", (size, size), (number % 256, number // 256, 0)).save(out, "PNG")
        (folder / f"{number:03d}.png").write_bytes(out.getvalue())
        (folder / f"{number:03d}.txt").write_text(f"picture {number}\nanother name of {number}")
    return str(folder)


def config(source: str, **fields: object) -> DataConfig:
    return DataConfig.model_validate({"sources": (source,), "records_per_part": 8, "validation_share": 0.25} | fields)


def prepared(data: DataConfig, url: str, ranks: int = 1, seed: int = 0) -> list[dict[str, int]]:
    return [prepare.run(data, 16, seed, url, World(rank, ranks, rank, ranks)) for rank in range(ranks)]


def tree(url: str) -> dict[str, str]:
    return {str(path.relative_to(url)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(url).rglob("*")) if path.is_file()}


def test_every_pair_lands_once_in_the_split_of_its_group(tmp_path: Path) -> None:
    source, url = pictures(tmp_path / "in", 60), str(tmp_path / "out")
    prepared(config(source), url)
    summary = prepare.finish(config(source), 16, 0, url)
    sets = prepare.open_splits(url)
    records = {split: list(sets[split].records()) for split in prepare.SPLITS}
    ids = [record["id"] for split in prepare.SPLITS for record in records[split]]
    assert sorted(ids) == [f"{source}/{number:03d}.png" for number in range(60)]
    for split in prepare.SPLITS:
        assert all(record["split"] == split == split_of(record["group"], 0, 0.25) for record in records[split])
        assert summary["splits"][split] == {"count": len(records[split]), "groups": len(records[split]), "sources": {source: len(records[split])}}
    assert summary["seen"] == 60 and 5 <= summary["splits"]["validation"]["count"] <= 25
    assert (records["train"][0]["width"], records["train"][0]["height"]) == (16, 16)
    assert summary["credits"] == [f"Images and captions from {source}; their licence is not recorded."]
    assert storage.read_json(f"{url}/summary.json") == summary


def test_any_number_of_ranks_and_any_restart_write_the_same_bytes(tmp_path: Path) -> None:
    source, data = pictures(tmp_path / "in", 40), config(str(tmp_path / "in"))
    assert source == data.sources[0]
    prepared(data, str(tmp_path / "one"))
    assert [entry["written"] for entry in prepared(data, str(tmp_path / "three"), ranks=3)] == [2, 2, 1]
    (tmp_path / "three" / "train" / "part-00001" / "done.json").unlink()  # as if killed between shards and marker
    (tmp_path / "three" / "validation" / "part-00003" / "shard.00000.mds").write_bytes(b"half")
    (tmp_path / "three" / "validation" / "part-00003" / "done.json").unlink()
    assert sum(entry["written"] for entry in prepared(data, str(tmp_path / "three"), ranks=2)) == 2
    for name in ("one", "three"):
        prepare.finish(data, 16, 0, str(tmp_path / name))
    assert tree(str(tmp_path / "one")) == tree(str(tmp_path / "three"))
    before = tree(str(tmp_path / "one"))
    assert prepared(data, str(tmp_path / "one")) == [{"parts": 5, "written": 0, "skipped": 5}]
    prepare.finish(data, 16, 0, str(tmp_path / "one"))
    assert tree(str(tmp_path / "one")) == before


def test_adding_data_moves_no_sample_and_redoes_no_full_part(tmp_path: Path) -> None:
    data, url = config(pictures(tmp_path / "in", 24)), str(tmp_path / "out")
    prepared(data, url)
    prepare.finish(data, 16, 0, url)
    before = {record["id"]: record["split"] for shard_set in prepare.open_splits(url).values() for record in shard_set.records()}
    pictures(tmp_path / "in", 30)
    assert prepared(data, url) == [{"parts": 4, "written": 1, "skipped": 3}]
    with pytest.raises(DataError, match=r"part 3 is not finished"):
        storage.delete(f"{url}/train/part-00003/done.json")
        prepare.finish(data, 16, 0, url)
    prepared(data, url)
    prepare.finish(data, 16, 0, url)
    after = {record["id"]: record["split"] for shard_set in prepare.open_splits(url).values() for record in shard_set.records()}
    assert len(after) == 30 and before.items() <= after.items()


def test_drops_are_counted_with_up_to_five_examples(tmp_path: Path) -> None:
    source = pictures(tmp_path / "in", 30)
    for number in range(7):
        (tmp_path / "in" / f"{number:03d}.png").write_bytes(b"broken")
    (tmp_path / "in" / "010.txt").write_text("\n\n")
    url = str(tmp_path / "out")
    prepared(config(source), url)
    summary = prepare.finish(config(source), 16, 0, url)
    assert {name: entry["count"] for name, entry in summary["reasons"].items()} == {"undecodable image": 7, "empty caption": 1}
    assert summary["reasons"]["undecodable image"]["examples"] == [f"{source}/{number:03d}.png" for number in range(5)]
    assert summary["seen"] == 30 == 8 + sum(summary["splits"][split]["count"] for split in prepare.SPLITS)


def test_a_pair_whose_file_vanishes_is_a_counted_drop(tmp_path: Path) -> None:
    data = config(pictures(tmp_path / "in", 8))
    plan = prepare.make_plan(data, 16, 0)
    (tmp_path / "in" / "003.txt").unlink()
    tally = prepare.Tally()
    assert len(list(prepare.accepted(plan, plan.parts[0], tally))) == 7
    assert tally.reasons == {"unreadable": {"count": 1, "examples": ["003.png"]}}


def test_a_data_set_without_accepted_pairs_is_refused_with_the_reasons(tmp_path: Path) -> None:
    data, url = config(pictures(tmp_path / "in", 10, size=8)), str(tmp_path / "out")
    prepared(data, url)
    with pytest.raises(DataError, match=r"no record in the train split \(10 pairs read; dropped: image too small: 10\).*lower data.min_side"):
        prepare.finish(data, 16, 0, url)
    assert not storage.exists(f"{url}/train/manifest.json")


def test_an_empty_split_is_refused(tmp_path: Path) -> None:
    data, url = config(pictures(tmp_path / "in", 3), validation_share=1e-9), str(tmp_path / "out")
    prepared(data, url)
    with pytest.raises(DataError, match=r"no record in the validation split .*raise data.max_groups or data.validation_share"):
        prepare.finish(data, 16, 0, url)


def test_max_groups_keeps_the_same_groups_however_many_more_there_are(tmp_path: Path) -> None:
    data = config(pictures(tmp_path / "in", 60), max_groups=20)
    kept = {key for part in prepare.make_plan(data, 16, 0).parts for key in part.keys}
    assert len(kept) == 20
    fewer = {key for part in prepare.make_plan(data.model_copy(update={"max_groups": 10}), 16, 0).parts for key in part.keys}
    assert {split_of(f"folder/{key.removesuffix('.png')}", 0, 0.5) for key in fewer} == {"train", "validation"}, (
        "not the first by the hash of the split"
    )
    assert fewer < kept


def test_a_changed_setting_does_finished_parts_again(tmp_path: Path) -> None:
    data, url = config(pictures(tmp_path / "in", 16)), str(tmp_path / "out")
    prepared(data, url)
    for other in (data.model_copy(update={"min_side": 12}), data.model_copy(update={"validation_share": 0.5})):
        assert prepared(other, url)[0]["written"] == 2
    assert prepared(other, url, seed=1)[0]["written"] == 2


def test_a_stop_request_is_obeyed_between_parts_and_progress_counts_pairs(tmp_path: Path) -> None:
    data, url, calls = config(pictures(tmp_path / "in", 20)), str(tmp_path / "out"), list[tuple[int, int]]()
    stopped = prepare.run(data, 16, 0, url, World.single(), progress=lambda done, total: calls.append((done, total)), stop=lambda: len(calls) == 2)
    assert stopped == {"parts": 3, "written": 2, "skipped": 0}
    assert calls == [(8, 20), (16, 20)]
    assert prepare.run(data, 16, 0, url, World.single()) == {"parts": 3, "written": 1, "skipped": 2}


def test_emoji_concepts_never_cross_the_splits(tmp_path: Path) -> None:
    data, url = DataConfig(render_size=16, max_groups=12, validation_share=0.3, records_per_part=50), str(tmp_path)
    prepared(data, url, ranks=2)
    summary = prepare.finish(data, 16, 0, url)
    groups = {split: {record["group"] for record in shard_set.records()} for split, shard_set in prepare.open_splits(url).items()}
    assert len(groups["train"] | groups["validation"]) == 12 and not groups["train"] & groups["validation"]
    assert len(summary["credits"]) == 2
