"""Whole stages on the tiny preset: exact resume, equal losses on any number of ranks, golden losses, the pipeline on S3."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from infra import storage
from infra.digests import digest
from infra.errors import ConfigError, DataError, ExitCode, StopRequested
from infra.run_folder import RunFolder, commit
from infra.signals import StopFlag
from infra.world import World
from tests.support.ranks import run_in_ranks
from tests.support.root import ROOT
from tests.support.stopped_run import StopAfter
from train import launch
from train.config import RunConfig, load_run
from train.loop.metrics import read_metrics
from train.run.stage_table import STAGES, TRAINED, used_by
from train.stages import report as report_stage
from train.verbs import export as export_verb

GOLDEN = ROOT / "tests" / "golden"
# fp32: bf16 rounds differently on other processors, and the choice between them is a machine's.
ALWAYS = tuple(name for name in TRAINED if not STAGES[name].optional)
BASE = [f"{stage}_fit.{word}" for word in ("precision=fp32", "steps=10") for stage in ALWAYS]
PREPARED = ("prepare", "tokenizer", "dvae", "encode")


def run_stage(name: str, root: str, overrides: list[str], stop: StopFlag | None = None) -> None:
    words = [f"run.root={root}", *BASE, *overrides]
    launch.stage(name, "tiny", words, on="local", nproc=1, dry_run=False, worker=False, stop=StopFlag() if stop is None else stop)


def copy_of(prepared: Path, tmp_path: Path, *, without: str = "", changes: dict[str, Any] | None = None) -> Path:
    """The prepared run in another root, with another configuration if asked for, and without a stage."""
    shutil.copytree(prepared / "tiny", tmp_path / "tiny")
    if without:
        shutil.rmtree(tmp_path / "tiny" / without)
    config = json.loads((tmp_path / "tiny" / "config.json").read_text())
    config["run"]["root"] = str(tmp_path)
    for name, value in (changes or {}).items():
        section, key = name.split(".")
        config[section][key] = value
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(config))
    return tmp_path


def losses(root: Path, stage: str) -> list[float]:
    return [point.value for point in read_metrics(str(root / "tiny"), stage)["train/loss"]]


def fingerprint(root: Path, stage: str) -> str:
    (folder,) = (root / "tiny" / stage / "checkpoints").glob("step-00000010")
    return storage.sha256_file(folder / "rank-0.bin")


@pytest.mark.parametrize("stage", ALWAYS)
def test_four_updates_a_stop_and_six_more_equal_ten_bit_for_bit(prepared: Path, tmp_path: Path, stage: str) -> None:
    whole = copy_of(prepared, tmp_path / "whole", without=stage if stage == "dvae" else "")
    broken = copy_of(prepared, tmp_path / "broken", without=stage if stage == "dvae" else "")
    run_stage(stage, str(whole), [])
    with pytest.raises(launch.StageFailed, match="stopped by a signal after update 4 of 10; saved") as caught:
        run_stage(stage, str(broken), [], StopAfter(4))
    assert caught.value.exit_code == ExitCode.REQUEUE
    run_stage(stage, str(broken), [])
    assert len(losses(broken, stage)) == 10
    assert losses(broken, stage) == losses(whole, stage)
    assert stage == "clip" or read_metrics(str(whole / "tiny"), stage)["perf/mfu"][-1].value > 0
    assert fingerprint(broken, stage) == fingerprint(whole, stage)
    ours, theirs = (json.loads((root / "tiny" / stage / "export" / "config.json").read_text())["content_hash"] for root in (broken, whole))
    assert ours == theirs


def test_a_run_goes_on_with_another_zero_stage_and_not_with_another_step_size(prepared: Path, tmp_path: Path) -> None:
    whole, broken = (copy_of(prepared, tmp_path / name) for name in ("whole", "broken"))
    run_stage("dalle", str(whole), [])
    with pytest.raises(launch.StageFailed, match="stopped by a signal after update 4"):
        run_stage("dalle", str(broken), [], StopAfter(4))
    with pytest.raises(ConfigError, match=r"another configuration[^$]*dalle_fit\.lr: ") as caught:
        run_stage("dalle", str(broken), ["zero.stage=3", "dalle_fit.lr=1"])
    assert "zero.stage" not in str(caught.value)
    run_stage("dalle", str(broken), ["zero.stage=3", "dalle_fit.keep=5"])
    assert losses(broken, "dalle")[:4] == losses(whole, "dalle")[:4] and losses(broken, "dalle") == pytest.approx(losses(whole, "dalle"), rel=1e-5)
    assert json.loads((broken / "tiny" / "dalle" / "deepspeed.json").read_text())["zero_optimization"]["stage"] == 3
    config, provenance = (json.loads((broken / "tiny" / name).read_text()) for name in ("config.json", "provenance.json"))
    assert config["zero"]["stage"] == 3 and [change["changed"] for change in provenance["changes"]] == [
        ["dalle_fit.keep: 2 -> 5", "zero.stage: 2 -> 3"]
    ]


def resume_in_ranks(world: World, whole: str, broken: str) -> None:
    for root, stop in ((whole, StopFlag()), (broken, StopAfter(4)), (broken, StopFlag())):
        run = RunFolder(f"{root}/tiny")
        try:
            STAGES["dvae"].function()(load_run(run.config_url, []), run, world, stop)
        except StopRequested:
            assert isinstance(stop, StopAfter)


def test_four_ranks_resume_bit_for_bit(prepared: Path, tmp_path: Path) -> None:
    """From three ranks on the order of a sum matters: an attempt's first update must add up in the order of all others."""
    whole, broken = (copy_of(prepared, tmp_path / name, without="dvae") for name in ("whole", "broken"))
    run_in_ranks(resume_in_ranks, 4, str(whole), str(broken))
    assert losses(broken, "dvae") == losses(whole, "dvae")
    ours, theirs = (json.loads((root / "tiny" / "dvae" / "export" / "config.json").read_text())["content_hash"] for root in (broken, whole))
    assert ours == theirs


