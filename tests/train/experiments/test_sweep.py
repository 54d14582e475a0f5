"""Sweeps of options: what a file may say, which trainings are made and which are kept, the figures, the page. One sweep is real, at the smallest size."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from infra.errors import ConfigError, DataError, ExitCode
from infra.repository import REPOSITORY
from infra.run_folder import RunFolder
from tests.support.patience import PATIENCE_S
from tests.system.test_training import copy_of
from tests.train.experiments.test_peer import in_process
from train.config import load_run
from train.experiments import compression, page, peer, precision, sweep, sweep_page
from train.loop.metrics import read_metrics

FILE = """
name = "options"
run = "{run}"
seeds = {seeds}
{extent}
overrides = ["dalle_fit.precision=fp32", "evaluate.samples=8"]
[arms]
base = []
"decay 1" = ["dalle_fit.weight_decay=1.0"]
"""


@pytest.mark.parametrize(
    ("figures", "message"),
    [
        ("{", "not valid JSON"),
        ("[]", "should be a valid dictionary"),
        ("{}", "settings: field required"),
        ('{"settings": {}, "arms": {"base": []}, "runs": []}', r"arms\.base: input should be a valid dictionary"),
        ('{"settings": {}, "arms": {}, "runs": [{"arm": "base"}]}', r"runs\.0\.seed: field required"),
    ],
)
def test_figures_that_are_damaged_are_refused_by_their_field(figures: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(figures)
    with pytest.raises(DataError, match=message):
        sweep._figures(tmp_path / "x.json")


def written(folder: Path, run: str, seeds: tuple[int, ...] = (0, 1), extent: str = "tokens = 1000", more: str = "") -> Path:
    path = folder / "options.toml"
    path.write_text(FILE.format(run=run, seeds=list(seeds), extent=extent) + more)
    return path


@pytest.fixture
def made(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The words of each training that was launched; none is trained. Seed 1 of the second arm diverges when it is tried the first time."""
    launched: list[list[str]] = []

    def launch(cfg: Any, run: RunFolder, kind: str, words: list[str], cores: int) -> RunFolder:
        launched.append([kind, *words])
        if "dalle_fit.weight_decay=1.0" in words and words[-1] == "run.seed=1":
            raise SystemExit(93)
        return run

    def judge(cfg: Any, run: RunFolder, cores: int) -> Any:
        decay, seed = "dalle_fit.weight_decay=1.0" in launched[-1], int(launched[-1][-1].rpartition("=")[2])
        nats = 4.0 + seed - 0.1 * decay * (1 + seed)
        figures = {"nats_per_code": nats, "nats_shuffled": nats + 0.5, "caption_gain": 0.5}
        return {"averaged": figures, "raw": figures | {"nats_per_code": 5.0}}, 123

    for name, stand_in in (("launch", launch), ("judge", judge), ("training_seconds", lambda run: 90.0)):
        monkeypatch.setattr(peer, name, stand_in)
    monkeypatch.setattr(sweep, "training_loss", lambda url: 3.0)
    return launched


@pytest.mark.parametrize(
    ("more", "extent", "said"),
    [
        ("", "", "give one of minutes and tokens"),
        ("", "tokens = 5\nminutes = 1.0", "give one of minutes and tokens"),
        ("", "tokens = 5\nhours = 1", r"hours.*(unknown|accepted)"),
        ('x = ["dalle_fit.steps=3"]', "tokens = 5", "'dalle_fit.steps=3': the sweep sets dalle_fit.steps itself, from seeds, minutes and tokens"),
        ('x = ["dalle_fit.no_such=3"]', "tokens = 5", "no_such"),
    ],
)
def test_a_wrong_file_is_refused_before_anything_is_trained(
    prepared: Path, made: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str], more: str, extent: str, said: str
) -> None:
    path = written(tmp_path, str(prepared / "tiny"), extent=extent, more=more)
    assert sweep.main([str(path), "--docs", str(tmp_path)]) == 78 and not made
    shown = capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"none.toml: cannot be read .* give a TOML file"):
        sweep.read(tmp_path / "none.toml")
    assert re.search(said, shown), shown


def test_a_seed_given_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"seeds = \[1, 1\] names a seed twice"):
        sweep.read(written(tmp_path, "x", seeds=(1, 1)))


