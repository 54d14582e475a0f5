"""Every kind of file that is read back, damaged a few hundred times: whoever reads it ends well or says in a sentence what is wrong. About 20 s of CPU."""

from __future__ import annotations

import hashlib
import json
import random
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from data_pipeline.audit.check_parts import Rules, check_part
from data_pipeline.audit.check_set import read_layout
from data_pipeline.audit.random_records import random_rows
from data_pipeline.config import TokenizerConfig
from data_pipeline.loading.loaders import SequentialReader
from data_pipeline.prepare.tries import Tries, record_failure
from data_pipeline.shards.deletion import plan_purge, plan_superseded
from data_pipeline.shards.shard_set import CODES_SCHEMA, IMAGE_SCHEMA, open_set, read_marker
from data_pipeline.tokenizer import load_tokenizer
from data_pipeline.tokenizer import run as make_tokenizer
from infra import lease, ledger, storage, stored
from infra.config import to_json
from infra.digests import digest
from infra.errors import CheckpointError, ExitCode, ReportedError
from infra.run_folder import RunFolder
from infra.run_records import AttentionEngine, Evaluation, Summary
from infra.world import World
from tests.support.damage import damaged
from tests.support.made_sets import code, image, make_codes, make_images
from train.config import ScaleSection, load_run
from train.engines.zero.scales import EngineState, GradientScales
from train.loop.goodput import lost_s
from train.loop.metrics import read_metrics
from train.loop.plateau import Plateau
from train.optimizer.loss_scale import LossScale
from train.report.page import render
from train.report.view import RunView
from train.run import change_points, elastic, places
from train.stages.dalle import make_plateau
from train.verbs import demo_page, doctor_lineage, status, targets
from train.weights import checkpoint, export
from train.weights.fragments import even_slice

TIMES = 60
CODES = (ExitCode.DATA, ExitCode.CONFIG)


def holds(file: Path, read: Callable[[], object], *, times: int = TIMES, as_json: bool = True, seal: Callable[[bytes], bytes] = bytes) -> None:
    """Damage a file again and again; ``seal`` rewrites hashes in it, as who means ill would. At least one damage in ten is seen, or the reader reads nothing."""
    sound, rng, seen, wrong = file.read_bytes(), random.Random(file.name), 0, []
    read()
    for _ in range(times):
        what, data = damaged(sound, rng, as_json=as_json)
        try:
            file.write_bytes(seal(data))
        except ValueError:
            continue  # no JSON any more, which cannot be sealed
        try:
            read()
        except ReportedError as error:
            seen += 1
            if error.exit_code not in CODES or len(str(error)) > 5000 or "\x1b" in str(error):
                wrong.append(f"{what}: {error.exit_code!r} {error}")
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)
            ours = [f"{frame.filename.rpartition('/')[2]}:{frame.lineno}" for frame in where if "site-packages" not in frame.filename]
            wrong.append(f"{what}: {type(error).__name__}: {str(error)[:200]} ({' '.join(ours[-4:])})")
    file.write_bytes(sound)
    assert not wrong, f"{len(wrong)} of {times} in {file.name}:\n" + "\n".join(dict.fromkeys(wrong))
    assert seen >= times // 10, f"{seen} of {times} damages of {file.name} were seen"


def _read_set(url: str, schema: str) -> None:
    made = open_set(url, schema)
    list(made.records())
    made.rows_at([0])
    random_rows(made, 2)
    _ = made.excluded, made.id_hashes(), made.starts
    if schema == IMAGE_SCHEMA:
        list(made.captions())
        made.prints()
    list(SequentialReader(made, World.single(), 3, 2, lambda record, _: dict(record), list))


def _validate(url: str, schema: str) -> None:
    layout = read_layout(url)
    for job in layout.jobs(Rules(schema, layout.manifest.get("settings") or {})):
        check_part(job)


