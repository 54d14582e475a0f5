"""``launcher.py tensorboard RUN...``: TensorBoard over runs on any storage, fed by a local copy of their event files that grows with them.

TensorBoard reads s3:// by itself only once: its loader does not notice that an object has grown (tensorboard issues 1494 and 6712).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from infra import scratch, signals, storage
from infra.errors import ConfigError, DataError, UsageError
from infra.mirror import Look, Mirror
from infra.run_folder import RunFolder
from infra.signals import StopFlag
from infra.text import counted
from train.run.run_names import distinct

_LOOK_S = 0.2
_PATIENCE_S = 10.0
"""What TensorBoard gets to end."""


@dataclass(frozen=True)
class Options:
    """How TensorBoard is fed and served."""

    out: str = ""
    """Folder of the copy; empty: a temporary one."""
    every_s: float = 30.0
    once: bool = False
    host: str = "127.0.0.1"
    port: int = 6006


def main(urls: list[str], options: Options, stop: StopFlag) -> None:
    """Copy event files, serve them, and go on copying until a stop signal comes, which is the normal way to end it.

    Raises:
        DataError: there is no run in a folder.
        UsageError: a copy was asked for without a place, or with one on an object store.
        ConfigError: TensorBoard ended by itself; or the folder of the copy holds something else.
    """
    if options.once and not options.out:
        raise UsageError("--once copies event files and ends, so it needs a place for them: --out FOLDER.")
    if options.out and storage.is_remote(options.out):
        raise UsageError(f"--out {options.out}: event files are copied to a folder of this machine.")
    for url in urls:
        if not storage.exists(RunFolder(url).config_url):
            raise DataError(f"{RunFolder(url).config_url} is missing: {url} is no run folder.")
    if options.out:
        _feed(urls, storage.local_path(options.out), options, stop)
        return
    with scratch.folder("tensorboard-") as room:
        _feed(urls, Path(room), options, stop)


def _feed(urls: Sequence[str], folder: Path, options: Options, stop: StopFlag) -> None:
    mirrors = {name: Mirror(RunFolder(url).at("tensorboard"), folder / name, _is_event_file) for name, url in distinct(urls).items()}
    with ExitStack() as held:
        for mirror in mirrors.values():
            held.enter_context(mirror.claimed())
        _go_on(mirrors, folder, options, stop)


def _go_on(mirrors: dict[str, Mirror], folder: Path, options: Options, stop: StopFlag) -> None:
    looks = _look(mirrors)
    for name, look in looks.items():
        if not look.files and not look.failed:
            print(f"{name}: no event files yet in {mirrors[name].url}", flush=True)
    if options.once:
        if failed := next((found.failed for found in looks.values() if found.failed), ""):
            raise DataError(failed)
        print(f"{folder}: tensorboard --logdir {folder}", flush=True)
        return
    server = _serve(folder, options)
    try:
        due = time.monotonic() + options.every_s
        while not stop:
            time.sleep(_LOOK_S)
            if server.poll() is not None:
                raise ConfigError(
                    f"TensorBoard ended with code {server.returncode}; its own words are above. If the port is in use: --port 0 takes a free one."
                )
            if time.monotonic() < due:
                continue
            if any(found.replaced for found in _look(mirrors).values()):  # it has read files that are not there any more
                _end(server)
                server = _serve(folder, options)
            due = time.monotonic() + options.every_s
    finally:
        _end(server)


def _is_event_file(name: str) -> bool:
    return "tfevents" in name.rpartition("/")[2]


def _look(mirrors: dict[str, Mirror]) -> dict[str, Look]:
    """One look at each run, and a line for each of which something was new."""
    found = {name: mirror.look() for name, mirror in mirrors.items()}
    for name, look in found.items():
        if look.grown or look.replaced:
            also = f", {len(look.replaced)} replaced or gone" if look.replaced else ""
            print(f"{name}: {counted(look.files, 'event file')}, {look.grown} of them with something new{also}; {look.read:,} bytes read", flush=True)
    return found


def _serve(folder: Path, options: Options) -> subprocess.Popen[bytes]:
    folder.mkdir(parents=True, exist_ok=True)
    words = [f"--logdir={folder}", f"--host={options.host}", f"--port={options.port}", "--reload_interval=5"]
    parent = os.getpid()
    return subprocess.Popen([sys.executable, "-m", "tensorboard.main", *words], preexec_fn=lambda: signals.die_with_parent(parent))


def _end(server: subprocess.Popen[bytes]) -> None:
    if server.poll() is None:
        server.terminate()
        try:
            server.wait(_PATIENCE_S)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
