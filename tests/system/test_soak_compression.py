"""A run that compresses between two machines of two processes is killed again and again (``make soak``): it ends with the bits of the undisturbed one."""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from infra import ledger
from infra.errors import ExitCode
from infra.run_folder import RunFolder
from tests.support import gang
from tests.support.checkpoint_hashes import hashes
from tests.support.gang import Gang, send
from tests.support.stopped_run import FIXTURE
from train.loop.metrics import read_metrics

_STEPS, _KILLS, _PATIENCE_S = 120, 4, 600


def prepared(root: Path, name: str) -> RunFolder:
    """A run with codes, configured to compress, that has not begun to train."""
    shutil.copytree(FIXTURE / "run", root / name)
    shutil.rmtree(root / name / "dalle")
    file = root / name / "config.json"
    config: dict[str, Any] = json.loads(file.read_text())
    config["dalle_fit"] |= {
        "steps": _STEPS,
        "save_every": 7,
        "precision": "fp16",
        "moments": "16-bit",
        "caption_dropout": 0.2,
        "eval_every": _STEPS,
        "schedule": "cosine",
    }
    config["zero"] |= {"stage": 3, "sharding": "node"}
    config["compression"] = {"method": "powersgd", "rank": 4, "refresh_every": 9}
    file.write_text(json.dumps(config))
    return RunFolder(str(root / name))


def end_state(run: RunFolder) -> tuple[list[tuple[int, float]], dict[str, list[str]]]:
    """Every loss, and the hash of every tensor of the last checkpoint, error buffers included."""
    losses = [(point.step, point.value) for point in read_metrics(run.url, "dalle")["train/loss"]]
    return losses, hashes(run.at("dalle", "checkpoints", f"step-{_STEPS:08d}"))


@pytest.mark.soak
def test_killed_anywhere_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    if not gang.available():
        pytest.skip("no mount namespaces: this test needs root and unshare")
    ends = []
    for kills in (0, _KILLS):
        run, rng = prepared(tmp_path, f"run-{kills}"), random.Random(0)
        folder = tmp_path / f"nodes-{kills}"
        folder.mkdir()
        job = Gang(run, "dalle", {"OMP_NUM_THREADS": "1"}, folder)
        try:
            job.start()
            for number in range(kills):
                wait(job, run, (number + 1) * _STEPS // (kills + 2))
                time.sleep(rng.uniform(0.0, 1.0))
                send(job.ranks(rng.randrange(2))[rng.randrange(2)], signal.SIGKILL)
                job.finish(_PATIENCE_S)
                job.start()
            assert job.finish(_PATIENCE_S).code == ExitCode.DONE, (folder / "node-0.log").read_text()[-4000:]
        finally:
            job.kill()
        ends.append(end_state(run))
    assert ends[0] == ends[1]
    assert {name.split("/")[2] for name in ends[0][1] if name.startswith("compression/error")} == {"0", "1"}
    assert any(name.startswith("compression/basis") for name in ends[0][1])


def wait(job: Gang, run: RunFolder, step: int) -> None:
    """Until a checkpoint of this step or a later one is there."""
    deadline = time.monotonic() + _PATIENCE_S
    while ledger.newest_checkpoint(run, "dalle") < step:
        assert not job.ended() and time.monotonic() < deadline
        time.sleep(0.05)
