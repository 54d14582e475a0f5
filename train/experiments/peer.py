"""Compares our stage dalle with dalle-pytorch, at equal codes, captions, depth, width, heads, batch, time and machine: ``python -m train.experiments.peer RUN``.

RUN is a run whose stages tokenizer, dvae and encode are finished. Its configuration and words like ``dalle.layers=6`` determine both models. Ours is trained by
``launcher.py dalle`` in a new folder below RUN/against. A probe estimates how many updates fit into the given minutes. The peer then gets exactly the minutes that
ours has taken; with ``--at-once`` it gets the given minutes, of which ours aims at 98 %. In both halves, updates and the loading of batches count as time, in ours
also checkpoints; evaluations, the start and probes do not count. ``--at-once`` runs both halves at the same time, each on its own cores; ``--only`` repeats one
half. Figures are written to docs/experiments/against-dalle-pytorch-NAME.json, where NAME is the run's name; ``python -m train.experiments.page --render`` makes the
page.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from infra import files, storage, stored
from infra.config import differences
from infra.errors import ConfigError, in_a_sentence
from infra.repository import DOCS, LAUNCHER
from infra.run_folder import RunFolder, producer
from infra.run_records import PrecisionChoice
from infra.world import World
from model.transformer import Transformer
from train.config import RunConfig, load_run
from train.experiments import peer_page
from train.experiments.peer_training import ATTENTIONS, EVALUATIONS, WARMUP, Point, report_of
from train.experiments.peer_training import run as train_peer
from train.loop.metrics import read_metrics
from train.machine.rates import threads
from train.ranks.device import branch_dtype, keep_memory
from train.run import attention_engine, places
from train.run.data_inputs import open_tokenizer
from train.run.inputs import build_dalle, open_codes
from train.stages import dalle_batches
from train.stages.dalle_task import cross_entropies
from train.weights import checkpoint

_FOLDER = DOCS / "experiments"
HALVES = ("ours", "peer")
ORDERS = ("one after the other", "at the same time, each on cores of its own")
_CPU = torch.device("cpu")
_FIRST_PROBE = 20
"""Number of updates in our first probe; the second probe takes the minutes given for probes."""
_MARGIN = 0.98
"""The fraction of the minutes that our training aims at, because other load on the machine may slow it down."""


def main(words: Sequence[str]) -> None:
    """Run one half or both, and write the figures of each as soon as it has ended."""
    parser = argparse.ArgumentParser(prog="python -m train.experiments.peer", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", help="folder of a run with codes")
    parser.add_argument("overrides", nargs="*", help="section.key=value, for both halves")
    parser.add_argument("--only", choices=HALVES, help="one half; the other one's figures stay")
    parser.add_argument("--at-once", action="store_true", help="both halves at the same time, on twice as many cores")
    parser.add_argument("--minutes", type=float, default=60.0, help="training time of each")
    parser.add_argument("--probe-minutes", type=float, help="training time of each probe; a twentieth of the minutes if not given")
    parser.add_argument("--threads", type=int, default=2, help="cores: threads of the peer's process, processes of ours")
    parser.add_argument("--attention", nargs="+", choices=ATTENTIONS, default=["full"], help="the peer's attention; of several the best by probes")
    parser.add_argument("--out", type=Path, help="file for the figures instead")
    given = parser.parse_args(words)
    url = given.run if storage.is_remote(given.run) else str(Path(given.run).resolve())
    cfg, run = load_run(url, given.overrides), RunFolder(url)
    out = given.out or _FOLDER / f"{peer_page.stem(cfg.run.name)}.json"
    if given.at_once and given.only is None:
        at_once(words, given.threads, out)
        print(peer_page.section(storage.read_json(str(out))))
        return
    keep_memory()  # for the peer; our stages call it themselves
    probe = given.probe_minutes or given.minutes / 20
    settings = settings_of(cfg, run, given.minutes, given.threads, given.overrides) | {"halves": ORDERS[given.at_once]}
    found = read(out, settings, given.only)
    if given.only != "peer":
        ours = train_ours(cfg, run, given.overrides, given.minutes, probe, given.threads)
        found = read(out, settings, given.only) | {"ours": ours}  # read again, because the other half may have been written meanwhile
        write(out, found)
    if given.only != "ours":
        minutes = found["ours"]["minutes"] if "ours" in found else given.minutes
        peer = train_peer(cfg, run, minutes, probe, given.threads, given.attention)
        found = read(out, settings, "peer") | {"peer": peer}
        write(out, found)
    print(peer_page.section(found))


def at_once(words: Sequence[str], cores: int, out: Path) -> None:
    """Run this command for both halves, each in a process that is bound to ``cores`` cores of its own. ``out`` is replaced when both have ended; until then the
    figures are in a file whose name has ``.new`` at its end.

    Raises:
        ConfigError: there are fewer than twice as many cores.
        SystemExit: a half failed. Raised when the other half has ended too, with the exit code of the failed one.
    """
    allowed = sorted(os.sched_getaffinity(0))
    if len(allowed) < 2 * cores:
        raise ConfigError(
            f"--at-once with --threads {cores} needs {2 * cores} cores, this process may use {len(allowed)}: give fewer --threads, or leave --at-once out."
        )
    new = out.with_name(out.name + ".new")
    new.unlink(missing_ok=True)
    halves = []
    try:
        for place, half in enumerate(HALVES):
            os.sched_setaffinity(0, allowed[place * cores :][:cores])  # the child process inherits it
            halves.append(subprocess.Popen([sys.executable, "-m", "train.experiments.peer", *words, "--out", str(new), "--only", half]))
    finally:
        os.sched_setaffinity(0, allowed)
    codes = [half.wait() for half in halves]
    if any(codes):
        raise SystemExit(max(abs(code) for code in codes))  # the code of a process that a signal ended is negative
    new.replace(out)


def settings_of(cfg: RunConfig, run: RunFolder, minutes: float, cores: int, overrides: Sequence[str]) -> dict[str, Any]:
    """The settings that both halves have in common, without paths of this machine."""
    places.require(run, "tokenizer", "encode")
    codes, validation = open_codes(cfg, run, 0, "train"), open_codes(cfg, run, 0, "validation")
    shape = cfg.stream_shape()
    return {
        "run": cfg.run.name,
        "overrides": [word for word in overrides if not word.startswith(("run.root=", "data."))],
        "layers": cfg.dalle.layers,
        "width": cfg.dalle.width,
        "heads": cfg.dalle.heads,
        "text_tokens": shape.text_tokens,
        "text_vocab": shape.text_vocab,
        "image_tokens": shape.image_tokens,
        "image_vocab": shape.image_vocab,
        "batch": cfg.dalle_fit.batch,
        "seed": cfg.run.seed,
        "crops": cfg.encode.crops,
        "minutes": minutes,
        "cores": cores,
        "training_images": codes.count,
        "validation_images": min(cfg.evaluate.samples, validation.count),
        "validation_images_of_curves": min(cfg.dalle_fit.eval_samples, validation.count),
        "codes": codes.content_hash[:16],
        "tokenizer": open_tokenizer(cfg, run)[1][:16],
    }


def read(out: Path, settings: dict[str, Any], only: str | None) -> dict[str, Any]:
    """The recorded figures of the half that is not run now; empty if there are none, or if both are run.

    Raises:
        ConfigError: that half was run with other settings; the message lists the differences.
    """
    found: dict[str, Any] = {"kind": "peer", "settings": settings}
    if only is None or not out.exists():
        return found
    before = _read(out)
    (other,) = set(HALVES) - {only}
    if other not in before:
        return found
    changed = differences(before["settings"], settings)
    if changed:
        raise ConfigError(
            f"{out} holds the half '{other}' with other settings; run both halves again, or give another --out:\n  "
            + "\n  ".join(changed)
            + "\n  (file -> given)"
        )
    return found | {other: before[other]}


class _File(stored.Stored):
    """A file of this comparison."""

    settings: dict[str, Any]


def _read(out: Path) -> dict[str, Any]:
    """
    Raises:
        DataError: the file is damaged.
    """
    return stored.read(str(out), _File, "repair it, or give another --out")


def write(out: Path, found: dict[str, Any]) -> None:
    """Write the figures."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic(out) as file:
        file.write((json.dumps(_rounded(found), indent=2, sort_keys=True) + "\n").encode())


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


