"""Stage align: what it begins with and makes, that it goes on where it was stopped, its schedule, and what draws with it. About 40 s."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from infra import storage
from infra.errors import ConfigError, DataError, StopRequested
from infra.run_folder import RunFolder
from infra.signals import StopFlag
from infra.world import World
from tests.support.stopped_run import FIXTURE, STEPS, StopAfter, losses, run_stage
from train import attempt, launch
from train.config import DalleFit, load_run
from train.config_align import key
from train.drawing import again
from train.drawing.place import locate
from train.drawing.source import newest_weights, open_models
from train.planning import demo_time
from train.planning.flops import train_flops, update_flops
from train.report import page
from train.run import elastic, lineage, places
from train.run.stage_table import STAGES, used_by
from train.verbs import plan
from train.weights import export


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose transformer is trained to the end."""
    run = tmp_path_factory.mktemp("align") / "mine"
    shutil.copytree(FIXTURE / "run", run)
    run_stage("dalle", [str(run)])
    return run


@pytest.fixture
def mine(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "mine"))


def test_it_begins_with_the_trained_transformer_and_the_run_draws_with_what_it_makes(
    mine: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    execute = attempt.execute

    def as_an_agent(*given: Any) -> Any:
        """With several ranks, it names its process to them."""
        ended = execute(*given)
        monkeypatch.setenv("LAUNCHER_PID", "1")
        return ended

    monkeypatch.setattr(attempt, "execute", as_an_agent)
    url, run = str(mine), RunFolder(str(mine))
    before = export.describe(run.at("dalle", "export"))["content_hash"]
    storage.write_json(run.at("generate", "done.json"), {"stage": "generate", "parents": {"dalle": before}})
    assert not lineage.out_of_date(load_run(url, []), run, "generate") and locate(url).dalle == run.at("dalle", "export")
    run_stage("align", [url, "align_fit.steps=4", "align_fit.lr=1e-3", "align_fit.log_every=1"])
    assert re.search(rf"^generate: out of date \(made from dalle .*\); run 'launcher.py generate {url}'$", capfd.readouterr().out, re.M)
    cfg, about = load_run(url, []), export.describe(run.at("align", "export"))
    assert about["parents"]["dalle"] == before != about["content_hash"] and about["parents"]["dvae"] == stored_hash(run, "dvae")
    assert export.describe(run.at("dalle", "export"))["content_hash"] == before, "what it began with stays"
    assert list(losses(url, "align")) == [1, 2, 3, 4] and losses(url, "align")[1] == pytest.approx(1.5 * 0.6931, abs=1e-3), (
        "-log sigmoid(0), 1 + lambda"
    )
    assert "made from dalle " in lineage.out_of_date(cfg, run, "generate") and not lineage.out_of_date(cfg, run, "align")
    place = locate(url)
    assert (place.stage, place.dalle) == ("align", run.at("align", "export")) and newest_weights(place)[1] == about["content_hash"]
    older = locate(run.at("dalle", "export"))
    assert newest_weights(older)[1] == before and older.source == run.at("dalle", "export")
    storage.delete(run.at("align", "export", "config.json"))
    assert not lineage.out_of_date(cfg, run, "generate"), "an export that was deleted makes nothing out of date"
    body = page.build(url)
    assert "Transformer, aligned" in storage.read_text(body if body.endswith(".html") else run.at("report.html"))


def stored_hash(run: RunFolder, stage: str) -> str:
    return str(export.describe(run.at(stage, "export"))["content_hash"])


def test_a_stop_changes_no_bit(mine: Path, tmp_path: Path) -> None:
    words = ["align_fit.steps=4", "align_fit.lr=1e-3", "align_fit.log_every=1"]
    whole = str(shutil.copytree(mine, tmp_path / "whole"))
    run_stage("align", [whole, *words])
    with pytest.raises((StopRequested, launch.StageFailed)):
        run_stage("align", [str(mine), *words], StopAfter(2))
    assert not (mine / "align/done.json").exists() and locate(str(mine)).stage == "align", "its newest checkpoint draws"
    run_stage("align", [str(mine)])
    assert losses(str(mine), "align") == losses(whole, "align")
    assert stored_hash(RunFolder(str(mine)), "align") == stored_hash(RunFolder(whole), "align")


def test_only_the_stage_itself_takes_other_values_and_only_until_it_has_begun(mine: Path) -> None:
    run = RunFolder(str(mine))

    def claim(*words: str, going_on: str = "") -> None:
        places.claim(load_run(run.url, list(words)), run, "", going_on)

    with pytest.raises(
        ConfigError, match=r"To take these for 'align', which has no checkpoint yet .*: launcher.py align .*mine align_fit.steps=6 --go-on$"
    ):
        claim("align_fit.steps=6")
    with pytest.raises(StopRequested, match="before the start"):
        run_stage("align", [run.url, "align_fit.steps=4", "align_fit.ema=0.5"], StopAfter(0))
    run_stage("align", [run.url, "align_fit.steps=6", "align_fit.ema=0.9"])
    assert load_run(run.url, []).align_fit.steps == 6 == max(losses(run.url, "align")) and not (mine / "align/changes.json").exists()
    claim("align_fit.save_every=2")
    with pytest.raises(ConfigError, match=r"As a new run: launcher.py demo .*mine run.name=mine-2 align_fit.steps=0$"):
        claim("align_fit.steps=0")
    with pytest.raises(ConfigError, match=r"align_fit\.contrast_lambda: 0\.5 -> 2\.0"):
        claim("align_fit.contrast_lambda=2.0")
    with pytest.raises(ConfigError, match=r"has made 6 updates, and align_fit\.steps = 6: nothing would be left to do"):
        claim("align_fit.contrast_lambda=2.0", going_on="align")
    claim("align_fit.contrast_lambda=2.0", "align_fit.steps=8", going_on="align")
    run_stage("align", [run.url])
    assert max(losses(run.url, "align")) == 8 and len(storage.read_json(run.at("align", "changes.json"))) == 1


def test_a_transformer_that_is_trained_further_is_not_mixed_with_what_was_aligned(mine: Path, caplog: pytest.LogCaptureFixture) -> None:
    url, run, words = str(mine), RunFolder(str(mine)), ["align_fit.steps=4", "align_fit.lr=1e-3", "align_fit.log_every=1"]
    with pytest.raises((StopRequested, launch.StageFailed)):
        run_stage("align", [url, *words], StopAfter(2))
    run_stage("dalle", [url, f"dalle_fit.steps={STEPS + 2}"], go_on=True)
    with pytest.raises(
        (DataError, launch.StageFailed),
        match=r"align began with dalle .*, which is .* by now; delete .*align and run 'launcher.py align .*', which begins anew",
    ):
        run_stage("align", [url])
    shutil.rmtree(mine / "align")
    run_stage("align", [url])
    run_stage("dalle", [url, f"dalle_fit.steps={STEPS + 4}"], go_on=True)
    assert "made from dalle" in lineage.out_of_date(load_run(url, []), run, "align")
    open_models(url)
    assert "stage dalle was trained further since stage align began" in caplog.text
    places.claim(load_run(url, [f"dalle_fit.steps={STEPS + 6}"]), run, "", "dalle")
    with pytest.raises((DataError, launch.StageFailed), match=r"is to be trained further \(dalle_fit\.steps = 14\); align the result"):
        run_stage("align", [url, "align_fit.steps=5"], go_on=True)


def test_what_was_drawn_before_is_drawn_again_with_the_weights_before(mine: Path) -> None:
    run = RunFolder(str(mine))
    before = stored_hash(run, "dalle")
    run_stage("align", [run.url, "align_fit.steps=2"])
    line: Any = {"weights": {"dalle": before}}
    assert again.holding(locate(run.url), line).dalle == run.at("dalle", "export")
    line["weights"]["dalle"] = stored_hash(run, "align")
    assert again.holding(locate(run.at("dalle", "export")), line).dalle == run.at("align", "export")
    line["weights"]["dalle"] = "neither"
    assert again.holding(locate(run.url), line).dalle == locate(run.url).dalle


def test_without_a_trained_transformer_it_names_the_stage_that_is_missing(tmp_path: Path) -> None:
    run = shutil.copytree(FIXTURE / "run", tmp_path / "mine")
    with pytest.raises((DataError, launch.StageFailed), match=r"dalle/done\.json is missing: run 'launcher.py dalle .*mine' first"):
        run_stage("align", [str(run), "align_fit.steps=2"])


def test_a_run_has_it_only_if_it_is_given_updates(capsys: pytest.CaptureFixture[str]) -> None:
    without, given = (load_run("tiny", [f"align_fit.steps={steps}"]) for steps in (0, 5))
    assert "align" not in used_by(without) and used_by(without)["generate"].needs == ("dalle", "clip") and without.transformer == "dalle"
    assert list(used_by(given)) == list(STAGES) and used_by(given)["evaluate"].needs == ("align", "clip") and given.transformer == "align"
    launch.stage("align", "tiny", [], on="local", nproc=1, dry_run=True, worker=False, stop=StopFlag())
    assert "steps = 50    # preset: 0" in capsys.readouterr().out, "asked for by name, it is on"
    with pytest.raises(
        ConfigError, match=r"^align_fit.steps = 0: a run with it has no stage 'align'; give it updates, or leave the key out for the usual number.$"
    ):
        launch.stage("align", "tiny", ["align_fit.steps=0"], on="local", nproc=1, dry_run=True, worker=False, stop=StopFlag())
    launch.demo("tiny", [], on="local", nproc=1, dry_run=True, stop=StopFlag())
    assert " align " not in capsys.readouterr().out


def test_what_it_does_not_name_is_as_in_section_dalle_fit() -> None:
    cfg = load_run(
        "tiny", ["align_fit.steps=100", "dalle_fit.batch=6", "dalle_fit.clip_norm=0.5", "dalle_fit.z_loss=0.1", "dalle_fit.muon_momentum=0.9"]
    )
    fit = cfg.fit("align", "there/dalle/export")
    assert isinstance(fit, DalleFit)
    assert (fit.objective, fit.init_from, fit.steps, fit.eval_every) == ("caption_contrast", "there/dalle/export", 100, 100)
    assert (fit.batch, fit.clip_norm, fit.muon_momentum, fit.z_loss) == (6, 0.5, 0.9, 0.0)
    assert (fit.warmup_steps, fit.ema_every, fit.weight_decay) == (10, 2, 0.0) and fit.lr == pytest.approx(cfg.dalle_fit.lr / 10)
    own = load_run(
        "tiny", ["align_fit.steps=9", "align_fit.batch=2", "align_fit.accumulation=2", "align_fit.lr=0.5", "align_fit.warmup_steps=1"]
    ).fit("align")
    assert isinstance(own, DalleFit) and (own.batch, own.accumulation, own.lr, own.warmup_steps, own.ema_every) == (2, 2, 0.5, 1, 1)
    for section in ("align", "dalle"):
        with pytest.raises(
            ConfigError,
            match=rf"{section}_fit\.batch = 1: stage align \(align_fit\.steps = 9\) takes another picture's caption .*; set align_fit\.batch = 2",
        ):
            load_run("tiny", ["align_fit.steps=9", f"{section}_fit.batch=1"])
    assert [key("align", name) for name in ("lr", "max_bad_steps")] == ["align_fit.lr", "dalle_fit.max_bad_steps"] and key(
        "clip", "keep"
    ) == "clip_fit.keep"


@pytest.mark.parametrize("preset", ["12B", "120M"])
def test_asked_for_by_name_it_takes_a_hundredth_of_the_operations_that_training_took(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    launch.stage("align", preset, [], on="local", nproc=1, dry_run=True, worker=False, stop=StopFlag())
    text = capsys.readouterr().out.partition("[align_fit]")[2]
    cfg = load_run(preset, [f"align_fit.steps={text.partition('steps = ')[2].split()[0]}"])
    fit, shape = cfg.fit("align"), cfg.stream_shape()
    assert isinstance(fit, DalleFit) and fit.batch == cfg.dalle_fit.batch
    took, takes = cfg.dalle_fit.steps * train_flops(cfg.dalle, shape), fit.steps * update_flops(cfg.dalle, shape, contrasts=True)
    assert takes == pytest.approx(0.01 * took, rel=0.02)
    assert fit.steps * 0.9 < fit.ema_every / (1 - fit.ema) <= fit.steps, "the average spans all of it"


def test_fewer_ranks_make_more_micro_batches(tmp_path: Path) -> None:
    cfg, run = load_run("tiny", ["align_fit.steps=9", "dalle_fit.batch=8"]), RunFolder(str(tmp_path))
    assert elastic.adapted(cfg, run, "align", World(0, 4, 0, 4)) == cfg
    fewer = elastic.adapted(cfg, run, "align", World(0, 2, 0, 2))
    assert fewer.align_fit.accumulation == 2 and fewer.dalle_fit.accumulation == 1


def test_plan_and_the_projected_time_count_it(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["align_fit.steps=500", "dalle_fit.activation_checkpointing=true"]
    plan.main("120M", words, nodes=1, gpus=8, memory=0, gpu="H100-80GB", tokens=0, rank=0)
    said = capsys.readouterr().out
    assert "stage align          500 updates of " in said and "captions contrasted  each sample under two captions" in said
    room = float(re.findall(r"stage align .*; ([\d.]+) GB on each GPU", said)[0]) - 1
    with pytest.raises(ConfigError, match=r"stage align needs .* under two captions: .*align_fit\.accumulation="):
        plan.main("120M", words, nodes=1, gpus=8, memory=room / 0.92, gpu="H100-80GB", tokens=0, rank=0)
    with pytest.raises(ConfigError, match=r"^align_fit\.batch = 3 does not divide over 8 processes x align_fit\.accumulation"):
        plan.main("120M", [*words, "align_fit.batch=3"], nodes=1, gpus=8, memory=0, gpu="H100-80GB", tokens=0, rank=0)
    demo = load_run("demo", ["align_fit.steps=50"])
    found = demo_time.estimate(demo, {"dalle": 82.0}, 5.0, {"dalle": 0}, ["align"])
    assert found["align"] == pytest.approx(10 + 50 * 16 * 8 / 3 / 82, rel=0.3)
