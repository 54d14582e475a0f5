"""A small run that was stopped in the middle of each training stage: ``python -m tests.support.stopped_run`` makes tests/fixtures/stopped_run anew.

It is made by one commit and opened by every later one (tests/system/test_stopped_run.py): a run outlives an update. Make it anew only where a stored format
changes on purpose, and say so in CHANGELOG.md.

    run/            prepared, tokenized and encoded; dvae is finished, dalle and clip are stopped after STOPPED updates
    dvae-stopped/   the folder of stage dvae as it was when that one was stopped
    losses.json     stage -> loss of every update of the same run without a stop
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from infra.errors import StopRequested
from infra.signals import StopFlag
from tests.support.root import ROOT

FIXTURE = ROOT / "tests" / "fixtures" / "stopped_run"
TRAINED = ("dvae", "dalle", "clip")
STEPS, STOPPED = 8, 4
_PICTURES = 16
_COLOURS = ("red", "green", "blue", "grey")
SMALL = [
    *(
        f"{stage}_fit.{key}"
        for stage in TRAINED
        for key in (f"steps={STEPS}", "precision=fp32", "batch=4", "save_every=100", "eval_samples=4", "eval_every=4")
    ),
    *("run.name=run", 'data.sources=["pictures"]', "data.share=1.0", "data.min_side=1", "data.validation_share=0.25", "filters.duplicates=false"),
    *("tokenizer.vocab=300", "tokenizer.max_tokens=8", "dvae.width=4", "dvae.init_width=4", "dvae.vocab=8", "dalle.layers=2", "dalle.width=16"),
    *("clip.width=16", "clip.heads=2", "clip.embed=8", "dalle_fit.schedule=plateau", "dalle_fit.plateau_window=2"),
]
_LEFT_OUT = ("exits", "locks", "live", "tensorboard", "cache", "pictures", "logs")


class StopAfter(StopFlag):
    """A signal that comes during the n-th update."""

    def __init__(self, updates: int) -> None:
        super().__init__()
        self.left = updates

    def __bool__(self) -> bool:
        self.left -= 1
        if self.left == -1:  # asked once before the start
            self.received = signal.SIGUSR2
        return self.received is not None


def run_stage(name: str, words: list[str], stop: StopFlag | None = None, *, go_on: bool = False) -> None:
    """One stage of a run on this process alone; words are a preset and its overrides."""
    from train import launch

    stop = StopFlag() if stop is None else stop
    launch.stage(name, words[0], words[1:], on="local", nproc=1, dry_run=False, worker=False, stop=stop, go_on=go_on)


def losses(run_url: str, stage: str) -> dict[int, float]:
    """Loss of every logged update, by update."""
    from train.loop.metrics import read_metrics

    return {point.step: point.value for point in read_metrics(run_url, stage)["train/loss"]}


def _pictures(folder: Path) -> None:
    rng = np.random.default_rng(0)
    folder.mkdir()
    for number in range(_PICTURES):
        pixels = rng.integers(0, 255, (6, 6, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"a {_COLOURS[number % 4]} square number {number} on a table")


def _stop(stage: str) -> None:
    try:
        run_stage(stage, ["tiny", *SMALL], StopAfter(STOPPED))
    except StopRequested:
        return
    except Exception as error:
        if type(error).__name__ != "StageFailed" or "stopped by a signal" not in str(error):
            raise


def make(out: Path) -> None:
    """Make the fixture in a folder that does not exist yet. The working directory changes meanwhile: nothing in a run may name this machine's folders."""
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        try:
            _pictures(Path("pictures"))
            for stage in ("prepare", "tokenizer"):
                run_stage(stage, ["tiny", *SMALL])
            _stop("dvae")
            shutil.copytree("runs/run/dvae", "dvae-stopped")
            shutil.rmtree("runs/run/dvae")
            run_stage("dvae", ["tiny", *SMALL])
            recorded = {"dvae": losses("runs/run", "dvae")}
            run_stage("encode", ["tiny", *SMALL])
            for stage in ("dalle", "clip"):
                run_stage(stage, ["tiny", *SMALL])
                recorded[stage] = losses("runs/run", stage)
                shutil.rmtree(f"runs/run/{stage}")
                _stop(stage)
            shutil.rmtree("runs/run/dvae/checkpoints")  # finished: nothing reads them
            leave_out = shutil.ignore_patterns(*_LEFT_OUT)
            shutil.copytree("runs/run", out / "run", ignore=leave_out)
            shutil.copytree("dvae-stopped", out / "dvae-stopped", ignore=leave_out)
            (out / "losses.json").write_text(json.dumps(recorded, indent=1) + "\n")
        finally:
            os.chdir(here)


if __name__ == "__main__":
    shutil.rmtree(FIXTURE, ignore_errors=True)
    make(FIXTURE)