# --- Our half -----------------------------------------------------------------------------------------------------------------------------


def train_ours(cfg: RunConfig, run: RunFolder, overrides: Sequence[str], minutes: float, probe_minutes: float, cores: int) -> dict[str, Any]:
    """Find the number of updates, train, and evaluate both sets of weights."""
    load = [os.getloadavg()[0]]
    updates, rates, precision = updates_within(cfg, run, overrides, minutes, probe_minutes, cores)
    trained = launch(cfg, run, "ours", [*overrides, *words_of(cfg, updates), f"dalle_fit.precision={precision}"], cores)
    final, parameters = judge(load_run(trained.url, []), trained, cores)
    return {
        "minutes": training_seconds(trained) / 60,
        "updates": updates,
        "parameters": parameters,
        "curve": curve(trained.url),
        "final": final,
        "recipe": {"precision": precision, "lr": cfg.dalle_fit.lr, "clip_norm": cfg.dalle_fit.clip_norm, "processes": cores},
        "updates_per_s": rates,
        "load": [*load, os.getloadavg()[0]],
        "producer": producer(),
    }


def updates_within(
    cfg: RunConfig, run: RunFolder, overrides: Sequence[str], minutes: float, probe_minutes: float, cores: int
) -> tuple[int, list[float], str]:
    """How many updates fit into the minutes, found by two probes. Also returns the updates per second of both, and the precision that 'auto' stands for."""
    precision: str = cfg.dalle_fit.precision
    updates, rates = _FIRST_PROBE, []
    for share in (probe_minutes, minutes * _MARGIN):
        probed = launch(
            cfg, run, "probe", [*overrides, *words_of(cfg, updates), f"dalle_fit.precision={precision}", "dalle_fit.eval_samples=16"], cores
        )
        rates.append(updates / training_seconds(probed))
        precision = _precision(probed, precision)
        updates = max(1, round(60 * share * rates[-1]))
    return updates, rates, precision


