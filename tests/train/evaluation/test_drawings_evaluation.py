"""What is measured of drawings: distances without a bias of few pictures, retrieval, colours, blur, and who judges what. About 4 s."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from infra.errors import ConfigError, DataError
from train.config import load_run
from train.evaluation.blur import blurred
from train.evaluation.class_scores import class_score
from train.evaluation.colours import COLOURS, agreement, named, shares
from train.evaluation.distances import distances, frechet, frechet_unbiased, halves, interval, mmd2, recalls, sliced_wasserstein
from train.evaluation.drawings import Judge, figures
from train.evaluation.frechet import FeatureSums, frechet_distance
from train.report import section_drawings
from train.report.view import RunView
from train.stages import evaluate_drawings


def normal(count: int, width: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + shift


@pytest.mark.parametrize(("count", "width"), [(40, 8), (20, 30)])
def test_the_frechet_distance_of_features_is_that_of_their_moments(count: int, width: int) -> None:
    sets = [normal(count, width, 1), 2 * normal(count + 3, width, 2, 0.5)]
    sums = [FeatureSums(width, torch.device("cpu")) for _ in sets]
    for total, some in zip(sums, sets, strict=True):
        total.add(some)
    assert frechet(*sets) == pytest.approx(frechet_distance(*(total.moments() for total in sums)), rel=1e-6)


def test_equal_distributions_have_no_distance_by_the_unbiased_kinds_where_the_frechet_distance_has_one() -> None:
    pairs = [(normal(200, 16, 2 * seed), normal(200, 16, 2 * seed + 1)) for seed in range(8)]
    biased = [frechet(*pair) for pair in pairs]
    unbiased = [frechet_unbiased(*pair, seed) for seed, pair in enumerate(pairs)]
    discrepancy = [mmd2(*pair, 4.0) for pair in pairs]
    assert min(biased) > 0.5 and abs(float(np.mean(unbiased))) < 0.15 * float(np.mean(biased))
    assert min(discrepancy) < 0 < max(discrepancy), "around zero"
    shifted = [mmd2(a, b + 0.3, 4.0) for a, b in pairs]
    assert min(shifted) > 3 * max(discrepancy)


def test_distances_grow_with_the_shift_and_are_those_of_their_definitions() -> None:
    real = normal(64, 6, 1)
    near, far = (distances(normal(64, 6, 2, shift), real, 0) for shift in (0.2, 1.0))
    assert near.keys() == {"frechet", "frechet_unbiased", "mmd2", "sliced_wasserstein"} and all(near[key] < far[key] for key in near)
    assert sliced_wasserstein(real + 1.0, real, 0) == pytest.approx(1.0, rel=0.1)  # a shift by (1, ..., 1) has this length on a random direction
    assert sliced_wasserstein(real, real, 0) == 0 and frechet(real, real) == pytest.approx(0, abs=1e-8)
    assert "frechet_unbiased" not in distances(real[:8], real[8:16], 0), "too few to extrapolate"
    assert halves(real, 0) == halves(real, 0) != halves(real, 1)
    kernel = torch.exp(-torch.cdist(real[:2].double(), real[2:4].double()).square() / 2)
    inside = sum(torch.exp(-(part[0] - part[1]).double().square().sum() / 2) for part in (real[:2], real[2:4]))
    assert mmd2(real[:2], real[2:4], 1.0) == pytest.approx(float(inside - 2 * kernel.mean()))


def test_retrieval_counts_the_rank_of_the_own_picture_and_equal_pictures_do_not_look_found() -> None:
    text = torch.eye(4)
    assert recalls(text, text, (1, 2)) == {"recall_at_1": 1.0, "recall_at_2": 1.0}
    assert recalls(text.roll(1, 0), text, (1, 4)) == {"recall_at_1": 0.0, "recall_at_4": 1.0}
    assert recalls(torch.ones(4, 4) / 2, text, (1, 2)) == {"recall_at_1": 0.0, "recall_at_2": 1.0}


def test_the_interval_is_that_of_the_mean_over_captions() -> None:
    shares_M = np.random.default_rng(3).binomial(1, 0.3, 400).astype(float)
    low, high = interval(shares_M)
    error = shares_M.std() / 20
    assert low == pytest.approx(shares_M.mean() - 1.96 * error, abs=0.01) and high == pytest.approx(shares_M.mean() + 1.96 * error, abs=0.01)


def test_class_scores_count_the_classes_that_are_surely_and_equally_often_named() -> None:
    sure, unsure = 50 * torch.eye(10), torch.zeros(10, 10)
    assert class_score(sure) == pytest.approx(10) and class_score(unsure) == pytest.approx(1)
    assert class_score(sure[:1].repeat(10, 1)) == pytest.approx(1), "one class alone is no variety"
    assert class_score(sure[[0, 1] * 5]) == pytest.approx(2)
    logits = normal(20_000, 7, 1)
    expected = []
    for part in logits.double().softmax(1).numpy().reshape(4, 5000, 7):  # as published: the mean over parts of 5,000
        expected.append(np.exp((part * (np.log(part) - np.log(part.mean(0)))).sum(1).mean()))
    assert class_score(logits) == pytest.approx(float(np.mean(expected)), rel=1e-9)


@pytest.mark.parametrize(
    ("rgb", "name"),
    [
        ((0, 0, 0), "black"), ((255, 255, 255), "white"), ((128, 128, 128), "grey"), ((220, 20, 30), "red"), ((255, 150, 0), "orange"),
        ((120, 70, 20), "brown"), ((250, 240, 30), "yellow"), ((30, 160, 50), "green"), ((30, 60, 220), "blue"), ((120, 40, 180), "purple"),
        ((255, 150, 190), "pink"),
    ],
)  # fmt: skip
def test_a_pixel_has_the_colour_that_people_call_it(rgb: tuple[int, int, int], name: str) -> None:
    picture = np.full((4, 4, 3), rgb, np.uint8)
    assert COLOURS[int(shares(picture).argmax())] == name and shares(picture).sum() == pytest.approx(1)


def test_colours_that_captions_name_are_looked_for_in_their_own_drawings() -> None:
    assert named("A Gray cat, a violet-blue sky; reddish") == {"grey", "purple", "blue"}
    captions = ["a red fox", "a blue house", "red and blue", "a tree"]
    right = np.zeros((4, len(COLOURS)))
    right[0, COLOURS.index("red")] = right[1, COLOURS.index("blue")] = 0.6
    assert agreement(captions, right) == {"captions": 2.0, "agreement": 1.0, "agreement_blue": 1.0, "agreement_red": 1.0}
    assert agreement(captions, np.zeros_like(right))["agreement"] == 0.5, "equal pictures are chance"
    assert agreement(captions, right[::-1])["agreement"] < 0.5
    assert agreement(["a tree"], right[:1]) == {"captions": 0.0}


def test_blur_keeps_means_and_flat_pictures_and_takes_detail_away() -> None:
    picture = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    soft = blurred(picture, 2)
    assert blurred(picture, 0) is picture and soft.shape == picture.shape
    assert soft.std() < 0.4 * picture.std() and torch.allclose(blurred(torch.full_like(picture, 0.3), 4), torch.tensor(0.3), atol=1e-6)
    impulse = torch.zeros(1, 3, 31, 31)
    impulse[:, :, 15, 15] = 1
    spread = blurred(impulse, 2)[0, 0]
    assert float(spread.sum()) == pytest.approx(1, rel=1e-5)
    assert float(spread[15, 17] / spread[15, 15]) == pytest.approx(float(np.exp(-0.5)), rel=1e-5)


def made(count: int, best_of: int, blurs: int) -> list[dict[str, Any]]:
    """Files of captions whose drawings are their real pictures, the more so the more candidates there were."""
    generator = torch.Generator().manual_seed(3)
    out = []
    for _ in range(count):
        real = torch.nn.functional.normalize(torch.randn(1 + blurs, 12, generator=generator), dim=1)
        noise = torch.stack([2.0 * torch.randn(12, generator=generator) / (1 + place) for place in range(best_of + blurs)])
        drawn = torch.nn.functional.normalize(real[:1] + noise, dim=1)
        file: dict[str, Any] = {"colours_VK": np.full((best_of, len(COLOURS)), 1 / 11), "real_colours_K": np.full(len(COLOURS), 1 / 11)}
        for name in ("own clip", "judge", "net"):
            file |= {f"{name}/drawn_VD": drawn.numpy(), f"{name}/real_VD": real.numpy(), f"{name}/text_D": real[0].numpy()}
        out.append(file)
    return out


def towers(name: str, *, ranks: bool = False, shares_images: bool = False) -> Judge:
    if name == "net":
        return Judge(name, "abc", lambda x: x, classes=lambda x: 9 * x, score="class_score_net", ranks=ranks, shares_images=shares_images)
    return Judge(name, "abc", lambda x: x, lambda caption: torch.ones(1, 12), ranks=ranks, shares_images=shares_images)


def test_what_ranks_judges_the_first_candidate_only_and_others_judge_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    captions = [f"a {'red' if number % 2 else 'blue'} thing {number}" for number in range(24)]
    judges = [towers("own clip", ranks=True), towers("judge", shares_images=True), towers("net")]
    found = figures(captions, made(24, 3, 1), judges, (1, 2, 4), (2,), 0)
    assert {name: list(part["by_n"]) for name, part in found["distances"].items()} == {
        "own clip": ["1"],
        "judge": ["1", "2", "4"],
        "net": ["1", "2", "4"],
    }
    assert {name: list(part["by_n"]) for name, part in found["retrieval"].items()} == {"own clip": ["1"], "judge": ["1", "2", "4"]}
    assert "by_blur" not in found["distances"]["own clip"] and list(found["distances"]["net"]["by_blur"]) == ["best_of", "2"]
    assert list(found["classes"]) == ["net"], "of the judges that have classes"
    scores = found["classes"]["net"]
    assert list(scores["by_n"]) == ["1", "2", "4"] and list(scores["by_blur"]) == ["0", "2"]
    assert scores["by_blur"]["0"]["drawn"] == scores["by_n"]["4"] != scores["by_n"]["1"]
    assert all(scores["by_blur"]["2"][kind] != scores["by_blur"]["0"][kind] for kind in ("drawn", "real")), "of the blurred pictures"
    shown = found["retrieval"]["judge"]
    assert shown["real"]["recall_at_1"] == 1 and shown["by_n"]["1"]["recall_at_5"] < shown["by_n"]["4"]["recall_at_5"]
    first = shown["by_n"]["1"]
    assert len(first["nearer"]) == 24 and np.mean([place < 1 for place in first["nearer"]]) == first["recall_at_1"] < 1
    assert first["recall_at_1_interval"][0] < first["recall_at_1"] < first["recall_at_1_interval"][1]
    assert shown["by_n"]["4"]["clip_score"] > shown["by_n"]["4"]["clip_score_of_another_caption"]
    assert shown["trained_on_the_images_of_what_ranks"] and not found["distances"]["net"]["trained_on_the_images_of_what_ranks"]
    assert found["colours"]["by_n"]["1"]["agreement"] == 0.5
    found["nearest"] = {"among": 10, "drawn": dict.fromkeys(("least", "p01", "p10", "median"), 0.1), "drawn_nearer_than_p01_of_real": 0.25}
    found["nearest"]["real"] = found["nearest"]["drawn"]
    view = RunView(str(tmp_path))
    empty = section_drawings.section(view)
    assert empty is not None and "evaluate.drawings says of how many captions" in empty.body
    monkeypatch.setattr(view, "json", lambda *parts: found if parts == ("evaluate", "drawings.json") else {})
    section = section_drawings.section(view)
    assert section is not None and section.body.count("<svg") == 2
    for words in (
        "judge was trained on the images",
        "blur 2",
        "real pictures",
        "25.0 % of the drawings are nearer",
        "chance is 4.2 % at 1",
        "Class score by net",
        "{:.1f} % ({:.1f} to {:.1f})".format(*(100 * value for value in (first["recall_at_1"], *first["recall_at_1_interval"]))),
    ):
        assert words in section.body


def test_numbers_of_candidates_begin_with_one_and_rise() -> None:
    for words in ("[2,4]", "[1,4,2]", "[1,1]"):
        with pytest.raises(ConfigError, match=r"best_of = \[.*\]: rising numbers from 1 on"):
            load_run("tiny", [f"evaluate.best_of={words}"])


def test_figures_of_somebody_else_unpack_to_no_more_than_they_are(tmp_path: Path) -> None:
    place = tmp_path / "x.npz"
    np.savez(place, a=np.arange(5))
    assert evaluate_drawings._read(str(place))["a"].tolist() == [0, 1, 2, 3, 4]
    np.savez_compressed(place, a=np.zeros(50_000_000))
    assert place.stat().st_size < 1 << 20
    for data in (place.read_bytes(), b"", b"PK\x03\x04", place.read_bytes()[:100]):
        place.write_bytes(data)
        with pytest.raises(DataError, match=r"x\.npz: no figures of drawings, or damaged \(.*delete it, and run the stage 'evaluate' again"):
            evaluate_drawings._read(str(place))
    np.savez(place, a=np.array([{}], dtype=object))
    with pytest.raises(DataError, match="allow_pickle"):
        evaluate_drawings._read(str(place))
