"""Search: candidates that compete while they are drawn. About 3 s."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from infra.errors import ConfigError, DataError
from infra.signals import StopFlag
from tests.support import drawable_run
from train.drawing.draw import Batch, Picture, draw
from train.drawing.search import _parents, along, search
from train.drawing.settings import Settings
from train.drawing.source import Models, open_models
from train.verbs import draw as verb

CAPTION = "a red fox"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return drawable_run.make(str(tmp_path_factory.mktemp("runs") / "mine"), "dalle_fit.caption_dropout=0.1", "dvae.image_size=24").url


@pytest.fixture(scope="module")
def models(url: str) -> Models:
    return open_models(url, "cpu", "fp32", "clip", deterministic=True)


def ancestry(picture: Picture) -> list[list[int]]:
    found: list[list[int]] = picture.shaped_by["ancestry"]
    return found


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_survivors_are_those_of_best_of_n_and_branches_go_on_from_their_codes(models: Models, guidance: float) -> None:
    settings = Settings(n=6, guidance=guidance, search=True)
    found = search(models, CAPTION, settings)
    plain = [picture for some in draw(models, [CAPTION], Settings(n=6, guidance=guidance)) for picture in some]
    by_seed = {picture.seed: picture.codes_I for picture in plain}
    grid = models.cfg.dvae.grid
    kept = [picture for picture in found if len(ancestry(picture)) == 1]
    assert (kept or guidance != 1) and len(kept) <= 3 and all((plain[picture.candidate].codes_I == picture.codes_I).all() for picture in kept)
    for picture in found:
        (_, first), *later = ancestry(picture)
        end = later[0][0] if later else grid**2
        assert (picture.codes_I[:end] == by_seed[first][:end]).all() and {place for place, _ in later} <= {grid // 3 * grid, 2 * grid // 3 * grid}
    assert len({picture.codes_I.tobytes() for picture in found}) == 6, "branches differ"


def test_windows_change_nothing_and_each_picture_can_be_drawn_alone_by_its_ancestry(models: Models) -> None:
    found = search(models, CAPTION, Settings(n=5, search=True, window=1))
    drafted = search(models, CAPTION, Settings(n=5, search=True, window=3))
    assert [picture.codes_I.tolist() for picture in drafted] == [picture.codes_I.tolist() for picture in found]
    assert [ancestry(picture) for picture in drafted] == [ancestry(picture) for picture in found]
    for picture in found:
        (again,) = along(models, Batch((CAPTION,), (picture.candidate,)), Settings(), ancestry(picture), [])
        assert (again.codes_I == picture.codes_I).all()


def test_the_better_half_stays_and_the_worse_branches_from_it() -> None:
    assert _parents([0.1, 0.9, 0.5, 0.7]) == [3, 1, 1, 3]
    assert _parents([3.0, 2.0, 1.0]) == [0, 1, 0]
    assert _parents([0.0, 0.0]) == [0, 0]


def test_given_rows_are_kept_and_are_no_place_to_branch(models: Models) -> None:
    given = [1] * (models.cfg.dvae.grid * (models.cfg.dvae.grid // 3))
    found = search(models, CAPTION, Settings(n=4, search=True), given)
    assert all(picture.codes_I[: len(given)].tolist() == given for picture in found)
    assert {place for picture in found for place, _ in ancestry(picture)[1:]} == {2 * models.cfg.dvae.grid // 3 * models.cfg.dvae.grid}


def test_search_needs_what_ranks_and_two_candidates(models: Models, url: str) -> None:
    with pytest.raises(ConfigError, match=r"search with n = 1 and rerank clip: it needs --rerank clip and at least 2 candidates"):
        search(models, CAPTION, Settings(n=1, search=True))
    with pytest.raises(ConfigError, match=r"search with n = 4 and rerank none"):
        next(iter(draw(open_models(url, "cpu"), [CAPTION], Settings(n=4, search=True))))
    for odd in ([[1, 5]], [[0, 5], [0, 6]], [[0, 5], [10**6, 6]]):
        with pytest.raises(DataError, match="expected rising positions from 0 on, below"):
            along(models, Batch((CAPTION,), (0,)), Settings(), odd, [])


def test_the_command_draws_beside_best_of_n_and_one_picture_again(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(settings: Settings, **options: str) -> list[dict[str, object]]:
        verb.main(url, [CAPTION], verb.Options(settings, out=str(tmp_path), rerank="clip", **options), StopFlag())  # type: ignore[arg-type]
        return [json.loads(line) for path in sorted(tmp_path.glob("*/samples.jsonl")) for line in path.read_text().splitlines()]

    plain = run(Settings(n=4))
    both = run(Settings(n=4, search=True))
    assert len(plain) == 4 and len(both) == 8
    searched = [line for line in both if line not in plain]
    assert all("search" in line["settings"] for line in searched) and not any("search" in line["settings"] for line in plain)  # type: ignore[operator]
    capsys.readouterr()
    branch = next(line for line in searched if len(line["shaped_by"]["ancestry"]) > 1)  # type: ignore[index]
    verb.main("", [], verb.Options(out=str(tmp_path / "again"), again=json.dumps(branch)), StopFlag())
    assert "the same codes and the same file" in capsys.readouterr().out
