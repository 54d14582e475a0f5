"""A run goes on: longer, with another step size or batch, from its newest checkpoint on; what was made from older weights is made again or named."""

from __future__ import annotations

import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from infra import storage
from infra.config import to_json
from infra.errors import ConfigError, DataError, ExitCode
from infra.run_folder import RunFolder
from infra.signals import StopFlag
from tests.support.patience import PATIENCE_S
from tests.support.root import ROOT
from tests.support.stopped_run import FIXTURE, STEPS, STOPPED, StopAfter, losses, run_stage
from train import launch
from train.config import load_run
from train.loop.metrics import read_metrics
from train.loop.plateau import Plateau
from train.report.view import RunView
from train.run import change_points, lineage, places
from train.verbs import status


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    shutil.copytree(FIXTURE / "run", tmp_path / "run")
    return RunFolder(str(tmp_path / "run"))


def go_on(run: RunFolder, stage: str, *words: str, stop: StopFlag | None = None, on: str = "local") -> None:
    launch.stage(
        stage,
        run.url,
        list(words),
        on=on,
        nproc=int(on == "local"),
        dry_run=False,
        worker=False,
        stop=StopFlag() if stop is None else stop,
        go_on=True,
    )


def checkpoint_files(run: RunFolder, stage: str, step: int) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(run.at(stage, "checkpoints", f"step-{step:08d}")).iterdir()}


def meta(step: int, config: dict[str, Any], **facts: Any) -> dict[str, Any]:
    return {"step": step, "config": config} | facts


