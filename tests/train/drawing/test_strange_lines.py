"""Lines of samples.jsonl from strangers, and numbers that nobody draws with: each is refused in a sentence. About 3 s."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import typer

from infra.errors import ConfigError, DataError
from infra.signals import StopFlag
from tests.support import drawable_run
from tests.support.patience import PATIENCE_S
from train.config import load_run
from train.drawing import draw, memory, package, samples
from train.drawing.settings import Settings
from train.drawing.source import Models, open_models
from train.verbs import arguments
from train.verbs import draw as verb


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return open_models(drawable_run.make(str(tmp_path_factory.mktemp("runs") / "mine")).url, "cpu", "fp32", "none")


@pytest.fixture(scope="module")
def line(models: Models, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("out")
    verb.main(models.url, ["a red fox"], verb.Options(Settings(n=2), out=str(out)), StopFlag())
    (table,) = out.glob("*/samples.jsonl")
    found: dict[str, Any] = json.loads(table.read_text().splitlines()[0])
    return found


@pytest.fixture
def again(models: Models, line: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, Any], None]:
    """Draws the line again with another value of a field."""
    monkeypatch.setattr(verb, "open_place", lambda *_, **__: models)

    def call(section: str, key: str, value: Any) -> None:
        changed = copy.deepcopy(line)
        (changed[section] if section else changed)[key] = value
        verb.main("", [], verb.Options(again=json.dumps(changed), out=str(tmp_path / "again")), StopFlag())

    return call


STRANGE: dict[str, dict[str, list[Any]]] = {
    "settings": {
        "temperature": [0, -1, 1e-300, 1e308, True, "1", None],
        "top_k": [-5, 0, 1.5, 10**5, 10**50],
        "top_p": [-1, 0, 2, "x"],
        "guidance": [-1, 3, 1e308, None],
        "n": [-1, 0, 10**50],
        "seed": [-1, "x"],
        "prefix": [["x"], [-1], [10**9], [1.5], [[1]], [True], [1], [10**5] * 4, [0] * 16, [0] * 64, [0] * 10**5, "abc", 5, None],
        "unknown": [1],
    },
    "shaped_by": {
        "place": [9, -1, 65536],
        "captions": [0, -1, 10**9],
        "each": [0, 10**9],
        "window": [0, 99, 65536, 10**9],
        "threads": [0, -1, 513, 65536],
        "ancestry": [[[0, 10**30]], [[0, -1]], [[5, 1]]],
    },
    "": {"candidate": [2, 65536, -1]},
}


@pytest.mark.parametrize(("section", "key"), [(section, key) for section, keys in STRANGE.items() for key in keys])
def test_a_line_with_a_value_that_no_drawing_has_is_refused_by_its_field(
    section: str, key: str, again: Callable[[str, str, Any], None], tmp_path: Path
) -> None:
    for value in STRANGE[section][key]:
        with pytest.raises(DataError, match=key):
            again(section, key, value)
    assert not (tmp_path / "again").exists()


def test_a_top_p_that_fp32_takes_for_0_draws_the_likeliest_codes(again: Callable[[str, str, Any], None], tmp_path: Path) -> None:
    again("settings", "top_p", 1e-300)
    assert len(list((tmp_path / "again").iterdir())) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": math.inf},
        {"temperature": math.nan},
        {"temperature": 1e-300},
        {"guidance": math.inf},
        {"guidance": math.nan},
        {"top_p": math.nan},
        {"n": 10**20},
        {"batch": 10**20},
        {"window": 10**20},
        {"keep_rows": 10**20},
        {"top_k": 10**20},
    ],
)
def test_numbers_that_nobody_draws_with_are_refused_by_name(settings: dict[str, Any], models: Models) -> None:
    with pytest.raises(ConfigError, match=rf"{next(iter(settings))} = .*: (accepted|must)"):
        Settings(**settings).check(models.cfg)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_options_take_finite_numbers_alone(value: float) -> None:
    with pytest.raises(typer.BadParameter, match="is not a finite number"):
        arguments.finite(value)
    assert arguments.finite(0.5) == 0.5


def test_every_numeric_option_of_the_launcher_has_an_upper_bound_or_is_checked_by_the_model() -> None:
    """In a process of its own, as the launcher sets itself up when it is imported."""
    code = """