@pytest.mark.parametrize("name", ["manifest.json", "index.json", "excluded.u64"])
@pytest.mark.parametrize("schema", [IMAGE_SCHEMA, CODES_SCHEMA])
def test_files_of_a_version(tmp_path: Path, schema: str, name: str) -> None:
    url, parts = str(tmp_path / "set"), ([0, 1], [2])
    if schema == IMAGE_SCHEMA:
        made = make_images(url, [[image(number) for number in part] for part in parts], excluded=[1])
    else:
        made = make_codes(url, [[code(number) for number in part] for part in parts], {"images": "a" * 64, "dvae": "b" * 64}, excluded=[1])
    identity = made.content_hash
    file = Path(made.version_url) / name

    def read() -> None:
        _validate(url, schema)
        plan_purge(url, frozenset({"id-0"}))
        plan_superseded(url, frozenset(), 0.0)
        opened = open_set(url, schema, version=identity)
        _ = opened.shards, opened.excluded
        if name == "manifest.json":
            (tmp_path / "set" / name).write_bytes(file.read_bytes())
        _read_set(url, schema)

    holds(file, read, as_json=name.endswith("json"), times=TIMES if schema == IMAGE_SCHEMA else TIMES // 2)


@pytest.mark.parametrize("name", ["done.json", "index.json", "captions.jsonl.gz", "ids.u64", "shard.00000.mds"])
def test_files_of_a_part(tmp_path: Path, name: str) -> None:
    url = str(tmp_path / "set")
    made = make_images(url, [[image(number) for number in range(3)]])
    file = tmp_path / "set" / made.parts[0]["name"] / name
    inputs = json.loads(file.with_name("done.json").read_bytes())["inputs"]

    def read() -> None:
        _validate(url, IMAGE_SCHEMA)
        if name == "done.json":
            read_marker(url, inputs)
        else:
            _read_set(url, IMAGE_SCHEMA)

    holds(file, read, as_json=name.endswith("json"), times=TIMES // 2)


def test_a_tokenizer(tmp_path: Path) -> None:
    images = make_images(str(tmp_path / "set"), [[image(number) for number in range(3)]])
    make_tokenizer(TokenizerConfig(vocab=300), images, str(tmp_path / "tokenizer"))
    url, cfg = str(tmp_path / "tokenizer"), TokenizerConfig(vocab=300)
    holds(tmp_path / "tokenizer" / "manifest.json", lambda: load_tokenizer(url, cfg))
    holds(tmp_path / "tokenizer" / "tokenizer.model", lambda: load_tokenizer(url, cfg), as_json=False, times=50)


def _save(stage: Path) -> dict[str, torch.Tensor]:
    tensors = {"w": torch.arange(24.0).reshape(4, 6), "b": torch.arange(6.0).half()}
    fragments = {f"model/{name}": even_slice(tensor, 0, 1) for name, tensor in tensors.items()}
    points = [{"step": 1, "changed": {"dalle_fit.lr": [1e-3, 5e-4]}, "schedule": "kept", "curve": [0, 4], "time": 0.0, "commit": "c"}]
    meta: dict[str, Any] = {
        "shapes": {name: list(tensor.shape) for name, tensor in tensors.items()},
        "loader": {"epoch": 0, "index": 3},
        "config": {"dalle": {}},
        **{"parents": {}, "updates": 5, "elapsed_s": 1.5, "bad_updates": {"gradient_overflow": 1}, "changes": points},
        "plateau": {"halved": [3], "best": 1.5, "idle": 0, "sum": 2.5, "count": 1},
        "loss_scale": {"value": 1024.0, "good": 3, "skipped": 1},
        "engine": {"attempts": 6, "scales": {"exponents": [13.0], "divided": [-1000], "overflows": [0]}},
    }
    checkpoint.save(str(stage), 5, fragments, meta, World.single(), keep=2)
    return tensors


@pytest.mark.parametrize("name", ["meta.json", "index.json", "rank-0.json", "rank-0.bin"])
def test_a_checkpoint(tmp_path: Path, name: str) -> None:
    tensors = _save(tmp_path)
    url = checkpoint.folder(str(tmp_path), 5)

    def read() -> None:
        checkpoint.load(str(tmp_path), 5, {f"model/{each}": even_slice(tensor.clone(), 0, 1) for each, tensor in tensors.items()})
        checkpoint.read_tensors(url, "model")

    holds(Path(url) / name, read, as_json=name.endswith("json"))


@pytest.mark.parametrize("name", ["meta.json", "index.json", "rank-0.json"])
def test_a_checkpoint_whose_hashes_are_made_to_fit(tmp_path: Path, name: str) -> None:
    tensors = _save(tmp_path)
    url = checkpoint.folder(str(tmp_path), 5)
    facts = Path(url) / "meta.json"
    sound = json.loads(facts.read_bytes())

    def seal(data: bytes) -> bytes:
        try:
            tree = json.loads(data)
        except RecursionError:  # nothing to seal: it is refused before a hash is looked at
            return data
        if name == "rank-0.json":
            index = json.loads((Path(url) / "index.json").read_bytes())
            index["parts"][0] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            (Path(url) / "index.json").write_text(json.dumps(index))
            tree = index
        if name != "meta.json":
            meta = {key: value for key, value in sound.items() if key != "sha256"} | {"index": digest(tree)}
            facts.write_text(json.dumps(meta | {"sha256": digest(meta)}))
            return data
        if not isinstance(tree, dict):
            return data
        tree.pop("sha256", None)
        return json.dumps(tree | {"sha256": digest(tree)}).encode()

    def read() -> None:
        meta = checkpoint.load(str(tmp_path), 5, {f"model/{each}": even_slice(tensor.clone(), 0, 1) for each, tensor in tensors.items()})
        checkpoint.read_tensors(url, "model")
        _go_on_from(meta, str(tmp_path))

    holds(Path(url) / name, read, seal=seal)


def _go_on_from(meta: dict[str, Any], stage: str) -> None:
    """What a trainer does with the facts of a checkpoint."""
    checkpoint.check_resumable(meta, stage)
    assert int(meta["updates"]) >= 0 and float(meta["elapsed_s"]) < 1e13 and meta["loader"].get("epoch", 0) + meta["loader"].get("index", 0) >= 0
    assert sum(meta.get("bad_updates", {}).values()) >= 0
    change_points.curve(meta.get("changes", []), 8)
    for point in meta.get("changes", []):
        change_points.described(point)
    if meta.get("plateau"):
        plateau = Plateau(2, 2, 0.1, 2, 0)
        plateau.restore(meta["plateau"], 5)
        plateau.observe(6, 1.0)
    if meta.get("loss_scale"):
        LossScale().restore(meta["loss_scale"])
    if meta.get("engine"):
        stored.check(meta["engine"], EngineState, "engine")
    if meta.get("engine") and meta["engine"]["scales"] is not None:
        scales = GradientScales(2, 1, ScaleSection())
        scales.restore(meta["engine"]["scales"])
        scales.values()


@pytest.mark.parametrize("name", ["shapes", "updates", "elapsed_s", "loader"])
def test_a_stage_goes_on_from_no_checkpoint_that_lacks_what_it_needs(name: str) -> None:
    facts: dict[str, Any] = {"step": 5, "shapes": {}, "updates": 5, "elapsed_s": 1.5, "loader": {}}
    checkpoint.check_resumable(facts, "stage")
    with pytest.raises(CheckpointError, match=rf"stage/checkpoints/step-00000005/meta\.json: damaged.*: {name}: field required"):
        checkpoint.check_resumable({key: value for key, value in facts.items() if key != name}, "stage")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_an_export(tmp_path: Path, name: str) -> None:
    module = nn.Linear(3, 2)
    export.write(str(tmp_path), dict(module.state_dict()), {"width": 3}, parents={"dvae": "a" * 64})
    holds(tmp_path / name, lambda: export.read(str(tmp_path), nn.Linear(3, 2)), as_json=name.endswith("json"))


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run folder with a file of each kind."""
    folder = RunFolder(str(tmp_path / "runs" / "tiny"))
    cfg = load_run("tiny", [f"run.root={tmp_path}/runs"])
    places.claim(cfg, folder, "python launcher.py")
    versions = {"prepare": {"train": "a" * 64, "validation": "b" * 64}, "encode": {"0/train": "c" * 64}}
    for stage in ("prepare", "encode", "dvae"):
        folder.finish(stage, seconds=3.0, world_size=2, versions=versions.get(stage, {}), parents={"images": "a" * 64}, summary={"parameters": 5})
    for attempt in range(2):
        number = folder.begin_attempt("dalle", size=1, run_id="7", restart=attempt, saved=-1)
        folder.record_exit("dalle", number, 0, 1, "a crash")
    ledger.close(folder, "dalle", ledger.read(folder, "dalle")[0])
    storage.write_json(folder.at("dalle", "rows.json"), {"rows": 2, "ranks": 1})
    storage.write_json(folder.at("dalle", "halve_at.json"), [3, 5])
    lines = [json.dumps({"step": step, "time": 1.0 + step, "values": {"train/loss": 2.0 / step}}) for step in range(1, 5)]
    storage.write_text(folder.at("dalle", "metrics", "attempt-0.jsonl"), "\n".join(lines) + "\n")
    nearest = {"id": "x", "distance": 1.0, "file": "generate/caption-0000/000-nearest.png"}
    entry: dict[str, object] = {"caption": "a dog", "id": "x", "split": "train", "truth": None, "key": "k"}
    entry |= {"pictures": [{"file": "generate/caption-0000/000.png", "score": 1.0, "seed": 1, "nearest": nearest}]}
    storage.write_json(folder.at("generate", "index.json"), {"captions": [entry], "temperature": 1.0, "candidates": 1, "checkpoint": "a" * 64})
    storage.write_json(folder.at("evaluate", "metrics.json"), {"dalle": {"fid": 1.0}})
    points = [{"step": 1, "changed": {"dalle_fit.lr": [1e-3, 5e-4]}, "schedule": "kept", "curve": [0, 4], "time": 0.0, "commit": "c"}]
    storage.write_json(folder.at("dalle", "changes.json"), points)
    storage.write_json(folder.at("dvae", "codebook.json"), {"counts": [1, 2, 3], "steps": [1]})
    return folder


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "provenance.json", "prepare/done.json", "encode/done.json", "dvae/done.json"),
        *("exits/dalle/attempt-0/begin.json", "exits/dalle/attempt-0/end.json", "exits/dalle/attempt-1/rank-0.json", "dalle/rows.json"),
        *("dalle/changes.json", "dalle/halve_at.json", "generate/index.json", "evaluate/metrics.json", "dvae/codebook.json"),
    ],
)
def test_a_run_folder(run: RunFolder, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    root = run.url.rpartition("/")[0]
    given = load_run("tiny", [f"run.root={root}"])
    changed = load_run("tiny", [f"run.root={root}", "dalle_fit.numerics_every=7"])

    def read() -> None:
        status.main([run.url])
        if name == "provenance.json":  # it is read where a run goes on with other values
            storage.write_text(run.config_url, to_json(given))
        places.claim(changed if name == "provenance.json" else given, run, "again")
        ledger.judge(ledger.read(run, "dalle"), -1, 3)
        lost_s(run.url, "dalle", 1)
        elastic.adapted(given, run, "dalle", World.single())
        places.version(run, "prepare", "train")
        places.version(run, "encode", "0/train")
        cfg = targets.open_run(run.url).cfg
        doctor_lineage.checked(cfg, run)
        targets.resolve(run.url)
        make_plateau(cfg.dalle_fit, run, World.single())

    def page() -> None:
        render(RunView(run.url))

    shown_only = name.startswith(("generate", "evaluate", "dvae/codebook"))
    if shown_only:  # the page says in place of a section what is wrong
        rng, file = random.Random(name), Path(run.url) / name
        sound = file.read_bytes()
        for _ in range(TIMES // 4):
            file.write_bytes(damaged(sound, rng)[1])
            page()
    else:
        holds(Path(run.url) / name, read, times=TIMES // 2)


def test_metrics_lose_the_damaged_lines_alone(run: RunFolder) -> None:
    file, rng = Path(run.at("dalle", "metrics", "attempt-0.jsonl")), random.Random(0)
    lines = file.read_bytes().splitlines()
    for _ in range(TIMES):
        spoiled = damaged(lines[1], rng)[1]
        file.write_bytes(b"\n".join([lines[0], spoiled, *lines[2:]]) + b"\n")
        points = read_metrics(run.url, "dalle").get("train/loss", [])
        assert {1, 3, 4} <= {point.step for point in points} or b"\n" in spoiled


def test_tries_of_an_input_shard(tmp_path: Path) -> None:
    tries = Tries(str(tmp_path), "a" * 64)
    place = tries.begin(0)

    def read() -> None:
        tries.failed()
        record_failure(place, "x")

    holds(Path(place), read)


def test_what_pages_and_leases_are_read_from(run: RunFolder) -> None:
    figures = dict.fromkeys(Evaluation.model_fields, 0.5)
    storage.write_json(run.at("evaluate", "metrics.json"), figures | {"parents": {"dvae": "a" * 64}})
    storage.write_json(run.at("images", "summary.json"), {"splits": {"train": {"count": 3, "licenses": {"CC0-1.0": 3}}}})
    storage.write_json(run.at("attention", "cpu-fp32.json"), {"engine": "flex"})
    done: dict[str, dict[str, Any]] = {"report": {"finished": 1.0, "seconds": 2.0}, "prepare": {"seconds": 1.0, "summary": {"credits": ["us"]}}}
    holds(Path(run.at("evaluate", "metrics.json")), lambda: demo_page.render(run, done), times=50)

    def summary() -> None:
        found = stored.read(run.at("images", "summary.json"), Summary)["splits"].get("train")
        assert found is None or (found["count"] >= 0 and all(isinstance(each, int) for each in found["licenses"].values()))

    holds(Path(run.at("images", "summary.json")), summary, times=50)
    holds(
        Path(run.at("attention", "cpu-fp32.json")),
        lambda: str(stored.read(run.at("attention", "cpu-fp32.json"), AttentionEngine)["engine"]),
        times=50,
    )


def test_a_damaged_lease_is_one_of_nobody_that_is_known_and_a_damaged_request_is_passed_over(tmp_path: Path) -> None:
    rng, place = random.Random(0), str(tmp_path / "locks" / "dvae")
    holder = lease.Holder("t", "gpu07", 4711, "boot pid:[1] 4711 5", "77", 0, 1.0, 60.0)
    storage.write_json(f"{place}/00000003.json", asdict(holder))
    sound = Path(f"{place}/00000003.json").read_bytes()
    for _ in range(TIMES):
        Path(f"{place}/00000003.json").write_bytes(damaged(sound, rng)[1])
        found = lease._read(place, 3)
        assert isinstance(found.pid, int) and found.lease_s > 0 and isinstance(found.described(1.0), str)
    Path(f"{place}/00000003.json").write_bytes(sound)
    held = lease.Lease(place, 3, holder)
    storage.write_json(f"{place}/request-1.json", {"job": "78", "restart": 1})
    sound = Path(f"{place}/request-1.json").read_bytes()
    for _ in range(TIMES // 4):
        Path(f"{place}/request-1.json").write_bytes(damaged(sound, rng)[1])
        held.beat()
