"""The experiment on gradient scales, at the smallest size: its arms, its emulated floor, its measure of what was lost."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from train.experiments import precision, precision_page
from train.experiments.precision import ARMS, DOCS, Options, Run, experiment, lost_shares, main, raise_floor

TINY = Options(layers=2, width=16, updates=4, batch=4)


def test_raising_the_floor_rounds_small_values_and_leaves_others() -> None:
    x = torch.tensor([1.0, 2.0**-10, 2.0**-17, 2.0**-19, 0.9 * 2.0**-21, -(2.0**-20)], dtype=torch.float16)
    assert torch.equal(raise_floor(x, 0), x)
    assert raise_floor(x, 4).tolist() == [1.0, 2.0**-10, 2.0**-17, 2.0**-19, 0.0, -(2.0**-20)]


def test_what_one_global_scale_loses_a_scale_per_resblock_keeps() -> None:
    """With a floor so high that small scales lose everything."""
    poor, rich = Run(ARMS[1], TINY, 20), Run(ARMS[2], TINY, 20)
    assert poor.scales is not None and rich.scales is not None
    poor.scales.exponents = [0.0]
    rich.scales.exponents = [0.0, 14.0, 14.0, 14.0]
    lost = lost_shares(poor, 0), lost_shares(rich, 0)
    assert min(lost[0]) > 0.5 and lost[1][0] > 0.5 and max(lost[1][1:]) < 0.2


def test_all_arms_train_alike_where_nothing_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(
        [
            "--docs",
            str(tmp_path),
            "--name",
            "x",
            "--layers",
            "2",
            "--width",
            "16",
            "--updates",
            "6",
            "--batch",
            "4",
            "--floors",
            "0",
            "3",
            "--seeds",
            "0",
            "1",
        ]
    )
    found = json.loads((tmp_path / "experiments" / "precision" / "x.json").read_text())
    assert len(found["runs"]) == 14 and found["options"]["seeds"] == [0, 1] and "| fp32 | 0 |" in capsys.readouterr().out
    first = {run["seed"]: [y for _, y in run["losses"]] for run in found["runs"] if run["arm"] == "fp32"}
    assert first[0] != first[1]
    for run in found["runs"]:
        assert [y for _, y in run["losses"]] == pytest.approx(first[run["seed"]], rel=5e-3), run["arm"]
        assert len(run["lost_share"]) == 4 and run["skipped"] == 0
    assert found["runs"][0]["lost_share"] == [0.0] * 4

    (tmp_path / "pictures").mkdir()
    main(["--docs", str(tmp_path), "--render"])
    page = (tmp_path / "precision.md").read_text()
    assert "## x" in page and page.count("| fp16, scale per resblock | ") == 2 and "where the arms differ most, and losses by floor" in page
    assert "seeds 0, 1;" in page
    for kind, word in (("loss", "updates"), ("lost", "resblock"), ("floors", "bits of raised floor")):
        picture = (tmp_path / "pictures" / f"precision-x-{kind}.svg").read_text()
        assert ElementTree.fromstring(picture).tag.endswith("svg") and word in picture and "var(" not in picture


def test_a_stopped_experiment_goes_on_and_other_options_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, real, count = tmp_path / "x.json", precision._run, 0

    def stops_at_the_third(*given: Any) -> dict[str, Any]:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(precision, "_run", stops_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        experiment(TINY, [0], out)
    assert len(json.loads(out.read_text())["runs"]) == 2
    found = experiment(TINY, [0], out)
    assert count == 3 + 2 and [run["arm"] for run in found["runs"]] == [arm.name for arm in ARMS]
    wider = experiment(replace(TINY, floors=(0, 3)), [0], out)
    assert count == 5 + 3 and json.loads(out.read_text()) == json.loads(json.dumps(wider)) and len(wider["runs"]) == 7
    with pytest.raises(SystemExit, match=r"x.json holds runs with .* give another --name"):
        experiment(replace(TINY, width=32), [0], out)


def test_the_table_averages_over_seeds_and_pairs_them_with_fp32() -> None:
    ends = [("fp32", 0, 1.0), ("fp16", 0, 1.1), ("fp32", 1, 2.0), ("fp16", 1, 2.3)]
    runs = [
        {"arm": arm, "floor_bits": 0, "seed": seed, "last_tenth": end, "lost_share": [0.1 * seed, 0.3], "skipped": 2 * seed}
        for arm, seed, end in ends
    ]
    rows = precision_page.table(runs).splitlines()[2:]
    assert rows == [
        "| fp32 | 0 | 1.5000 | +0.0000 | 5.0% | 17.5% | 30.0% | 1 |  |",
        "| fp16 | 0 | 1.7000 | +0.2000 ± 0.1000 | 5.0% | 17.5% | 30.0% | 1 |  |",
    ]


def test_the_page_is_that_of_its_files(tmp_path: Path) -> None:
    shutil.copytree(DOCS / "experiments", tmp_path / "experiments")
    (tmp_path / "pictures").mkdir()
    precision_page.write(tmp_path)
    assert (tmp_path / "precision.md").read_text() == (DOCS / "precision.md").read_text()
