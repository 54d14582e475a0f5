"""Checks of this machine before work begins, each against a limit. A check takes seconds, names its limit, and says what to do. No torch."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from infra import environment, interfaces, objects, s3, storage
from infra.errors import ConfigError, ReportedError
from infra.repository import REPOSITORY

SHM = "/dev/shm"
SHM_FLOOR = 512 << 20
"""Least free bytes in /dev/shm: loaders and NCCL share memory there."""
DISK_FLOOR = 2 << 30
"""Least free bytes where temporary files go: shards in use, checkpoints on their way to S3."""
LATENCY_FLOOR_S = 5.0
"""Most seconds for writing and reading one small file in the run folder."""
SKEW_FLOOR_S = 60.0
"""Most seconds between this clock and the storage's: S3 refuses signatures at 900, and records of several nodes are ordered by time."""
TEMPERATURE_FLOOR_C = 85
"""An idle GPU at this many degrees is not being cooled."""
STEP_S = 5.0
"""Seconds of KillWait to leave for the update that comes before a save."""
_SMI_S = 10
_SHM_ADVICE = "raise cluster.shm_gib (pods), mount one (mount -t tmpfs -o size=2g tmpfs /dev/shm), or delete stale files in /dev/shm"


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    check: str
    ok: bool
    found: str
    floor: str = ""
    advice: str = ""
    """What to do if it is not ok."""
    nodes: tuple[str, ...] = ()
    """Names of the nodes that it concerns; empty: the node that checked."""


def node_name(env: Mapping[str, str] = os.environ) -> str:
    """The name that the scheduler gives this node, else its host name."""
    return environment.text("SLURMD_NODENAME", env=env) or environment.text("NODE_NAME", env=env) or os.uname().nodename


def exclusion(node: str, env: Mapping[str, str] = os.environ) -> str:
    """How to keep a node out of the next attempt."""
    if env.get("KUBERNETES_SERVICE_HOST"):
        return f"kubectl cordon {node}"
    if env.get("SLURM_JOB_ID"):
        return f"sbatch --exclude={node} (now: scontrol update jobid={env['SLURM_JOB_ID']} excnodelist={node})"
    return f"{node}: mend it before the next run"


def memory_and_disk() -> list[Finding]:
    """Free space in /dev/shm and in the temporary folder."""
    try:
        scratch = str(environment.temporary())
    except ConfigError as error:
        return [_room("shm", SHM, SHM_FLOOR, _SHM_ADVICE), Finding("disk", False, str(error), _gib(DISK_FLOOR), "set TMPDIR to a folder with room")]
    return [_room("shm", SHM, SHM_FLOOR, _SHM_ADVICE), _room("disk", scratch, DISK_FLOOR, f"make room in {scratch}, or set TMPDIR")]


def _room(check: str, place: str, floor: int, advice: str) -> Finding:
    try:
        free = shutil.disk_usage(place).free
    except OSError as error:
        return Finding(check, False, f"{place}: {error.strerror}", _gib(floor), f"there must be such a folder; then {advice}")
    return Finding(check, free >= floor, _gib(free), _gib(floor), advice)


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def run_storage(url: str) -> list[Finding]:
    """Write, read and delete a small file in the run folder; its time stamp shows the storage's clock. A slow storage is tried twice, because an fsync may stall."""
    try:
        tries = [_try_storage(url)]
        if tries[0][1] > LATENCY_FLOOR_S:
            tries.append(_try_storage(url))
    except ReportedError as error:
        return [Finding("storage", False, str(error), "writable", "check the endpoint, the bucket, its rights and the credentials")]
    once = _creates_once(url)
    equal, seconds, skew = min(tries)  # a try that read other bytes (False sorts first), else the faster one
    good = equal and seconds <= LATENCY_FLOOR_S
    found = f"{seconds:.2f} s" if equal else "read other bytes than it wrote"
    return [
        Finding("storage", good, found, f"{LATENCY_FLOOR_S:.0f} s", "the storage is slow or overloaded: see its own health"),
        Finding(
            "clock",
            skew <= SKEW_FLOOR_S + seconds,
            f"{skew:.0f} s apart",
            f"{SKEW_FLOOR_S:.0f} s",
            "synchronise this node's clock (chronyc tracking)",
        ),
        *once,
    ]


def _creates_once(url: str) -> list[Finding]:
    """Whether the storage can create an object only once, which keeps launchers apart. Local file systems always can, with or without hard links."""
    if not storage.is_remote(url):
        return []
    probe = storage.join(url, f".doctor-{secrets.token_hex(8)}")
    try:
        storage.create_once(probe, b"1")
        objects.store(probe).check_creation(probe)
    except ReportedError as error:
        return [Finding("exclusive", False, str(error), "If-None-Match", "see cluster.kept_apart in docs/configuration.md")]
    finally:
        storage.delete(probe)
    return [Finding("exclusive", True, "declared (cluster.kept_apart)" if s3.kept_apart() else "objects are created once", "If-None-Match")]


