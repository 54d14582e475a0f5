"""Asks a stranger which drawing shows which caption: ``python -m train.experiments.stranger sheet DRAWINGS... --out FOLDER``, then ``... score FOLDER ANSWERS``.

DRAWINGS are the folders that ``launcher.py draw ... --out DRAWINGS`` wrote. ``sheet`` writes sheet.png, with a letter and the best pictures of each caption in a row, and
captions.txt, the numbered captions; both are shuffled, each in its own way, and key.json says which is which. The stranger sees the sheet and the captions, and writes a line
like ``C 7`` for each row. ``score`` counts how many are right, and how likely as many are by chance: one is expected, however many rows there are.
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

from infra import stored
from infra.errors import UsageError, in_a_sentence
from infra.files import atomic
from infra.seeds import derive
from train.drawing.gallery import ranked
from train.drawing.samples import SAMPLES, Line, read_lines
from train.report.images import enlarged, grid, png_bytes, read_png

_ANSWER = re.compile(r"^\s*([A-Za-z]{1,2})[\s:.,=-]+(\d{1,3})\s*$")
_SIDE = 96
"""Least side of a picture on the sheet, in pixels."""


class _Key(stored.Stored):
    rows: dict[str, Annotated[int, Field(ge=1)]]
    """Which caption's number is right for a letter."""
    captions: list[str]
    seed: int


def sheet(drawings: Sequence[str], out: Path, pictures: int, seed: int) -> None:
    """Write the sheet, the captions and the key.

    Raises:
        UsageError: there are fewer than two captions, or more than letters.
    """
    found: dict[str, list[tuple[Path, Line]]] = {}
    for path in sorted(path for folder in drawings for path in Path(folder).glob(f"*/{SAMPLES}")):
        lines = read_lines(str(path))
        found.setdefault(lines[0]["caption"], []).extend((path.parent, line) for line in ranked(lines)[:pictures])
    letters = list(string.ascii_uppercase) + ["A" + letter for letter in string.ascii_uppercase]
    if not 2 <= len(found) <= len(letters):
        raise UsageError(
            f"{', '.join(drawings)}: drawings of {len(found)} captions; give folders of `launcher.py draw --out` with 2 to {len(letters)}"
        )
    numbered, rows = sorted(found), sorted(found)
    random.Random(derive(seed, "order", "captions")).shuffle(numbered)
    random.Random(derive(seed, "order", "rows")).shuffle(rows)
    images = [enlarged([read_png((folder / line["file"]).read_bytes()) for folder, line in found[caption]], _SIDE) for caption in rows]
    out.mkdir(parents=True, exist_ok=True)
    key = {"rows": {letters[row]: numbered.index(caption) + 1 for row, caption in enumerate(rows)}, "captions": numbered, "seed": seed}
    _write(out / "sheet.png", png_bytes(grid(images, labels=letters[: len(rows)])))
    _write(out / "captions.txt", "".join(f"{number} {caption}\n" for number, caption in enumerate(numbered, 1)).encode())
    _write(out / "key.json", json.dumps(key, indent=1, ensure_ascii=False).encode())


def score(folder: Path, answers: Path) -> dict[str, Any]:
    """How many answers are right, of how many rows; the captions of these; and the probability of as many by chance.

    Raises:
        UsageError: a line is no answer, a row is answered twice, or names a caption that does not exist.
    """
    key = stored.read(str(folder / "key.json"), _Key, "make the sheet again")
    said: dict[str, int] = {}
    for number, line in enumerate(filter(str.strip, answers.read_text().splitlines()), 1):
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
    }


def chance(right: int, rows: int) -> float:
    """The probability that a random assignment of captions to rows has at least ``right`` in their place (Montmort 1708, the matching problem)."""
    deranged = [factorial(n) * sum((-1) ** k / factorial(k) for k in range(n + 1)) for n in range(rows + 1)]
    return sum(comb(rows, k) * round(deranged[rows - k]) for k in range(right, rows + 1)) / factorial(rows)


def told(found: Mapping[str, Any]) -> str:
    """The result in words."""
    names = "".join(f"\n  {caption}" for caption in found["captions"])
    return f"{found['right']} of {found['rows']} rows are right ({found['answered']} answered); by chance as many are in {found['by_chance']:.2g} of cases{names}"


def _write(path: Path, data: bytes) -> None:
    with atomic(path) as file:
        file.write(data)


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
