"""Sets and runs to be validated, and ways to damage them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.shards.shard_set import ShardSet
from infra.errors import DataError
from infra.files import sha256_file
from infra.signals import StopFlag
from tests.support.made_sets import code, image, make_codes, make_images
from train.config import load_run
from train.verbs import validate
from train.verbs.validate import Options

DVAE, TOKENIZER = "d" * 64, "7" * 64


def numbers(*counts: int) -> list[range]:
    """Numbers of the records of parts."""
    ends = np.cumsum([0, *counts]).tolist()
    return [range(begin, end) for begin, end in itertools.pairwise(ends)]


def images(url: str, *counts: int, **fields: Any) -> ShardSet:
    return make_images(url, [[image(number) for number in some] for some in numbers(*counts)], **fields)


def codes(url: str, *counts: int, **parents: str) -> ShardSet:
    return make_codes(url, [[code(number) for number in some] for some in numbers(*counts)], parents)


def run_folder(place: Path, dvae: str = DVAE) -> Path:
    """A run with image and code sets that belong together, a tokenizer, and the descriptions of its exports."""
    from data_pipeline import tokenizer

    cfg = load_run("tiny", [f"run.root={place}"])
    run = place / "tiny"
    run.mkdir(parents=True)
    (run / "config.json").write_text(cfg.model_dump_json())
    (run / "provenance.json").write_text("{}")
    for split in ("train", "validation"):
        made = make_images(str(run / "images" / split), [[image(number, split) for number in some] for some in numbers(6, 3)], split=split)
        codes(str(run / "codes" / "crop-0" / split), 6, 3, dvae=dvae, images=made.content_hash)
        if split == "train":
            model = tokenizer.train_tokenizer([caption for some in made.captions() for caption in some], cfg.tokenizer.vocab)
            write(run / "tokenizer/tokenizer.model", model)
            facts = {
                "schema": "tokenizer/1",
                "sha256": sha256_file(run / "tokenizer/tokenizer.model"),
                "content_hash": TOKENIZER,
                "size": 300,
                "captions": 9,
                "records": 9,
            }
            write(run / "tokenizer/manifest.json", facts | {"parents": {"images": made.content_hash}, "settings": {"vocab": cfg.tokenizer.vocab}})
    for stage, parents in (("dvae", {}), ("dalle", {"dvae": DVAE, "tokenizer": TOKENIZER}), ("clip", {"tokenizer": TOKENIZER})):
        write(run / stage / "export/config.json", {"content_hash": DVAE, "parents": parents})
    return run


def write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())


def problems_of(url: str | Path, capsys: pytest.CaptureFixture[str], **options: Any) -> str:
    """What ``validate`` says about something that is not sound."""
    with pytest.raises(DataError) as caught:
        validate.main(str(url), Options(workers=1, **options), StopFlag())
    return str(caught.value) + "\n" + " ".join(capsys.readouterr().out.split())


def passes(url: str | Path, capsys: pytest.CaptureFixture[str], workers: int = 1, **options: Any) -> str:
    validate.main(str(url), Options(workers=workers, **options), StopFlag())
    out = capsys.readouterr().out
    assert "no problems found" in out
    return " ".join(out.split())


def first_part(place: Path) -> Path:
    return place / json.loads((place / "manifest.json").read_text())["parts"][0]["name"]


def forge(place: Path, name: str, data: bytes) -> None:
    """Replace a file of the first part, and its hash wherever it is written down: what remains wrong is what the file says."""
    part = first_part(place)
    old = sha256_file(part / name)
    (part / name).write_bytes(data)
    for path in [part / "done.json", *place.rglob("manifest.json")]:
        path.write_text(path.read_text().replace(old, sha256_file(part / name)))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))