@pytest.mark.parametrize("stage", ALWAYS)
def test_tiny_losses_are_the_golden_ones(prepared: Path, tmp_path: Path, stage: str) -> None:
    root = copy_of(prepared, tmp_path)
    if stage != "dvae":
        run_stage(stage, str(root), [])
    golden = [float(line) for line in (GOLDEN / f"tiny-{stage}.txt").read_text().split()]
    assert len(golden) == 10
    assert losses(root, stage) == pytest.approx(golden, rel=2e-3, abs=2e-4), "numbers changed: say why, and show the curves, before new golden losses"


def train_in_ranks(world: World, root: str, stages: tuple[str, ...], changes: dict[str, Any]) -> dict[str, list[float]]:
    run = RunFolder(f"{root}/tiny")
    if world.is_main:
        config = storage.read_json(run.config_url)
        for name, value in changes.items():
            section, key = name.split(".")
            config[section][key] = value
        storage.write_json(run.config_url, config)
    import torch.distributed as dist

    dist.barrier()
    cfg = load_run(run.config_url, [])
    for stage in stages:
        STAGES[stage].function()(cfg, run, world, StopFlag())
    return {stage: losses(Path(root), stage) for stage in stages} if world.is_main else {}


def test_two_ranks_with_two_micro_batches_give_the_losses_of_one_process(prepared: Path, tmp_path: Path) -> None:
    """Captions differ in length, so equal text losses need denominators over all ranks and micro-batches."""
    alone = copy_of(prepared, tmp_path / "alone", without="dvae")
    together = copy_of(prepared, tmp_path / "together", without="dvae")
    changes = {"dvae_fit.accumulation": 2, "dalle_fit.accumulation": 2}
    shared = run_in_ranks(train_in_ranks, 2, str(together), ("dvae", "clip"), changes)[0]
    for stage in ("dvae", "clip"):
        run_stage(stage, str(alone), [])
        assert shared[stage] == pytest.approx(losses(alone, stage), rel=1e-4, abs=1e-5), stage
    # dalle reads codes, which a retrained dVAE would refuse: it goes on from the prepared run
    alone, together = (copy_of(prepared, tmp_path / name) for name in ("alone-dalle", "together-dalle"))
    run_stage("dalle", str(alone), [])
    shared = run_in_ranks(train_in_ranks, 2, str(together), ("dalle",), changes)[0]
    assert shared["dalle"] == pytest.approx(losses(alone, "dalle"), rel=1e-4)
    text = [point.value for point in read_metrics(str(alone / "tiny"), "dalle")["train/loss_text"]]
    assert text == pytest.approx([point.value for point in read_metrics(str(together / "tiny"), "dalle")["train/loss_text"]], rel=1e-4)


def encode_in_ranks(world: World, root: str) -> None:
    run = RunFolder(f"{root}/tiny")
    STAGES["encode"].function()(load_run(run.config_url, []), run, world, StopFlag())


