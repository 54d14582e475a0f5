"""Tests of the blind matching of drawings to captions."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from infra.errors import DataError, UsageError
from train.experiments import stranger
from train.report.images import png_bytes, read_png

CAPTIONS = ("a red fox", "a blue house", "a cat")


@pytest.fixture
def drawings(tmp_path: Path) -> Path:
    """A folder of drawings of three captions, each picture of its own colour; the second picture is the better one."""
    for index, caption in enumerate(CAPTIONS):
        folder = tmp_path / "drawings" / f"caption-{index}"
        folder.mkdir(parents=True)
        for candidate in range(2):
            picture = np.full((8, 8, 3), 50 * index + 10 * candidate, dtype=np.uint8)
            (folder / f"{candidate:03d}.png").write_bytes(png_bytes(picture))
        (folder / "samples.jsonl").write_text("".join(json.dumps(_line(caption, candidate)) + "\n" for candidate in range(2)))
    return tmp_path / "drawings"


def _line(caption: str, candidate: int) -> dict[str, object]:
    settings = {"n": 2, "seed": 0, "temperature": 1.0, "top_k": None, "top_p": None, "guidance": 1.0}
    shaped_by = {
        "captions": 1,
        "each": 1,
        "place": 0,
        "window": 1,
        "threads": 1,
        "deterministic": False,
        "device": "cpu",
        "precision": "fp32",
        "torch": "2",
    }
    names = {"sha256": "a", "codes_sha256": "b", "source": "runs/x", "weights": {}, "key": "c" * 64, "schema": "sample/2"}
    return (
        names
        | {"caption": caption, "candidate": candidate, "seed": 1, "score": float(candidate), "file": f"{candidate:03d}.png"}
        | {
            "settings": settings,
            "shaped_by": shaped_by,
        }
    )


def test_a_sheet_shows_the_best_pictures_in_another_order_than_the_captions(drawings: Path, tmp_path: Path) -> None:
    stranger.main(["sheet", str(drawings), "--out", str(tmp_path / "sheet"), "--pictures", "1", "--seed", "3"])
    key = json.loads((tmp_path / "sheet" / "key.json").read_text())
    assert sorted(key["rows"]) == ["A", "B", "C"] and sorted(key["rows"].values()) == [1, 2, 3]
    listed = (tmp_path / "sheet" / "captions.txt").read_text().splitlines()
    assert sorted(line.split(" ", 1)[1] for line in listed) == sorted(CAPTIONS)
    shown = read_png((tmp_path / "sheet" / "sheet.png").read_bytes())
    colours = [value for value, _ in itertools.groupby(shown[:, 20, 0].tolist()) if value in {10, 60, 110}]
    assert [CAPTIONS[(value - 10) // 50] for value in colours] == [key["captions"][key["rows"][letter] - 1] for letter in "ABC"]


def test_answers_are_counted_and_chance_is_said(drawings: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stranger.main(["sheet", str(drawings), "--out", str(tmp_path / "sheet")])
    rows = json.loads((tmp_path / "sheet" / "key.json").read_text())["rows"]
    answers = tmp_path / "answers.txt"
    answers.write_text("".join(f"{letter.lower()}: {number}\n" for letter, number in rows.items()))
    stranger.main(["score", str(tmp_path / "sheet"), str(answers)])
    assert "3 of 3 rows are right (3 answered); by chance as many are in 0.17 of cases" in capsys.readouterr().out
    answers.write_text(f"A {rows['B']}\n\nB {rows['B']}\n")
    found = stranger.score(tmp_path / "sheet", answers)
    assert (found["right"], found["answered"]) == (1, 2)


def test_chance_is_that_of_random_permutations() -> None:
    everything = list(itertools.permutations(range(6)))
    for right in range(7):
        as_many = sum(sum(place == one for place, one in enumerate(order)) >= right for order in everything)
        assert stranger.chance(right, 6) == pytest.approx(as_many / len(everything))


@pytest.mark.parametrize("wrong", ["A", "A 4", "A 0", "D 1", "A 1\nA 2", "A one"])
def test_an_answer_that_is_none_is_named(wrong: str, drawings: Path, tmp_path: Path) -> None:
    stranger.main(["sheet", str(drawings), "--out", str(tmp_path / "sheet")])
    (tmp_path / "answers.txt").write_text(wrong)
    with pytest.raises(UsageError, match="give each row once, like `A 7`"):
        stranger.score(tmp_path / "sheet", tmp_path / "answers.txt")


def test_a_sheet_needs_captions_and_a_score_its_key(drawings: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"drawings of 0 captions; give runs with pictures, or folders of `launcher.py draw --out`, with 2 to 52"):
        stranger.sheet([str(tmp_path / "none")], tmp_path / "sheet", 4, 0)
    stranger.sheet([str(drawings)], tmp_path / "sheet", 4, 0)
    with pytest.raises(DataError, match=r"answers\.txt"):
        stranger.score(tmp_path / "sheet", tmp_path / "answers.txt")
    (tmp_path / "sheet" / "key.json").write_text("[]")
    with pytest.raises(DataError, match="make the sheet again"):
        stranger.score(tmp_path / "sheet", tmp_path / "answers.txt")


def test_the_pictures_of_a_run_are_counted_by_the_split_of_their_captions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = []
    for index, (caption, split) in enumerate(zip(CAPTIONS, ("validation", "validation", "train"), strict=True)):
        file = f"generate/caption-{index}/000.png"
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_bytes(png_bytes(np.full((8, 8, 3), 50 * index, dtype=np.uint8)))
        rows.append({"caption": caption, "split": split, "pictures": [{"file": file}]})
    (tmp_path / "generate" / "index.json").write_text(json.dumps({"captions": rows}))
    stranger.main(["sheet", str(tmp_path), "--out", str(tmp_path / "sheet")])
    key = json.loads((tmp_path / "sheet" / "key.json").read_text())
    known = next(letter for letter, number in key["rows"].items() if key["captions"][number - 1] == "a cat")
    (tmp_path / "answers.txt").write_text(f"{known} {key['rows'][known]}")
    stranger.main(["score", str(tmp_path / "sheet"), str(tmp_path / "answers.txt")])
    assert "1 of 3 rows are right (1 answered); by chance as many are in 0.67 of cases; train: 1 of 1; validation: 0 of 2" in capsys.readouterr().out
    (tmp_path / "generate" / "index.json").write_text(json.dumps({"captions": [rows[0] | {"pictures": [{"file": "../../x.png"}]}]}))
    with pytest.raises(DataError, match=r"run '.*generate .*' again"):
        stranger.sheet([str(tmp_path)], tmp_path / "sheet", 4, 0)