def configuration(*words: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(to_json(load_run("tiny", list(words))))
    return found


@pytest.mark.parametrize(("how", "curve"), [("recomputed", (0, 60)), ("kept", (0, 20)), ("restarted", (15, 60))])
def test_a_change_point_lies_where_the_run_goes_on_and_says_what_its_schedule_spans(how: str, curve: tuple[int, int]) -> None:
    old, new = configuration(), configuration("dalle_fit.steps=60", "dalle_fit.lr=1e-3", "dalle_fit.log_every=7")
    (point,) = points = change_points.continued(meta(15, old), new, "dalle", how)
    assert point["step"] == 15 and point["changed"] == {"dalle_fit.lr": [3e-3, 1e-3], "dalle_fit.steps": [20, 60]}
    assert change_points.curve(points, 60) == change_points.Curve(*curve)
    assert change_points.continued(meta(30, new, changes=points), new, "dalle", how) == points, "later restarts add none"
    assert [each["step"] for each in change_points.continued(meta(10, old), new, "dalle", how)] == [10], "a fall back moves it"
    assert change_points.continued(meta(15, old), new, "clip", how) == []


def test_a_change_after_a_restart_keeps_where_the_curve_begins() -> None:
    old, new = configuration(), configuration("dalle_fit.steps=60")
    points = change_points.continued(meta(15, old), new, "dalle", "restarted")
    later = configuration("dalle_fit.steps=90")
    assert change_points.curve(change_points.continued(meta(40, new, changes=points), later, "dalle", "recomputed"), 90) == change_points.Curve(
        15, 90
    )


def test_halvings_of_a_restarted_schedule_begin_anew_and_those_by_hand_stay() -> None:
    found = Plateau(window=2, patience=1, threshold=0.0, halvings=5, warmup=1)
    for step in range(1, 8):
        found.observe(step, 1.0)
    assert found.halved
    found.restart(7)
    assert not found.halved and found.warmup == 8
    by_hand = Plateau(2, 1, 0.0, 5, 1, at=(3,))
    by_hand.observe(3, 1.0)
    by_hand.restart(5)
    assert by_hand.halved == [3]


def test_another_value_is_refused_with_the_command_that_goes_on_or_that_makes_a_new_run(run: RunFolder) -> None:
    with pytest.raises(ConfigError, match=rf"(?s)dalle_fit\.lr: 0\.003 -> 0\.001\n.*launcher\.py dalle {run.url} dalle_fit\.lr=0\.001 --go-on"):
        run_stage("dalle", [run.url, "dalle_fit.lr=1e-3"])
    for words in (["dalle.layers=4"], ["dalle.layers=4", "dalle_fit.lr=1e-3"]):
        with pytest.raises(ConfigError, match=rf"As a new run: launcher\.py demo {run.url} run\.name=run-2 dalle\.layers=4"):
            go_on(run, "dalle", *words)
    with pytest.raises(ConfigError, match=r"(?s)dalle_fit\.lr: .*launcher\.py dalle .*--go-on"):
        go_on(run, "clip", "dalle_fit.lr=1e-3")
    with pytest.raises(
        ConfigError, match=rf"To go on with these from the newest checkpoint on, after update {STOPPED}, as a recorded change point: launcher"
    ):
        run_stage("dalle", [run.url, "dalle_fit.lr=1e-3"])
    with pytest.raises(ConfigError, match="--go-on: 'encode' does not train; a change point belongs to dvae, dalle, align, clip"):
        go_on(run, "encode")
    with pytest.raises(
        ConfigError, match=rf"has made {STOPPED} updates, and dalle_fit\.steps = 3: nothing would be left .* set more dalle_fit\.steps"
    ):
        go_on(run, "dalle", "dalle_fit.steps=3")
    with pytest.raises(ConfigError, match=r"holds weights and no checkpoint .* nothing to go on from"):
        go_on(run, "dvae", "dvae_fit.steps=30")
    assert not storage.exists(run.at("dalle", "changes.json")) and "changes" not in storage.read_json(run.at("provenance.json"))


def test_where_there_is_no_checkpoint_none_is_named_and_the_command_begins_with_the_new_values(run: RunFolder) -> None:
    shutil.rmtree(run.at("dalle"))
    with pytest.raises(
        ConfigError, match=r"To take these for 'dalle', which has no checkpoint yet and begins with them: launcher\.py dalle "
    ) as caught:
        run_stage("dalle", [run.url, "dalle_fit.lr=1e-3", "dalle_fit.steps=1"])
    assert "newest checkpoint" not in str(caught.value)
    command = shlex.split(str(caught.value).rpartition("launcher.py ")[2])
    go_on(run, "dalle", *command[2:-1])
    assert storage.read_json(run.at("dalle", "done.json"))["updates"] == 1 and not storage.exists(run.at("dalle", "changes.json"))


def test_a_finished_run_goes_on_longer_and_all_before_stays_as_it_was(run: RunFolder, tmp_path: Path) -> None:
    run_stage("clip", [run.url])
    before, kept = losses(run.url, "clip"), checkpoint_files(run, "clip", STEPS)
    whole = RunFolder(str(tmp_path / "whole"))
    shutil.copytree(run.url, whole.url)
    words = ("clip_fit.steps=12", "clip_fit.lr=1e-3", "clip_fit.batch=6", "clip_fit.keep=5")
    go_on(whole, "clip", *words)
    after = losses(whole.url, "clip")
    assert {step: loss for step, loss in after.items() if step <= STEPS} == before and max(after) == 12
    assert checkpoint_files(whole, "clip", STEPS) == kept
    (point,) = storage.read_json(whole.at("clip", "changes.json"))
    assert point["step"] == STEPS and set(point["changed"]) == {"clip_fit.steps", "clip_fit.lr", "clip_fit.batch"}
    assert storage.read_json(whole.at("clip", "done.json"))["updates"] == 12
    rates = {point.step: point.value for point in read_metrics(whole.url, "clip")["optim/lr"]}
    assert rates[9] > rates[8] and rates[12] < rates[9], "recomputed: the cosine over twelve updates, of the new peak"
    run_stage("clip", [whole.url])  # finished already
    assert losses(whole.url, "clip") == after
    _stopped(run, words)
    run_stage("clip", [run.url])
    assert losses(run.url, "clip") == after, "stopped after the change point, it goes on as if it had not been"
    assert len(storage.read_json(run.at("clip", "changes.json"))) == 1


@pytest.mark.parametrize("on", ["slurm", "k8s"])
def test_a_job_goes_on_as_this_machine_does(on: str, run: RunFolder, tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job gets nothing but the run folder: what it goes on with stands there, and its change point lies where its checkpoint does."""
    words = ("clip_fit.steps=10", "clip_fit.lr=1e-3")
    here, there = RunFolder(str(tmp_path / "here")), RunFolder(f"{s3}/there" if on == "k8s" else str(tmp_path / "there"))
    shutil.copytree(run.url, here.url)
    storage.upload_folder(Path(run.url), there.url)
    go_on(here, "clip", *words)
    tools = _scheduler(on, tmp_path, monkeypatch)
    (tmp_path / "busy").touch()
    with pytest.raises(ConfigError, match=r"--go-on: (job 7 of 'clip' is in the queue|the job there-\S*clip is in the cluster) with other values"):
        go_on(there, "clip", *words, *tools, on=on)
    assert there.stored() == run.stored(), "refused before anything is written"
    (tmp_path / "busy").unlink()
    go_on(there, "clip", *words, *tools, on=on)
    sent = (tmp_path / "calls").read_text().splitlines()
    assert sent[-1].split()[0] == ("sbatch" if on == "slurm" else "apply") and "go-on" not in sent[-1]
    run_stage("clip", [there.url])
    assert losses(there.url, "clip") == losses(here.url, "clip")
    (ours,), (theirs,) = (storage.read_json(each.at("clip", "changes.json")) for each in (here, there))
    assert {**ours, "time": 0} == {**theirs, "time": 0} and set(ours["changed"]) == {"clip_fit.steps", "clip_fit.lr"}


def _scheduler(on: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Commands that write down what they get. A job is there while the file 'busy' is."""
    busy = f"[ -e {tmp_path}/busy ]"
    commands = {
        "squeue": f"{busy} && echo 7; exit 0",
        "sbatch": "echo 8",
        "kubectl": f'case "$1" in get) {busy} && echo "{{\\"metadata\\":{{}}}}"; exit 0;; kustomize) printf "kind: JobSet\\nmetadata:\\n  labels:\\n    stage: clip\\n";; apply) cat > /dev/null; echo applied;; esac',
    }
    (tmp_path / "bin").mkdir()
    for name, script in commands.items():
        shown = "$*" if name == "kubectl" else f"{name} $*"
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\necho "{shown}" >> {tmp_path}/calls\n{script}\n')
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    return [f"cluster.image=registry/name@sha256:{'a' * 64}"] if on == "k8s" else []


def test_another_batch_on_two_processes_goes_on_as_on_one(run: RunFolder, tmp_path: Path) -> None:
    """Of the transformer: a contrastive loss is taken over what one micro-batch holds, which is less where one process takes two of them."""
    words = ("dalle_fit.steps=11", "dalle_fit.batch=6", "dalle_fit.keep=5", "dalle_fit.save_every=1")
    alone = RunFolder(str(tmp_path / "alone"))
    shutil.copytree(run.url, alone.url)
    go_on(alone, "dalle", *words)
    command = [sys.executable, str(ROOT / "launcher.py"), "dalle", run.url, *words, "--go-on", "--nproc", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = losses(alone.url, "dalle"), losses(run.url, "dalle")
    assert max(one) == 11 and [two[step] for step in sorted(two)] == pytest.approx([one[step] for step in sorted(one)], rel=1e-4)
    ends = [storage.read_json(each.at("dalle", "checkpoints", "step-00000011", "meta.json")) for each in (alone, run)]
    assert ends[0]["loader"] == ends[1]["loader"] and [len(end["changes"]) for end in ends] == [1, 1]


def test_a_run_that_diverged_goes_on_from_its_last_good_checkpoint_with_a_smaller_step_size(run: RunFolder) -> None:
    """By the command that the message of the divergence ends with."""
    words = ("clip_fit.steps=40", "clip_fit.lr=1e30", "clip_fit.max_bad_steps=2")
    with pytest.raises(launch.StageFailed, match="consecutive updates") as caught:
        go_on(run, "clip", *words)
    assert caught.value.exit_code == ExitCode.DIVERGED
    command = shlex.split(str(caught.value).rpartition("launcher.py ")[2])
    assert command[:2] == ["clip", run.url] and command[-1] == "--go-on" and command[2].startswith("clip_fit.lr=5e+29")
    good = max(int(name.removeprefix("step-")) for name in os.listdir(run.at("clip", "checkpoints")))
    kept = checkpoint_files(run, "clip", good)
    with pytest.raises(ConfigError, match=r"clip_fit\.lr: .*"):
        run_stage("clip", [run.url, "clip_fit.lr=1e-3"])
    go_on(run, "clip", "clip_fit.lr=1e-3", f"clip_fit.steps={good + 2}")
    points = storage.read_json(run.at("clip", "changes.json"))
    assert points[-1]["step"] == good and set(points[-1]["changed"]) == {"clip_fit.lr", "clip_fit.steps"}
    assert checkpoint_files(run, "clip", good) == kept and storage.read_json(run.at("clip", "done.json"))["updates"] == good + 2
    assert all(math.isfinite(loss) for step, loss in losses(run.url, "clip").items() if step > good)


def _stopped(run: RunFolder, words: tuple[str, ...]) -> None:
    with pytest.raises(launch.StageFailed, match="stopped by a signal after update 10"):
        go_on(run, "clip", *words, stop=StopAfter(2))


def test_curves_and_status_show_a_change_point(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    for other in ("dvae", "clip"):
        shutil.rmtree(run.at(other, "metrics"))
    points = [{"step": 7, "changed": {"dalle_fit.lr": [3e-3, 1e-3]}, "schedule": "kept", "curve": [0, 8], "time": 0.0, "commit": "c"}]
    plain = str(section_curves(run))
    storage.write_json(run.at("dalle", "changes.json"), points)
    said = "from update 7 on: dalle_fit.lr: 0.003 -&gt; 0.001; schedule kept"
    marked = str(section_curves(run))
    assert said not in plain and said in marked and marked.count("stroke-dasharray") > plain.count("stroke-dasharray")
    status.main([run.url])
    assert "dalle: from update 7 on: dalle_fit.lr: 0.003 -> 0.001; schedule kept" in capsys.readouterr().out


def section_curves(run: RunFolder) -> str:
    from train.report import section_curves as module

    found = module.section(RunView(run.url))
    assert found is not None
    return found.body


def newer(run: RunFolder, stage: str) -> None:
    """The stage's export, as if it had been trained further."""
    url = run.at(stage, "export", "config.json")
    storage.write_json(url, storage.read_json(url) | {"content_hash": "f" * 64})


def test_what_older_weights_made_is_out_of_date_and_named_with_its_command(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    cfg, old = load_run(run.url, []), storage.read_json(run.at("dvae", "export", "config.json"))["content_hash"]
    run.finish("dalle", parents={"dvae": old}, updates=STEPS, seconds=1.0)
    run.finish("generate", parents={"dvae": old}, seconds=1.0)
    assert not any(lineage.out_of_date(cfg, run, stage) for stage in ("encode", "dalle", "generate"))
    newer(run, "dvae")
    words = f"made from dvae {old[:12]}, the run has ffffffffffff"
    assert [lineage.out_of_date(cfg, run, stage) for stage in ("encode", "dalle", "generate", "tokenizer")] == [words, words, words, ""]
    status.main([run.url])
    said = capsys.readouterr().out
    assert said.count("out of date, made from dvae") == 3
    assert f"run 'launcher.py encode {run.url}'" in said and f"delete {run.url}/dalle and run 'launcher.py dalle {run.url}'" in said
    assert RunView(run.url).out_of_date == {stage: words for stage in ("encode", "dalle", "generate")}
    with pytest.raises(DataError, match=rf"dalle is out of date: made from dvae .*delete {run.url}/dalle and run 'launcher\.py dalle {run.url}'"):
        run_stage("dalle", [run.url])
    assert {"encode", "dalle", "generate"} <= set(lineage.waiting(cfg, run)), "a chain of jobs does them too"
    shutil.rmtree(run.at("dvae", "export"))
    assert not lineage.out_of_date(cfg, run, "encode"), "an export that was deleted makes nothing old"


def test_a_stage_that_goes_on_is_not_finished_and_pulls_those_after_it(run: RunFolder) -> None:
    run.finish("dalle", parents={}, updates=STEPS, seconds=1.0)
    for stage in ("generate", "evaluate"):
        run.finish(stage, parents={}, seconds=1.0)
    cfg, longer = load_run(run.url, []), load_run(run.url, ["dalle_fit.steps=9"])
    assert places.finished(cfg, run, "dalle") and not places.finished(longer, run, "dalle")
    assert lineage.waiting(cfg, run) == ["clip", "generate", "evaluate", "report"]
    assert lineage.waiting(longer, run) == ["dalle", "clip", "generate", "evaluate", "report"]
    assert places.finished(load_run(run.url, ["dvae_fit.steps=99"]), run, "dvae"), "weights without a checkpoint count as trained to the end"


def test_codes_of_an_older_dvae_are_made_again(run: RunFolder, capfd: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run.at("dvae"))
    shutil.copytree(FIXTURE / "dvae-stopped", run.at("dvae"))
    go_on(run, "dvae", "dvae_fit.steps=6", "dvae_fit.lr=1e-2")
    first = storage.read_json(run.at("encode", "done.json"))["parents"]["dvae"]
    run_stage("encode", [run.url])
    assert "encode: out of date (made from dvae" in capfd.readouterr().out
    made = storage.read_json(run.at("encode", "done.json"))["parents"]["dvae"]
    assert made != first and made == storage.read_json(run.at("dvae", "export", "config.json"))["content_hash"]
    run_stage("encode", [run.url])
    assert "encode: finished already" in capfd.readouterr().out
