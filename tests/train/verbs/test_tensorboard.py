"""``launcher.py tensorboard``: event files of several runs, local and on S3, grow into one TensorBoard. About 15 s, most of them its start."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from infra import storage
from infra.errors import ConfigError, DataError, ExitCode, UsageError
from infra.mirror import Look, Mirror
from infra.signals import StopFlag
from tests.support.events import next_second
from tests.support.patience import PATIENCE_S
from tests.support.root import ROOT
from train.loop.metrics import MetricsWriter
from train.run.run_names import distinct
from train.verbs import tensorboard
from train.verbs.tensorboard import Options


def _run(url: str, steps: range, attempt: int = 0) -> MetricsWriter:
    storage.write_json(storage.join(url, "config.json"), {})
    writer = MetricsWriter(url, "dvae", attempt)
    for step in steps:
        writer.scalars(step, {"train/loss": 100.0 * attempt + step})
    writer.flush()
    return writer


def _losses(folder: Path) -> list[tuple[int, float]]:
    found = EventAccumulator(str(folder))
    found.Reload()
    return [(event.step, event.value) for event in found.Scalars("1 loss/train loss")]


def test_runs_are_named_by_their_folders_and_by_more_where_those_are_equal() -> None:
    assert distinct(["runs/demo", "s3://bucket/runs/tiny/"]) == {"demo": "runs/demo", "tiny": "s3://bucket/runs/tiny/"}
    assert distinct(["/a/x/demo", "s3://b/y/demo"]) == {"x_demo": "/a/x/demo", "y_demo": "s3://b/y/demo"}
    assert distinct(["/a/demo", "/a/demo/"]) == {"demo": "/a/demo/"}


def test_a_copy_holds_what_each_attempt_wrote_and_a_restart_leaves_no_step_twice(s3: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    remote, local = storage.join(s3, "runs", "far"), str(tmp_path / "near")
    first = _run(remote, range(1, 6))
    _run(local, range(1, 3)).close()
    options = Options(out=str(tmp_path / "copy"), once=True)
    tensorboard.main([remote, local], options, StopFlag())
    assert _losses(tmp_path / "copy/far/dvae") == [(step, float(step)) for step in range(1, 6)]
    assert [step for step, _ in _losses(tmp_path / "copy/near/dvae")] == [1, 2]
    first.scalars(6, {"train/loss": 6.0})
    first.flush()  # and then it is killed: the next attempt begins behind update 4
    next_second()
    second = _run(remote, range(5, 9), attempt=1)
    capsys.readouterr()
    tensorboard.main([remote, local], options, StopFlag())
    said = capsys.readouterr().out
    assert re.search(r"^far: 2 event files, 2 of them with something new; [0-9,]+ bytes read$", said, re.M) and "near:" not in said
    assert _losses(tmp_path / "copy/far/dvae") == [(step, float(step)) for step in range(1, 5)] + [(step, 100.0 + step) for step in range(5, 9)]
    for writer in (first, second):
        writer.close()


def test_places_that_hold_no_run_and_options_that_do_not_fit_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError, match=r"config\.json is missing: .*/nothing is no run folder"):
        tensorboard.main([str(tmp_path / "nothing")], Options(out=str(tmp_path / "copy"), once=True), StopFlag())
    with pytest.raises(UsageError, match="--once copies event files and ends, so it needs a place for them: --out FOLDER"):
        tensorboard.main([str(tmp_path)], Options(once=True), StopFlag())
    with pytest.raises(UsageError, match=r"--out s3://bucket/x: event files are copied to a folder of this machine"):
        tensorboard.main([str(tmp_path)], Options(out="s3://bucket/x"), StopFlag())
    (tmp_path / "new").mkdir()
    (tmp_path / "new/config.json").write_text("{}")
    tensorboard.main([str(tmp_path / "new")], Options(out=str(tmp_path / "copy"), once=True), StopFlag())
    assert f"new: no event files yet in {tmp_path}/new/tensorboard\n" in capsys.readouterr().out
    _run(str(tmp_path / "run"), range(1, 2)).close()
    monkeypatch.setattr(Mirror, "look", lambda self: Look(failed=f"{self.url}: no answer"))
    with pytest.raises(DataError, match=r"run/tensorboard: no answer"):
        tensorboard.main([str(tmp_path / "run")], Options(out=str(tmp_path / "copy"), once=True), StopFlag())


def test_a_copy_deletes_nothing_that_it_did_not_copy(tmp_path: Path) -> None:
    """A look deletes what the original does not have: in the folder of runs it would have been the run's own event files."""
    run, other = tmp_path / "runs" / "demo", tmp_path / "logs" / "demo" / "mine.tfevents"
    _run(str(run), range(1, 3)).close()
    _run(str(tmp_path / "more" / "demo"), range(1, 3)).close()
    other.parent.mkdir(parents=True)
    other.write_bytes(b"of another program")
    before = sorted(path.read_bytes() for path in run.rglob("*tfevents*"))
    for out, message in (
        (run.parent, r"runs/demo: holds files that were not copied there by this command, which would delete them"),
        (other.parents[1], r"logs/demo: holds files that were not copied there"),
        (run / "tensorboard", r"demo/tensorboard/demo: lies in what is copied"),
    ):
        with pytest.raises(ConfigError, match=message):
            tensorboard.main([str(run)], Options(out=str(out), once=True), StopFlag())
    assert before == sorted(path.read_bytes() for path in run.rglob("*tfevents*")) and other.read_bytes() == b"of another program"
    tensorboard.main([str(run)], Options(out=str(tmp_path / "copy"), once=True), StopFlag())
    with pytest.raises(ConfigError, match=r"copy/demo: a copy of .*/runs/demo/tensorboard, and not of .*/more/demo/tensorboard"):
        tensorboard.main([str(tmp_path / "more" / "demo")], Options(out=str(tmp_path / "copy"), once=True), StopFlag())
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cannot be written"):
        tensorboard.main([str(run)], Options(out=str(tmp_path / "file"), once=True), StopFlag())