def test_codes_are_the_same_bytes_on_one_rank_and_on_three_and_a_finished_part_is_not_done_again(prepared: Path, tmp_path: Path) -> None:
    root = copy_of(prepared, tmp_path)
    codes = root / "tiny" / "codes"
    before = {path.relative_to(codes): path.read_bytes() for path in sorted(codes.rglob("*")) if path.is_file() and path.name != "manifest.json"}
    assert any(path.suffix == ".mds" for path in before)
    manifest = json.loads((codes / "crop-0" / "train" / "manifest.json").read_text())
    parts = sorted(codes.rglob("part-*"))
    kept = next(part for part in parts if (part / "shard.00000.mds").exists())
    stamp = (kept / "shard.00000.mds").stat().st_mtime_ns
    for part in parts:
        if part != kept:
            shutil.rmtree(part)
    for path in [*codes.rglob("manifest.json"), *codes.rglob("crop-0/*/index.json"), root / "tiny" / "encode" / "done.json"]:
        path.unlink()
    run_in_ranks(encode_in_ranks, 3, str(root))
    after = {path.relative_to(codes): path.read_bytes() for path in sorted(codes.rglob("*")) if path.is_file() and path.name != "manifest.json"}
    assert before == after
    assert json.loads((codes / "crop-0" / "train" / "manifest.json").read_text())["content_hash"] == manifest["content_hash"]
    assert (kept / "shard.00000.mds").stat().st_mtime_ns == stamp


def test_a_stop_between_parts_keeps_what_is_finished(prepared: Path, tmp_path: Path) -> None:
    root = copy_of(prepared, tmp_path, without="encode")
    codes = root / "tiny" / "codes"
    shutil.rmtree(codes)

    class AfterAPart(StopFlag):
        """A signal that comes when a part is finished."""

        def __bool__(self) -> bool:
            if any(codes.rglob("done.json")):
                self.received = signal.SIGUSR2
            return self.received is not None

    with pytest.raises(launch.StageFailed, match="finished parts are kept") as caught:
        run_stage("encode", str(root), [], AfterAPart())
    assert caught.value.exit_code == ExitCode.REQUEUE
    kept = len(list(codes.rglob("done.json")))
    with pytest.raises(StopRequested, match="before the start"):
        run_stage("encode", str(root), [], StopAfter(0))
    run_stage("encode", str(root), [])
    assert 1 <= kept < len(list(codes.rglob("done.json")))
    for split in ("train", "validation"):
        manifests = [json.loads((place / "tiny" / "codes" / "crop-0" / split / "manifest.json").read_text()) for place in (prepared, root)]
        assert manifests[0]["content_hash"] == manifests[1]["content_hash"]


def test_codes_of_another_dvae_are_refused_with_what_to_do(prepared: Path, tmp_path: Path) -> None:
    root = copy_of(prepared, tmp_path)
    export = root / "tiny" / "dvae" / "export" / "config.json"
    description = json.loads(export.read_text())
    export.write_text(json.dumps(description | {"content_hash": "0" * 64}))
    with pytest.raises(launch.StageFailed, match=r"dvae .*run") as caught:
        run_stage("dalle", str(root), [])
    assert caught.value.exit_code == ExitCode.DATA


def test_pictures_are_drawn_from_an_export_alone_and_not_with_models_that_do_not_belong_together(prepared: Path, tmp_path: Path) -> None:
    root = copy_of(prepared, tmp_path)
    for stage in ("dalle", "clip"):
        run_stage(stage, str(root), [])
    dalle = root / "tiny" / "dalle"
    shutil.rmtree(dalle / "export")
    export_verb.main(str(root / "tiny"), "dalle", "average", 0, "")
    for path in dalle.iterdir():
        if path.name != "export":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    run_stage("generate", str(root), [])
    assert (root / "tiny" / "generate" / "grid.png").stat().st_size > 0
    shutil.rmtree(root / "tiny" / "generate")
    export = dalle / "export" / "config.json"
    description = json.loads(export.read_text())
    description["parents"]["dvae"] = "0" * 64
    export.write_text(json.dumps(description))
    with pytest.raises(
        launch.StageFailed, match=r"dalle/export was trained with dvae 000000000000, this run has dvae .*run 'launcher\.py dalle"
    ) as caught:
        run_stage("generate", str(root), [])
    assert caught.value.exit_code == ExitCode.DATA


@pytest.mark.parametrize("kept", [None, -100], ids=["a bit", "cut short"])
def test_a_damaged_export_is_refused(prepared: Path, tmp_path: Path, kept: int | None) -> None:
    root = copy_of(prepared, tmp_path, without="encode")
    weights = root / "tiny" / "dvae" / "export" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data[:kept])
    with pytest.raises(launch.StageFailed, match=r"model\.safetensors is damaged") as caught:
        run_stage("encode", str(root), [])
    assert caught.value.exit_code == ExitCode.DATA