def words_of(cfg: RunConfig, updates: int) -> list[str]:
    """The overrides for a training with ``updates`` updates: its warm-up, and evaluations only at updates that are logged."""
    every = cfg.dalle_fit.log_every
    distance = max(1, round(updates / EVALUATIONS / every)) * every
    return [f"dalle_fit.steps={updates}", f"dalle_fit.warmup_steps={round(WARMUP * updates)}", f"dalle_fit.eval_every={distance}"]


def launch(cfg: RunConfig, run: RunFolder, kind: str, words: Sequence[str], cores: int) -> RunFolder:
    """Run stage dalle in a new run folder ``<run>/against/<kind>-<number>``, with the codes and the tokenizer of ``run``. Returns the new folder.

    Raises:
        SystemExit: the stage failed; the exit code is that of the stage.
    """
    number = 0
    while storage.list_files(run.at("against", f"{kind}-{number}")):
        number += 1
    return launch_at(f"{kind}-{number}", cfg, run, words, cores)


def launch_at(name: str, cfg: RunConfig, run: RunFolder, words: Sequence[str], cores: int, *, own_codes: bool = False) -> RunFolder:
    """Run stage dalle in ``<run>/against/<name>``, or go on with it there; with ``own_codes`` stages dvae and encode before it. Tokenizer and images, and
    otherwise codes too, are those of ``run``. Returns the folder.

    Raises:
        SystemExit: a stage failed; the exit code is that of the stage.
    """
    place = RunFolder(run.at("against", name))
    taken: list[tuple[str, ...]] = [("prepare", "done.json"), ("tokenizer", "done.json")]
    taken += [] if own_codes else [("encode", "done.json"), ("dvae", "export", "config.json")]
    for marker in taken:  # stages require these files of a run before they open sets
        if storage.exists(run.at(*marker)):
            storage.write_json(place.at(*marker), storage.read_json(run.at(*marker)))
    inputs = [f'data.images="{places.images(cfg, run)}"', f'data.tokenizer="{places.tokenizer(cfg, run)}"']
    inputs.append(f'data.codes="{"" if own_codes else cfg.data.codes or run.at("codes")}"')
    named = [f'run.root="{run.at("against")}"', f'run.name="{name}"', *inputs]
    for stage in ("dvae", "encode", "dalle") if own_codes else ("dalle",):
        run_stage(stage, run.url, [*words, *named], cores)
    return place