def test_one_process_copies_into_a_folder(tmp_path: Path) -> None:
    """Two would both append what is new."""
    _run(str(tmp_path / "run"), range(1, 3)).close()
    first, second = (Mirror(str(tmp_path / "run" / "tensorboard"), tmp_path / "copy", lambda name: True) for _ in range(2))
    with first.claimed(), pytest.raises(ConfigError, match="copy: another process copies into it"), second.claimed():
        pass
    with second.claimed():
        pass


def test_a_link_to_what_the_run_does_not_hold_is_not_copied(tmp_path: Path) -> None:
    run = tmp_path / "run"
    _run(str(run), range(1, 3)).close()
    (tmp_path / "secret").write_text("secret")
    (run / "tensorboard" / "x.tfevents").symlink_to(tmp_path / "secret")
    tensorboard.main([str(run)], Options(out=str(tmp_path / "copy"), once=True), StopFlag())
    assert not (tmp_path / "copy" / "run" / "x.tfevents").exists() and _losses(tmp_path / "copy" / "run" / "dvae")


def test_it_serves_what_grows_ends_cleanly_and_names_a_port_in_use(tmp_path: Path) -> None:
    run = str(tmp_path / "alone")
    writer = _run(run, range(1, 3))
    words = [sys.executable, str(ROOT / "launcher.py"), "tensorboard", run, "--every", "0.5", "--port", "0", "--out", str(tmp_path / "copy")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        url = next(found[1] for line in process.stdout if (found := re.search(r"TensorBoard .* at (http://\S+)", line)))
        assert _served(url, "alone/dvae", 2) == [1, 2]
        writer.scalars(3, {"train/loss": 3.0})
        writer.close()
        assert _served(url, "alone/dvae", 3) == [1, 2, 3]
        with pytest.raises(ConfigError, match=r"TensorBoard ended with code \d+; its own words are above\. If the port is in use: --port 0"):
            tensorboard.main([run], Options(port=int(url.rstrip("/").rpartition(":")[2])), StopFlag())
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == ExitCode.DONE
    assert children and not [child for child in children if os.path.exists(f"/proc/{child}")]


def _served(url: str, run: str, count: int) -> list[int]:
    """The steps that TensorBoard shows, once it shows so many."""
    until, steps = time.monotonic() + PATIENCE_S, list[int]()
    query = f"{url.rstrip('/')}/data/plugin/scalars/scalars?tag=1%20loss%2Ftrain%20loss&run={run.replace('/', '%2F')}"
    while len(steps) < count and time.monotonic() < until:
        try:
            with urllib.request.urlopen(query) as answer:
                steps = [step for _, step, _ in json.load(answer)]
        except OSError:
            steps = []
        time.sleep(0.2)
    return steps


def test_nothing_but_event_files_reaches_tensorboard(tmp_path: Path) -> None:
    """Its projector reads whatever file a projector_config.pbtxt names, and profiles and sprites are read by name too."""
    run = tmp_path / "run"
    _run(str(run), range(1, 3)).close()
    for name in ("projector_config.pbtxt", "dvae/projector_config.pbtxt", "x.tfevents.d/projector_config.pbtxt", "plugins/profile/r/a.xplane.pb"):
        place = run / "tensorboard" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text('embeddings { metadata_path: "/etc/passwd" }')
    os.mkfifo(run / "tensorboard" / "pipe.tfevents")
    tensorboard.main([str(run)], Options(out=str(tmp_path / "copy"), once=True), StopFlag())
    copied = [path.name for path in (tmp_path / "copy").rglob("*") if path.is_file() and path.name != ".copied-from"]
    assert copied and all("tfevents" in name for name in copied) and _losses(tmp_path / "copy" / "run" / "dvae")