def _try_storage(url: str) -> tuple[bool, float, float]:
    """Whether a small file is read as it was written, how many seconds that took, and how many seconds the storage's clock is off."""
    probe = storage.join(url, f".doctor-{secrets.token_hex(8)}")
    data = secrets.token_bytes(1024)
    started = time.monotonic()
    storage.write_bytes(probe, data)
    written = storage.modified(probe)
    equal = storage.read_bytes(probe) == data
    seconds = time.monotonic() - started
    storage.delete(probe)
    return equal, seconds, abs(time.time() - written)


def gpus(env: Mapping[str, str] = os.environ) -> list[Finding]:
    """Count, memory errors and temperature of this node's GPUs; no finding on a node that should have no GPU."""
    expected = environment.whole("SLURM_GPUS_ON_NODE", 0, env=env)
    query = ["nvidia-smi", "--query-gpu=index,temperature.gpu,ecc.errors.uncorrected.volatile.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=_SMI_S, check=True).stdout
    except FileNotFoundError:
        return [Finding("gpus", not expected, "no nvidia-smi", f"{expected} GPUs", "the driver is not installed here")] if expected else []
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        return [Finding("gpus", False, f"nvidia-smi: {error}", "answers", "the driver hangs or lost a GPU: reboot the node")]
    rows = [[word.strip() for word in line.split(",")] for line in answer.splitlines() if line.strip()]
    hot = [row[0] for row in rows if row[1].isdigit() and int(row[1]) >= TEMPERATURE_FLOOR_C]
    broken = [row[0] for row in rows if row[2].isdigit() and int(row[2]) > 0]
    found = [Finding("gpus", len(rows) >= expected, f"{len(rows)}", f"{expected}", "a GPU fell off the bus: reboot the node")]
    found.append(
        Finding("ecc", not broken, f"uncorrected errors on {', '.join(broken)}" if broken else "none", "none", "reset or replace these GPUs")
    )
    found.append(
        Finding("temperature", not hot, f"hot: {', '.join(hot)}" if hot else "ok", f"below {TEMPERATURE_FLOOR_C} C", "check fans and airflow")
    )
    return found


def host_name() -> list[Finding]:
    """Which network gloo uses, on a node whose host name resolves to the loopback; no finding on any other."""
    name = os.uname().nodename
    if not interfaces.is_loopback(name):
        return []
    given = environment.text("GLOO_SOCKET_IFNAME")
    what = (
        f"GLOO_SOCKET_IFNAME = {given} is used" if given else "a job takes the interface by which node 0 is reached (GLOO_SOCKET_IFNAME sets another)"
    )
    return [Finding("host name", True, f"{name} leads to the loopback or nowhere: {what}")]


def kill_wait(saves: Mapping[str, float]) -> list[Finding]:
    """Whether SLURM's KillWait is long enough for a save; no finding without SLURM. A warning only: it is no fault of the node.

    Args:
        saves: stage -> seconds that its last save took.
    """
    try:
        answer = subprocess.run(["scontrol", "show", "config"], capture_output=True, text=True, timeout=_SMI_S, check=True).stdout
    except (OSError, subprocess.CalledProcessError, subprocess.TimeoutExpired):
        return []
    found = re.search(r"^KillWait\s*=\s*(\d+)", answer, re.MULTILINE)
    if found is None:
        return []
    seconds, slow = int(found[1]), {stage: took for stage, took in saves.items() if took > int(found[1]) - STEP_S}
    if not slow:
        return [Finding("KillWait", True, f"{seconds} s", "a save")]
    words = ", ".join(f"'{stage}' took {took:.0f} s" for stage, took in slow.items())
    advice = (
        "scancel, scontrol requeue and a lost node would cut it short: raise KillWait in slurm.conf, or send USR2 first (scancel --signal=USR2 JOB)"
    )
    return [Finding("KillWait", True, f"WARNING: {seconds} s, and the last save of {words}; {advice}", "a save")]


def packages() -> Finding:
    """Whether everything that requirements.txt names is installed; not whether versions are in its ranges, which pip looks after."""
    lines = (REPOSITORY / "requirements.txt").read_text().splitlines()
    names = [re.split(r"[<>=!~;\[ ]", line)[0] for line in lines if line and not line.startswith("#")]
    missing = [name for name in names if not _is_installed(name)]
    found = f"{', '.join(missing)} missing" if missing else f"all {len(names)} of requirements.txt"
    return Finding(
        "packages", not missing, found, "those of requirements.txt", f"run: {sys.executable} -m pip install -r requirements.txt -c constraints.txt"
    )


def _is_installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def apex() -> Finding:
    """Whether NVIDIA's apex can be used, and if not, why. It is optional."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        why = "absent (optional: it is built from NVIDIA's sources)"
    elif not (Path(next(iter(spec.submodule_search_locations or [""]))) / "optimizers").is_dir():
        why = "absent: the installed 'apex' is another project of that name"
    elif importlib.util.find_spec("amp_C") is None:
        why = "present without its CUDA extensions: of no use; build it with APEX_CPP_EXT=1 APEX_CUDA_EXT=1"
    else:
        why = "present, with CUDA extensions"
    return Finding("apex", True, why)