def test_arms_differ_in_their_words_alone_and_what_is_there_is_not_trained_again(
    prepared: Path, made: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = written(tmp_path, str(prepared / "tiny"), seeds=(0,)), tmp_path / "experiments" / "sweep-options.json"
    assert sweep.main([str(path), "--docs", str(tmp_path)]) == 0
    shape = load_run(str(prepared / "tiny"), []).stream_shape()
    updates = round(1000 / (8 * shape.states))
    base, other = made
    assert (
        f"dalle_fit.steps={updates}" in base
        and base[-1] == "run.seed=0"
        and [word for word in other if word not in base] == ["dalle_fit.weight_decay=1.0"]
    )
    first = json.loads(out.read_text())["runs"]
    assert [(one["arm"], one["seed"], one["end"], one["minutes"]) for one in first] == [("base", 0, "done", 1.5), ("decay 1", 0, "done", 1.5)]
    assert all(len(one["producer"]["commit"]) >= 7 for one in first) and str(tmp_path) not in out.read_text()

    written(tmp_path, str(prepared / "tiny"), seeds=(0, 1), more='third = ["dalle_fit.beta2=0.99"]\n')
    assert sweep.main([str(path), "--docs", str(tmp_path)]) == 0
    found = json.loads(out.read_text())
    assert found["runs"][:2] == first, "what was there stays as it is"
    added = [(one["arm"], one["seed"], one["end"]) for one in found["runs"][2:]]
    assert added == [("third", 0, "done"), ("base", 1, "done"), ("decay 1", 1, "diverged"), ("third", 1, "done")] and len(made) == 6
    capsys.readouterr()
    assert sweep.main([str(path), "--docs", str(tmp_path)]) == 0 and len(made) == 6, "the one that diverged is a result, too"
    assert "| decay 1 | `dalle_fit.weight_decay=1.0` | 3.9000 | -0.1000 | -2.5% |" in (shown := capsys.readouterr().out) and "1, 1 diverged" in shown


def test_a_dry_run_says_what_would_be_trained_and_trains_nothing(
    prepared: Path, made: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, str(prepared / "tiny"), seeds=(0,), extent="minutes = 10.0")
    assert sweep.main([str(path), "--docs", str(tmp_path), "--dry-run"]) == 0 and not made and not (tmp_path / "experiments").exists()
    said = capsys.readouterr().out
    assert "base: no changes; seeds to train: 0\ndecay 1: dalle_fit.weight_decay=1.0; seeds to train: 0\n" in said
    assert said.endswith("2 trainings to go, 20 minutes of training and about 1 of probes; evaluations and starts come on top\n")
    written(tmp_path, str(prepared / "tiny"), seeds=(0,))
    assert sweep.main([str(path), "--docs", str(tmp_path)]) == 0
    capsys.readouterr()
    assert sweep.main([str(path), "--docs", str(tmp_path), "--dry-run"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "decay 1: dalle_fit.weight_decay=1.0; is there",
        "0 trainings to go; evaluations and starts come on top",
    ]


def test_figures_of_other_settings_are_not_mixed(prepared: Path, made: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = str(prepared / "tiny")
    path = written(tmp_path, url, seeds=(0,))
    sweep.main([str(path), "--docs", str(tmp_path)])
    for old, new, said in (("tokens = 1000", "tokens = 2000", "tokens: 1000 -> 2000"), ("decay=1.0", "decay=2.0", "decay 1")):
        written(tmp_path, url, seeds=(0,))
        path.write_text(path.read_text().replace(old, new))
        assert sweep.main([str(path), "--docs", str(tmp_path)]) == 78
        shown = capsys.readouterr().err
        assert "sweep-options.json holds trainings of another sweep; give another name, or remove it" in shown and said in shown
    assert len(made) == 2


def test_a_training_that_fails_ends_the_sweep_and_the_same_command_goes_on(
    prepared: Path, made: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, launch = written(tmp_path, str(prepared / "tiny"), seeds=(0,)), peer.launch

    def fails(cfg: Any, run: RunFolder, kind: str, words: list[str], cores: int) -> RunFolder:
        if made:
            raise SystemExit(75)
        return launch(cfg, run, kind, words, cores)

    monkeypatch.setattr(peer, "launch", fails)
    with pytest.raises(SystemExit) as caught:
        sweep.main([str(path), "--docs", str(tmp_path)])
    assert caught.value.code == 75 and len(made) == 1
    monkeypatch.setattr(peer, "launch", launch)
    assert sweep.main([str(path), "--docs", str(tmp_path)]) == 0 and len(made) == 2


def test_equal_time_gives_each_arm_the_updates_that_its_own_probes_found(
    prepared: Path, made: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An arm at half the rate gets half the updates, and the probes are made once for all its seeds."""
    path = written(tmp_path, str(prepared / "tiny"), extent="minutes = 2.0", seeds=(0, 2))
    rate = {True: 5.0, False: 10.0}

    def training_seconds(run: RunFolder) -> float:
        words = made[-1]
        steps = next(int(word.rpartition("=")[2]) for word in words if word.startswith("dalle_fit.steps"))
        return steps / rate["dalle_fit.weight_decay=1.0" in words]

    monkeypatch.setattr(peer, "training_seconds", training_seconds)
    monkeypatch.setattr(peer, "_precision", lambda run, given: given)
    assert sweep.main([str(path), "--docs", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "experiments" / "sweep-options.json").read_text())
    assert [kind for kind, *_ in made] == ["probe", "probe", "sweep", "probe", "probe", "sweep", "sweep", "sweep"]
    assert found["arms"]["base"]["updates"] == round(120 * 0.98 * 10) == 2 * found["arms"]["decay 1"]["updates"]
    assert [one["minutes"] for one in found["runs"]] == pytest.approx([2 * 0.98] * 4)


def test_the_error_is_that_of_the_paired_differences(prepared: Path) -> None:
    assert sweep_page.paired([0.1, 0.3]) == f"+0.2000 ± {0.1:.4f}" and sweep_page.paired([-0.5]) == "-0.5000" and sweep_page.paired([]) == "–"
    values = [0.1, 0.2, 0.6]
    spread = math.sqrt(sum((v - 0.3) ** 2 for v in values) / 2 / 3)
    assert sweep_page.paired(values) == f"+0.3000 ± {spread:.4f}"


def run_of(arm: str, seed: int, nats: float) -> dict[str, Any]:
    return {
        "arm": arm,
        "seed": seed,
        "end": "done",
        "nats_per_code": nats,
        "caption_gain": 0.25,
        "train_nats_per_code": nats - 1,
        "updates": 1000,
        "epochs": 2.5,
        "minutes": 9.8,
        "producer": {"commit": "c" * 40},
    }


def test_the_page_pairs_by_seed_and_shows_arms_without_figures(tmp_path: Path) -> None:
    """Seeds differ by a whole nat; the pairs say 0.1 all the same. A seed that the base lacks is in no pair."""
    runs = [run_of("base", 0, 2.0), run_of("base", 1, 3.0), run_of("x", 0, 1.9), run_of("x", 1, 2.9), run_of("x", 2, 9.0)]
    found = {
        "kind": "sweep",
        "name": "n",
        "base": "base",
        "settings": {"run": "pairs", "minutes": 10.0, "cores": 1, "overrides": ["a.b=1"], "layers": 6},
        "arms": {"base": {"overrides": []}, "x": {"overrides": ["a.c=2"]}, "y": {"overrides": ["a.d=3"]}},
        "runs": runs,
    }
    (tmp_path / "n.json").write_text(json.dumps(found))
    said = page.render(tmp_path)
    assert "## Sweep n, on pairs with `a.b=1`" in said and "10 minutes of training in one process" in said and "Commit cccccccccc." in said
    assert "| base | – | 2.5000 | – | – | 0.2500 | – | 1.5000 | 1,000 | 2.50 | 9.8 | 2 |" in said
    assert "| x | `a.c=2` | 4.6000 | -0.1000 ± 0.0000 | -4.2% | 0.2500 | +0.0000 ± 0.0000 | 3.6000 | 1,000 | 2.50 | 9.8 | 3 |" in said
    assert "| y | `a.d=3` | " + " | ".join("–" * 9) + " | not measured yet |" in said


def test_the_sweep_over_widths_has_each_step_size_with_and_without_the_base_and_heads_of_one_width() -> None:
    file, found = sweep.read(REPOSITORY / "train" / "experiments" / "width.toml"), set()
    for name, words in file.arms.items():
        cfg = load_run("demo", [*file.overrides, *words])
        assert cfg.dalle.width // cfg.dalle.heads == 32 and cfg.dalle.base_width in (0, 64)
        base = ", base 64" * bool(cfg.dalle.base_width)
        assert name == f"width {cfg.dalle.width}{base}, step size {cfg.dalle_fit.lr:g}"
        found.add((cfg.dalle.width, bool(base), cfg.dalle_fit.lr))
    kinds = {(64, False), (128, False), (128, True), (256, False), (256, True)}
    assert found == {(*kind, rate) for kind in kinds for rate in (0.001, 0.002, 0.004, 0.008, 0.016)}


@pytest.mark.parametrize(("name", "made_with"), [("small-data", []), ("small-data-mirrored", ["encode.crops=4", "encode.mirror=true"])])
def test_the_sweeps_that_come_with_the_code_are_some_and_their_keys_exist(name: str, made_with: list[str]) -> None:
    file = sweep.read(REPOSITORY / "train" / "experiments" / f"{name}.toml")
    assert "base" in file.arms and len(file.seeds) == 3 and any(not words for words in file.arms.values())
    for words in file.arms.values():
        load_run("demo", [*made_with, *file.overrides, *words])


def test_a_real_sweep_trains_evaluates_and_keeps_its_books(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "subprocess", SimpleNamespace(run=in_process))
    url = str(copy_of(prepared, tmp_path / "runs") / "tiny")
    path = written(tmp_path, url, seeds=(3,), extent="tokens = 1024")
    assert sweep.main([str(path), "--docs", str(tmp_path)]) == 0
    runs = json.loads((tmp_path / "experiments" / "sweep-options.json").read_text())["runs"]
    assert [one["updates"] for one in runs] == [4, 4] and all(one["minutes"] > 0 and one["epochs"] > 0 for one in runs)
    assert runs[0]["nats_per_code"] != runs[1]["nats_per_code"] and runs[0]["caption_gain"] == pytest.approx(
        runs[0]["nats_shuffled"] - runs[0]["nats_per_code"], abs=1e-4
    )
    first, second = (read_metrics(str(tmp_path / "runs" / "tiny" / "against" / f"sweep-{n}"), "dalle")["train/loss_image"] for n in (0, 1))
    assert first[0].value == second[0].value, "the same seed has the same weights and the same first batch"
    assert runs[0]["train_nats_per_code"] == pytest.approx(first[-1].value, abs=1e-4)


DONE: dict[str, Any] = {"arm": "base", "seed": 0, "end": "done", "producer": {"commit": "c"}, "updates": 5, "minutes": 1.0, "epochs": 1.0}
DONE |= {"nats_per_code": 4.0, "caption_gain": 0.1, "train_nats_per_code": 4.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nats_per_code": "4"}, r"runs\.0\.nats_per_code: input should be a valid number"),
        ({"nats_per_code": 0.0}, "a loss of codes is above 0"),
        ({"end": "lost"}, r"runs\.0\.end"),
        ({"producer": {}}, r"producer\.commit: field required"),
        ({"epochs": None}, r"runs\.0\.epochs"),
    ],
)
def test_figures_of_somebody_else_end_in_a_sentence_before_they_are_shown(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = {"settings": {}, "arms": {"base": {"overrides": []}}, "runs": [DONE]}
    (tmp_path / "x.json").write_text(json.dumps(file))
    assert sweep._figures(tmp_path / "x.json")["runs"] == [DONE]
    (tmp_path / "x.json").write_text(json.dumps(file | {"runs": [DONE | changes]}))
    with pytest.raises(DataError, match=message):
        sweep._figures(tmp_path / "x.json")
    for lacking in ("updates", "caption_gain", "producer"):
        (tmp_path / "x.json").write_text(json.dumps(file | {"runs": [{key: value for key, value in DONE.items() if key != lacking}]}))
        with pytest.raises(DataError, match=lacking):
            sweep._figures(tmp_path / "x.json")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"settings": {}, "settings": {}}', '{"settings": NaN}', "nothing", "[]", '{"runs": 1}'])
def test_files_of_any_experiment_that_are_damaged_end_in_a_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError, match=r"x\.json"):
        peer._read(tmp_path / "x.json")
    for model, read in ((compression._File, compression.stored.read), (precision._File, precision.stored.read)):
        with pytest.raises(DataError, match=r"x\.json"):
            read(str(tmp_path / "x.json"), model)


def test_a_program_ends_with_a_line_and_the_code_of_its_error_though_nobody_reads_on(tmp_path: Path) -> None:
    # In a process of its own, because the streams of this one would be exchanged for ones that outlive their readers.
    fails = "def fails(words):\n    print('begun', flush=True)\n    raise DataError(f'x.json: damaged, asked with {words}')\n"
    program = f"from infra.errors import DataError, in_a_sentence\n{fails}in_a_sentence(fails)"
    for reader in ("/dev/null", "/dev/full"):
        with open(reader, "w") as file:
            ended = subprocess.run(
                [sys.executable, "-c", program, "RUN"], cwd=REPOSITORY, stdout=file, stderr=subprocess.PIPE, text=True, timeout=PATIENCE_S
            )
        assert (ended.returncode, ended.stderr) == (ExitCode.DATA, "x.json: damaged, asked with ['RUN']\n"), reader


def test_names_and_values_of_a_foreign_sweep_are_no_markup_of_its_page() -> None:
    evil = "x|y`\n# title <script>alert(1)</script> [a](javascript:b)"
    settings = {"minutes": 1.0, "cores": 1, "run": evil, "overrides": [evil]}
    page = sweep_page.section(
        {"name": "x", "settings": settings, "base": evil, "arms": {evil: {"overrides": [evil]}}, "runs": [DONE | {"arm": evil}]}
    )
    assert "<script" not in page and "\n# title" not in page and "](javascript" not in page and "| x\\|y' " not in page
    rows = [line for line in page.splitlines() if line.startswith("|")]
    assert len(rows) == 3 and len({line.replace("\\|", "").count("|") for line in rows}) == 1, "a table of one row"