def run_stage(stage: str, url: str, words: Sequence[str], cores: int) -> None:
    """Run a stage by the launcher.

    Raises:
        SystemExit: it failed; the exit code is that of the stage.
    """
    command = [sys.executable, str(LAUNCHER), stage, url, *words, "--nproc", str(cores)]
    code = subprocess.run(command, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
    if code:
        raise SystemExit(code)


def training_seconds(run: RunFolder) -> float:
    """The seconds that a finished stage dalle spent on updates, on waiting for batches and on saving."""
    series = read_metrics(run.url, "dalle")
    return sum(series[f"goodput/{name}_s"][-1].value for name in ("data", "step", "save"))


def curve(url: str) -> list[Point]:
    """The evaluations of a finished stage dalle over training time. The time of an evaluation, which is subtracted, is that between the metrics of its update and its
    own metrics."""
    series = read_metrics(url, "dalle")
    logged = {point.step: point.time for point in series["train/loss"]}
    evaluations = [point for point in series["eval/loss_image"] if point.step in logged]
    end_s, last, points = training_seconds(RunFolder(url)), max(logged), []
    for point in evaluations:
        idle = sum(other.time - logged[other.step] for other in evaluations if point.step <= other.step < last)
        points.append(((end_s - (logged[last] - logged[point.step] - idle)) / 60, point.step, point.value))
    return points


def judge(cfg: RunConfig, run: RunFolder, cores: int) -> tuple[dict[str, dict[str, float]], int]:
    """Evaluate the averaged and the raw weights of the last checkpoint on validation samples, in one process as for the peer. Also returns the number of parameters."""
    tokenizer, _ = open_tokenizer(cfg, run)
    reader = dalle_batches.validation(cfg, run, World.single(), tokenizer, cfg.evaluate.samples)
    dtype = branch_dtype(cfg.dalle_fit.precision, _CPU, run, World.single())
    model: Transformer = build_dalle(cfg, _CPU, dtype, attention_engine.of_run(cfg, run, World.single(), _CPU, dtype)).eval()
    url, found = run.at("dalle"), {}
    newest = checkpoint.folder(url, checkpoint.complete(url)[-1])
    for name, prefix in (("averaged", "average"), ("raw", "model")):
        model.load_state_dict(checkpoint.read_tensors(newest, prefix))
        with threads(cores):
            found[name] = report_of(cross_entropies(model, reader, _CPU, model.text_counts))
    return found, sum(p.numel() for p in model.parameters())


def _precision(run: RunFolder, given: str) -> str:
    """The precision that 'auto' stands for in a run. The probe run has decided it, and the training must use the same."""
    return str(stored.read(run.at("precision.json"), PrecisionChoice)["precision"]) if given == "auto" else given


if __name__ == "__main__":
    in_a_sentence(main)