import typing, typer, launcher
for command in launcher.app.registered_commands:
    for name, hint in typing.get_type_hints(command.callback, include_extras=True).items():
        kind, *more = typing.get_args(hint) or [None]
        for option in more if kind in (int, float) else []:
            if option.max is None and kind is int or kind is float and option.callback is None:
                print(command.name or command.callback.__name__, name)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=PATIENCE_S).stdout.split("\n")
    assert sorted(set(found)) == ["", "draw seed", "inspect seed"], "seeds may be any number"


@pytest.mark.parametrize("name", ["x" * 300, "é" * 200])
def test_a_name_of_a_run_that_no_folder_can_have_is_refused_by_its_key(name: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.name: .*a name of [34]00 bytes; it is the name of a folder: accepted are up to 255"):
        load_run("tiny", [f"run.name={name}"])


def test_a_number_of_a_line_that_nobody_has_is_no_number(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be read \(File name too long\)"):
        verb.main("", [], verb.Options(again=f"{tmp_path}/x:{'9' * 5000}"), StopFlag())


def test_captions_that_could_not_be_recorded_are_refused_before_anything_is_drawn(models: Models, tmp_path: Path) -> None:
    """A terminal in latin-1 gives lone surrogates, which no file holds."""
    out = tmp_path / "out"
    for caption, message in (
        ("caf\udce9", r"the caption 'caf\\udce9' is not UTF-8 text"),
        ("a" * 70_000, "has 70,000 characters; accepted are up to 65,536"),
    ):
        with pytest.raises(DataError, match=message):
            verb.main(models.url, [caption], verb.Options(Settings(n=1), out=str(out)), StopFlag())
    assert not out.exists()


def test_a_batch_that_memory_does_not_hold_is_refused_before_it_is_taken(
    models: Models, again: Callable[[str, str, Any], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line of a stranger may ask for a batch of 65,536 pictures; so may --batch."""
    monkeypatch.setattr(memory, "available", lambda device: 100_000)
    with pytest.raises(ConfigError, match=r"30,000 pictures at once take \d+\.\d GB, and 0\.0 GB are free: give a smaller --batch"):
        again("shaped_by", "each", 30_000)
    with pytest.raises(ConfigError, match="50,000 pictures at once take"):
        list(draw.draw(models, ["x"], Settings(n=50_000, batch=50_000)))
    assert not (tmp_path / "again").exists()


def test_a_container_has_less_memory_than_its_machine(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = memory.available(models.device)
    for limit, found in (("5000000", 5_000_000), ("max", whole)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        monkeypatch.setattr(memory, "_CONTAINER", tmp_path / "memory.max")
        assert memory.available(models.device) == pytest.approx(found, rel=0.5)


def test_a_list_of_pictures_that_names_one_twice_or_too_many_is_damaged(models: Models, line: dict[str, Any], tmp_path: Path) -> None:
    """By such a list a drawing was never complete, and ended without a word."""
    place = samples.Folder(str(tmp_path), line["key"])
    place.write([line, line | {"candidate": 1}])
    assert len(place.lines()) == 2
    for more in (line, line | {"candidate": 2}, line | {"candidate": 4000}):
        place.write([line, line | {"candidate": 1}, more])
        with pytest.raises(DataError, match=r"samples\.jsonl: names a candidate twice, or one beyond those that were asked for; delete it"):
            place.lines()
    place.write([line, line | {"key": "0" * 64}])
    assert len(place.lines()) == 1, "others' pictures do not count"


def test_an_endless_list_of_pictures_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "samples.jsonl").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DataError, match=r"larger than 536,870,912 bytes"):
        samples.read_lines(str(tmp_path / "samples.jsonl"))


def test_a_model_card_holds_what_records_say_as_text(models: Models) -> None:
    evil = "x\n---\nlicense: mit\n---\n# Mine <script>alert(1)</script>"
    run = SimpleNamespace(done=lambda stage: {"summary": {"credits": [evil, "plain: CC-BY-4.0 (5 records)"]}})
    card = package._card(cast(Any, SimpleNamespace(run=run, cfg=models.cfg)), "raw", "0" * 64, {})
    assert card.count("\n---\n") == 1 and "<script" not in card and "\n# Mine" not in card and "- plain: CC-BY-4.0 (5 records)" in card
