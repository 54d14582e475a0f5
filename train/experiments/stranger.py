"""Asks a stranger which drawing shows which caption: ``python -m train.experiments.stranger sheet DRAWINGS... --out FOLDER``, then ``... score FOLDER ANSWERS``.

DRAWINGS are run folders whose stage generate is finished, or folders that ``launcher.py draw ... --out DRAWINGS`` wrote. ``sheet`` writes sheet.png, with a letter
and the best pictures of each caption in a row, and captions.txt, the numbered captions; both are shuffled, each in its own way, and key.json says which is which. The
stranger sees the sheet and the captions, and writes a line like ``C 7`` for each row. ``score`` counts how many are right, and how likely as many are by chance: one is expected, however many rows there are.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import string
from collections.abc import Mapping, Sequence
from math import comb, factorial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from infra import storage, stored
from infra.commands import launcher
from infra.errors import UsageError, in_a_sentence
from infra.seeds import derive
from train.drawing.gallery import ranked
from train.drawing.learned import PictureFile
from train.drawing.samples import SAMPLES, read_lines
from train.report.images import enlarged, grid, png_bytes, read_png

_ANSWER = re.compile(r"^\s*([A-Za-z]{1,2})[\s:.,=-]+(\d{1,3})\s*$")
_SIDE = 96
"""Least side of a picture on the sheet, in pixels."""


class _Key(stored.Stored):
    rows: dict[str, Annotated[int, Field(ge=1)]]
    """Which caption's number is right for a letter."""
    captions: list[str]
    splits: dict[str, str]
    """Caption -> the split that a run took it from."""
    seed: int


class _Picture(stored.Stored):
    file: PictureFile


class _Row(stored.Stored):
    caption: str
    split: str
    pictures: list[_Picture]


class _Index(stored.Stored):
    """index.json of a stage generate: the best pictures of a caption first."""

    captions: list[_Row]


def sheet(drawings: Sequence[str], out: Path, pictures: int, seed: int) -> None:
    """Write the sheet, the captions and the key.

    Raises:
        UsageError: there are fewer than two captions, or more than letters.
    """
    found, splits = _pictures(drawings, pictures)
    letters = list(string.ascii_uppercase) + ["A" + letter for letter in string.ascii_uppercase]
    if not 2 <= len(found) <= len(letters):
        raise UsageError(
            f"{', '.join(drawings)}: drawings of {len(found)} captions; give runs with pictures, or folders of `launcher.py draw --out`, with 2 to {len(letters)}"
        )
    numbered, rows = sorted(found), sorted(found)
    random.Random(derive(seed, "order", "captions")).shuffle(numbered)
    random.Random(derive(seed, "order", "rows")).shuffle(rows)
    images = [enlarged([read_png(file.read_bytes()) for file in found[caption]], _SIDE) for caption in rows]
    key = {
        "rows": {letters[row]: numbered.index(caption) + 1 for row, caption in enumerate(rows)},
        "captions": numbered,
        "splits": splits,
        "seed": seed,
    }
    storage.write_bytes(str(out / "sheet.png"), png_bytes(grid(images, labels=letters[: len(rows)])))
    storage.write_bytes(str(out / "captions.txt"), "".join(f"{number} {caption}\n" for number, caption in enumerate(numbered, 1)).encode())
    storage.write_bytes(str(out / "key.json"), json.dumps(key, indent=1, ensure_ascii=False).encode())


def _pictures(drawings: Sequence[str], most: int) -> tuple[dict[str, list[Path]], dict[str, str]]:
    """The best pictures of each caption, and the split of each caption that a run took from its data."""
    found: dict[str, list[Path]] = {}
    splits: dict[str, str] = {}
    for place in map(Path, drawings):
        index = place / "generate" / "index.json"
        if index.is_file():
            for row in stored.read(str(index), _Index, f"run '{launcher('generate', str(place))}' again")["captions"]:
                splits[row["caption"]] = row["split"]
                found.setdefault(row["caption"], []).extend(place / picture["file"] for picture in row["pictures"][:most])
        for path in sorted(place.glob(f"*/{SAMPLES}")):
            lines = read_lines(str(path))
            found.setdefault(lines[0]["caption"], []).extend(path.parent / line["file"] for line in ranked(lines)[:most])
    return found, splits


def score(folder: Path, answers: Path) -> dict[str, Any]:
    """How many answers are right, of how many rows; the captions of these; and the probability of as many by chance.

    Raises:
        UsageError: a line is no answer, a row is answered twice, or names a caption that does not exist.
    """
    key = stored.read(str(folder / "key.json"), _Key, "make the sheet again")
    said: dict[str, int] = {}
    for number, line in enumerate(filter(str.strip, storage.read_text(str(answers)).splitlines()), 1):
        match = _ANSWER.match(line)
        if match is None or (letter := match[1].upper()) not in key["rows"] or letter in said or not 1 <= int(match[2]) <= len(key["captions"]):
            raise UsageError(
                f"{answers}, answer {number}: {line!r}; give each row once, like `A 7`, with a row and a number of {folder}/captions.txt"
            )
        said[letter] = int(match[2])
    right = [letter for letter, number in said.items() if key["rows"][letter] == number]
    captions = sorted(key["captions"][key["rows"][letter] - 1] for letter in right)
    return {
        "right": len(right),
        "rows": len(key["rows"]),
        "answered": len(said),
        "by_chance": chance(len(right), len(key["rows"])),
        "captions": captions,
        "splits": {split: [_of(split, those, key["splits"]) for those in (captions, key["captions"])] for split in sorted({*key["splits"].values()})},
    }


def _of(split: str, captions: Sequence[str], splits: Mapping[str, str]) -> int:
    return sum(splits.get(caption) == split for caption in captions)


def chance(right: int, rows: int) -> float:
    """The probability that a random assignment of captions to rows has at least ``right`` in their place (Montmort 1708, the matching problem)."""
    deranged = [1]  # in how many ways n captions can all be out of their place
    for n in range(1, rows + 1):
        deranged.append(n * deranged[-1] + (-1) ** n)
    return sum(comb(rows, k) * deranged[rows - k] for k in range(right, rows + 1)) / factorial(rows)


def told(found: Mapping[str, Any]) -> str:
    """The result in words."""
    parts = "".join(f"; {split}: {right} of {rows}" for split, (right, rows) in found["splits"].items())
    names = "".join(f"\n  {caption}" for caption in found["captions"])
    return f"{found['right']} of {found['rows']} rows are right ({found['answered']} answered); by chance as many are in {found['by_chance']:.2g} of cases{parts}{names}"


def main(words: Sequence[str]) -> None:
    """Make a sheet, or judge the answers."""
    parser = argparse.ArgumentParser(prog="python -m train.experiments.stranger", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("sheet", help="write sheet.png, captions.txt and key.json")
    making.add_argument("drawings", nargs="+", help="folders that launcher.py draw --out wrote")
    making.add_argument("--out", type=Path, required=True)
    making.add_argument("--pictures", type=int, default=4, help="of each caption, the best first")
    making.add_argument("--seed", type=int, default=0, help="of the order")
    judging = commands.add_parser("score", help="count what is right")
    judging.add_argument("folder", type=Path, help="what sheet wrote")
    judging.add_argument("answers", type=Path, help="a line like `C 7` for each row")
    given = parser.parse_args(words)
    if given.command == "sheet":
        sheet(given.drawings, given.out, given.pictures, given.seed)
        print(f"{given.out}/sheet.png, {given.out}/captions.txt; key.json is not for the stranger")
    else:
        print(told(score(given.folder, given.answers)))


if __name__ == "__main__":
    in_a_sentence(main)
