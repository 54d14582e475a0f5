"""Stage encode: whatever is killed, and on however many processes it is repeated, the same shards; and what its codes are made from."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.shards.shard_set import CODES_SCHEMA, IMAGE_SCHEMA, open_set
from infra import storage
from infra.errors import DataError, ExitCode
from infra.run_folder import RunFolder
from infra.signals import StopFlag
from infra.world import World
from model.dvae import DVAE
from tests.support.patience import PATIENCE_S
from tests.train.stages.test_shares import tree
from train import launch
from train.config import RunConfig, load_run
from train.run.data_inputs import open_images
from train.run.inputs import open_dvae
from train.stages import encode as encode_stage
from train.stages.encode_records import CodeMaker

WORDS = ["dvae_fit.steps=2", "dvae_fit.precision=fp32", "data.share=0.08", "data.records_per_part=256", "encode.batch=8"]


def run_stage(name: str, root: Path, *overrides: str) -> None:
    launch.stage(name, "tiny", [f"run.root={root}", *WORDS, *overrides], on="local", nproc=1, dry_run=False, worker=False, stop=StopFlag())


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("encoded")
    for name in ("prepare", "dvae", "encode"):
        run_stage(name, root)
    return root


@pytest.fixture
def bare(encoded: Path, tmp_path: Path) -> Path:
    """A copy of that run, not encoded yet."""
    shutil.copytree(encoded / "tiny", tmp_path / "tiny", ignore=shutil.ignore_patterns("codes", "encode"))
    config = json.loads((encoded / "tiny/config.json").read_text())
    config["run"]["root"] = str(tmp_path)
    (tmp_path / "tiny/config.json").write_text(json.dumps(config))
    return tmp_path


# --- Killed anywhere ----------------------------------------------------------------------------------------------------------------------


def encode_share(root: str, index: int, count: int, pause_s: float) -> None:
    """One launcher of several that share the work, in a process of its own; with a pause before each part, so that no machine is done before it is killed."""
    os.environ["LAUNCHER_SHARE"] = f"{index}/{count}"
    torch.set_num_threads(1)
    good = CodeMaker.codes

    def slow(self: CodeMaker, *rest: Any) -> Any:
        time.sleep(pause_s)
        return good(self, *rest)

    CodeMaker.codes = slow  # type: ignore[method-assign, assignment]
    run = RunFolder(f"{root}/tiny")
    encode_stage.run(load_run(run.config_url, []), run, World.single(), StopFlag())


def start(root: Path, count: int, pause_s: float = 0.0) -> list[BaseProcess]:
    context = multiprocessing.get_context("forkserver")  # it imports once, and its children begin at once
    context.set_forkserver_preload([__name__, "streaming"])
    processes: list[BaseProcess] = [context.Process(target=encode_share, args=(str(root), index, count, pause_s)) for index in range(count)]
    for process in processes:
        process.start()
    return processes


@pytest.mark.parametrize("most", [3, pytest.param(10, marks=pytest.mark.soak)])
def test_kills_at_random_change_no_byte_and_leave_each_id_once(encoded: Path, bare: Path, most: int) -> None:
    expected, codes, rng, kills = tree(encoded / "tiny/codes"), bare / "tiny/codes", random.Random(0), 0
    parts = sum("part-" in name and name.endswith("done.json") for name in expected)
    assert parts > 30
    while kills < most:
        processes = start(bare, 3, pause_s=0.2)
        before = len(list(codes.rglob("part-*/done.json")))
        # Somewhere in the work: after a few more parts, and a little later.
        target = before + rng.randint(0, (parts - before) // (2 * (most - kills)))
        while len(list(codes.rglob("part-*/done.json"))) < target or not codes.exists():
            assert any(process.is_alive() for process in processes)
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1))
        victim = rng.choice([process for process in processes if process.is_alive()])
        victim.kill()
        victim.join()
        assert victim.exitcode == -signal.SIGKILL
        kills += 1
        for process in processes:  # as its launcher kills the peers of a killed rank
            process.kill()
            process.join()
        assert not (bare / "tiny/encode/done.json").exists()
    found = sorted(path.parent.name for path in codes.rglob("part-*/done.json"))
    assert 0 < len(found) < parts, "killed in the middle of the work"
    stamps = {path: path.stat().st_mtime_ns for path in codes.rglob("part-*/done.json")}
    for process in start(bare, 2):
        process.join()
        assert process.exitcode == 0
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items()), "a finished part was written again"
    left = tree(codes)
    assert {name: digest for name, digest in left.items() if ".tmp-" not in name} == expected, (
        "a killed writer may leave a temporary file, which nobody reads"
    )
    ids = [record["id"] for record in open_set(str(codes / "crop-0/train"), CODES_SCHEMA).records()]
    assert len(ids) == len(set(ids)) and ids == [record["id"] for record in open_set(str(bare / "tiny/images/train"), IMAGE_SCHEMA).records()]


# --- What codes are made from -------------------------------------------------------------------------------------------------------------


def make(cfg: RunConfig, model: DVAE, root: Path, decoders: int) -> list[tuple[str, list[int]]]:
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(decoders) as pool:
        maker = CodeMaker(cfg, model, torch.device("cpu"), reader, pool)
        images = open_images(cfg, RunFolder(f"{root}/tiny"), "train")
        return [(record.id, record.codes.tolist()) for record in maker.codes(images.read_part(0), 0)]


def test_codes_do_not_depend_on_the_number_of_decoders_and_follow_the_order_of_the_images(encoded: Path) -> None:
    cfg = load_run(f"{encoded}/tiny", [])
    model, _ = open_dvae(cfg, RunFolder(f"{encoded}/tiny"), torch.device("cpu"))
    one, four = make(cfg, model, encoded, 1), make(cfg, model, encoded, 4)
    assert one == four
    stored = open_set(f"{encoded}/tiny/codes/crop-0/train", CODES_SCHEMA)
    assert one == [(record["id"], record["codes"].tolist()) for record in stored.read_part(0)]


def test_the_next_batch_is_decoded_while_the_model_works_on_this_one(encoded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = load_run(f"{encoded}/tiny", [])
    model, _ = open_dvae(cfg, RunFolder(f"{encoded}/tiny"), torch.device("cpu"))
    decoded: list[object] = []
    seen: list[int] = []
    encode, cut = DVAE.encode, CodeMaker._cut

    def slow(self: DVAE, pixels_B3YX: torch.Tensor) -> torch.Tensor:
        deadline = time.monotonic() + PATIENCE_S
        while len(decoded) < min(16, 8 * (len(seen) + 2)) and time.monotonic() < deadline:
            time.sleep(0.001)  # the model gives way: only other threads can decode now
        seen.append(len(decoded))
        return encode(self, pixels_B3YX)

    def counted(self: CodeMaker, record: dict[str, object], crop: int) -> object:
        decoded.append(record["id"])
        return cut(self, record, crop)

    monkeypatch.setattr(DVAE, "encode", slow)
    monkeypatch.setattr(CodeMaker, "_cut", counted)
    made = make(cfg, model, encoded, 2)
    assert len(made) > 16 and seen[0] == 16, "one batch is decoded ahead, and no more"


def test_a_damaged_picture_stops_the_stage_and_leaves_the_parts_before_it(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut, calls = CodeMaker._cut, []

    def failing(self: CodeMaker, record: dict[str, object], crop: int) -> object:
        calls.append(record["id"])
        if len(calls) >= 150:
            raise DataError(f"{record['id']}: not an image.")
        return cut(self, record, crop)

    monkeypatch.setattr(CodeMaker, "_cut", failing)
    with pytest.raises(launch.StageFailed, match="not an image") as caught:
        run_stage("encode", bare)
    assert caught.value.exit_code == ExitCode.DATA
    assert len(list((bare / "tiny/codes").rglob("part-*/done.json"))) >= 1


def test_an_upload_that_fails_stops_the_stage(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = storage.upload_folder

    def failing(local: Path, url: str, last: tuple[str, ...] = ()) -> list[str]:
        if list((bare / "tiny/codes").rglob("part-*/done.json")):
            raise DataError(f"{url}: no room.")
        return upload(local, url, last)

    monkeypatch.setattr(storage, "upload_folder", failing)
    with pytest.raises(launch.StageFailed, match="no room"):
        run_stage("encode", bare)
    assert len(list((bare / "tiny/codes").rglob("part-*/done.json"))) == 1


def test_another_arithmetic_makes_other_parts_and_is_named_in_the_manifest(encoded: Path) -> None:
    run, found = RunFolder(f"{encoded}/tiny"), []
    for words, dtype in (([], torch.float32), (["encode.threads=2"], torch.float32), ([], torch.bfloat16)):
        found.append({unit.inputs for unit in encode_stage._units(load_run(run.url, words), run, "0" * 64, dtype)})
    assert not found[0] & found[1] and not found[0] & found[2] and not found[1] & found[2]
    settings = json.loads((encoded / "tiny/codes/crop-0/train/manifest.json").read_text())["settings"]
    assert (settings["precision"], settings["threads"]) == ("fp32", 1)


def test_the_arithmetic_runs_in_the_threads_that_are_asked_for(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, encode = set(), DVAE.encode

    def spied(self: DVAE, pixels_B3YX: torch.Tensor) -> torch.Tensor:
        seen.add(torch.get_num_threads())
        return encode(self, pixels_B3YX)

    monkeypatch.setattr(DVAE, "encode", spied)
    torch.set_num_threads(2)
    run_stage("encode", bare)
    assert seen == {1}