def test_weights_of_another_shape_are_refused_by_name(prepared: Path) -> None:
    import torch

    from infra.errors import CheckpointError
    from train.run.inputs import open_dvae

    cfg = load_run("tiny", [f"run.root={prepared}", "dvae.vocab=64"])
    with pytest.raises(CheckpointError, match=r"weights of another model: '.*' is \[.*\], this configuration builds \[.*\]"):
        open_dvae(cfg, RunFolder(f"{prepared}/tiny"), torch.device("cpu"))


def test_a_dvae_that_uses_too_few_codes_is_not_encoded_with(prepared: Path, tmp_path: Path) -> None:
    root = copy_of(prepared, tmp_path, without="encode", changes={"encode.min_code_use": 0.99})
    with pytest.raises(launch.StageFailed, match=r"below encode\.min_code_use = 99%"):
        run_stage("encode", str(root), ["encode.min_code_use=0.99"])


def test_a_checkpoint_of_another_model_names_the_first_difference(prepared: Path, tmp_path: Path) -> None:
    root = copy_of(prepared, tmp_path)
    (root / "tiny" / "dvae" / "done.json").unlink()
    for path in (root / "tiny" / "dvae" / "checkpoints").glob("*/meta.json"):
        meta = json.loads(path.read_text())
        meta["shapes"]["encoder.blocks.input.w"] = [1]
        del meta["sha256"]
        path.write_text(json.dumps(meta | {"sha256": digest(meta)}))
    with pytest.raises(launch.StageFailed, match=r"of another model; first difference: encoder\.blocks\.input\.w"):
        run_stage("dvae", str(root), [])


def test_a_missing_variable_of_the_world_is_an_error_and_not_rank_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="RANK is not set"):
        World.from_env()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "one")
    with pytest.raises(ConfigError, match=r"RANK = 'one': accepted is a whole number .*Ranks are started by"):
        World.from_env()


def test_probing_for_the_precision_leaves_the_generator_of_the_weights_alone(tmp_path: Path) -> None:
    """Only the first attempt of a run probes: a later one must start from the same weights."""
    import torch

    from train.ranks.device import branch_dtype

    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    branch_dtype("auto", torch.device("cpu"), RunFolder(str(tmp_path)), World.single())
    assert (tmp_path / "precision.json").exists()
    assert torch.equal(torch.rand(3), expected)


def test_launchers_that_probe_at_the_same_time_compute_as_the_first_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from train.ranks import device

    run = RunFolder(str(tmp_path))

    def overtaken(seconds: float) -> dict[str, float]:
        storage.write_json(run.at("precision.json"), {"precision": "fp32"})
        return {"fp32": 1.0, "bf16": 9.0}

    monkeypatch.setattr(device, "probe", overtaken)
    assert device.branch_dtype("auto", torch.device("cpu"), run, World.single()) == torch.float32
    assert storage.read_json(run.at("precision.json")) == {"precision": "fp32"}


def test_outputs_name_the_commit_that_runs_and_not_the_one_checked_out_since(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stage(cfg: RunConfig, run: RunFolder, world: World, stop: StopFlag) -> None:
        monkeypatch.setattr(subprocess, "run", lambda *given, **named: subprocess.CompletedProcess(given, 0, "another commit\n"))
        run.finish("report")

    monkeypatch.setattr(report_stage, "run", stage)
    commit.cache_clear()
    running = commit()
    commit.cache_clear()
    run_stage("report", str(tmp_path), [])
    assert json.loads((tmp_path / "tiny/report/done.json").read_text())["commit"] == running != "another commit"


def test_stages_need_those_before_them(tmp_path: Path) -> None:
    from train.run.places import require

    with pytest.raises(DataError, match=r"prepare/done\.json is missing: run 'launcher\.py prepare"):
        require(RunFolder(str(tmp_path)), "prepare")


def test_the_whole_pipeline_runs_on_s3(s3: str) -> None:
    for name in used_by(load_run("tiny", [])):
        run_stage(name, s3, ["generate.num_captions=2"])
    run = RunFolder(storage.join(s3, "tiny"))
    figures = storage.read_json(run.at("evaluate", "metrics.json"))
    assert figures["samples"] > 0 and figures["image_ce_nats"] > 0
    rows = [value for name, value in figures.items() if name.startswith("image_ce_row_")]
    assert sum(rows) / len(rows) == pytest.approx(figures["image_ce_nats"])
    page = storage.read_bytes(run.at("report.html"))
    assert page.count(b"data:image/png;base64") >= 4
    assert [name for name in storage.list_files(run.at("tensorboard", "dalle")) if "tfevents" in name]
    assert storage.exists(run.at("generate", "grid.png"))
    run_stage("dalle", s3, ["generate.num_captions=2"])  # a finished stage is a no-op
