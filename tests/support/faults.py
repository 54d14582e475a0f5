"""The faults that the tests inject, each as production records it, and what is to be done about it (tests/support/fault_verdicts.py)."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from botocore.exceptions import ClientError

from infra import ledger, s3_errors
from infra.errors import ReportedError
from infra.files import write_errors
from train.config import DvaeFit, load_run
from train.loop.diverged import diverged
from train.planning import out_of_memory


@dataclass(frozen=True)
class Fault:
    """A fault, how it is recorded, and what is to be done."""

    words: str
    where: str
    """Tests that inject it."""
    verdict: str
    rule: str
    records: dict[int, tuple[int, str]] = field(default_factory=dict)
    """Rank -> code and reason; a rank without one was killed."""
    signals: dict[int, str] = field(default_factory=dict)
    memory_kills: int = 0
    checks: tuple[str, ...] = ()
    lost: str = ""
    """What node 0 noted of nodes without a sign."""
    end: tuple[int, str] | None = None
    """Written by the job's verdict, where the ledger decides."""
    times: int = 1
    """How often in a row it came, without a checkpoint between."""
    names: str = ""
    """Word that the advice must hold."""


def _explained(code: str, status: int = 503) -> str:
    error = ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject")
    return str(s3_errors._explain("s3://bucket/key", error, 6))


def _full_disk(path: str = "/runs/a/dvae/checkpoints/step-00000010/rank-0.bin") -> str:
    try:
        with write_errors(Path(path)):
            raise OSError(28, "No space left on device")
    except ReportedError as error:
        return str(error)


class OutOfMemoryError(Exception):
    """As torch names it."""


def _memory() -> str:
    words = "CUDA out of memory. Tried to allocate 2.00 GiB."
    return out_of_memory.advice("dvae", load_run("tiny", []), 2, OutOfMemoryError(words))


def _loop(stops: int | None) -> tuple[int, str]:
    """What the ledger says of one attempt too many."""
    code = 1 if stops is None else 75
    made = [ledger.Attempt(n, f"7.{n}", n, code, "rank 0: RuntimeError: boom", -1) for n in range(12)]
    found = ledger.judge(made, -1, 3, stops)
    return int(found.code), found.reason


_BOOM = "RuntimeError: boom"
_HANG = "no progress for 540 s; it stands at train/loop/trainer.py:140 in _train, inside stuck (sitecustomize.py)"
_WAITS = (
    "no progress for 540 s; it waits for other ranks at train/ranks/signal_vector.py:60 in exchange_with; on this node rank 1 (process 12) is stopped"
)
_WORKER = (
    "worker 1 of 2 (pid 17, SIGKILL) of the loader ended; if it was killed for memory, lower data.workers or the batch, or give the job more memory."
)
_GONE = "another rank is gone (RuntimeError: Connection closed by peer)"
_SILENT = "node 1 (n1) has given no sign for 95 s: it is lost, or the link to it"
_LAUNCHER, _WATCHDOG, _AGENT = "tests/system/test_launcher.py", "tests/train/ranks/test_watchdog.py", "tests/infra/test_agent.py"
_STORAGE, _TRAINER, _JOB = "tests/infra/test_storage_faults.py", "tests/train/loop/test_trainer.py", "tests/infra/test_job.py"


_SAVED = "dvae: stopped by a signal after update 40 of 100; saved."
_UNREACHABLE = "storage unreachable: s3://b/x: failed after 6 attempts (Could not connect); check the network and S3_ENDPOINT_URL."
_BOTH = {1: (1, _BOOM), 0: (1, f"ended after rank 1: {_BOOM}")}
FAULTS: tuple[Fault, ...] = (
    Fault(
        "a stop signal (USR2, TERM, INT, HUP), scancel, requeue, time limit",
        "tests/infra/test_stops.py",
        "RESTART",
        "stopped by a signal",
        {0: (75, _SAVED), 1: (75, _SAVED)},
    ),
    Fault(
        "a second launcher, or a launcher that was silent for longer than its lease",
        "tests/infra/test_lease.py",
        "STOP",
        "another launcher has the work",
        {
            0: (
                75,
                "locks/dvae: this launcher was silent for longer than its lease, and the work was taken over by process 12 on n2; nothing more is written here.",
            ),
            1: (75, _SAVED),
        },
    ),
    Fault(
        "a batch that does not divide over the ranks",
        _LAUNCHER,
        "STOP",
        "a wrong configuration or run folder",
        {0: (78, "dvae_fit.batch = 7 does not divide over 2 processes")},
        names="dvae_fit.batch",
    ),
    Fault("refused credentials", _STORAGE, "STOP", "a wrong configuration or run folder", {0: (78, _explained("AccessDenied", 403))}),
    Fault("a bucket that does not exist", _STORAGE, "STOP", "a wrong configuration or run folder", {0: (78, _explained("NoSuchBucket", 404))}),
    Fault(
        "missing, damaged or foreign data, shards or checkpoints",
        "tests/system/test_damaged_files.py",
        "STOP",
        "bad or missing data",
        {
            0: (
                65,
                "images/train/part-0/shard.00000.mds: damaged (its xxh64 is b3ca8c06acef45b1); delete its part and run the stage that wrote it again.",
            )
        },
    ),
    Fault(
        "too many input shards that cannot be read",
        "tests/data_pipeline/prepare/test_failures.py",
        "STOP",
        "bad or missing data",
        {0: (65, "11 input shards could not be read, more than data.max_quarantined = 10")},
        names="data.max_quarantined",
    ),
    Fault(
        "non-finite losses or gradients",
        _TRAINER,
        "STOP",
        "numbers are not finite any more",
        {0: (93, str(diverged("dvae", DvaeFit(), "runs/x", 40, 20, 3, 0))), 1: (93, "the same")},
        names="dvae_fit.lr, dvae_fit.max_bad_steps (--go-on)",
    ),
    Fault(
        "overflows of scaled gradients without end",
        _TRAINER,
        "STOP",
        "scaled gradients overflow without end",
        {0: (93, str(diverged("dvae", DvaeFit(), "runs/x", 540, 20, 0, 500)))},
        names="dvae_fit.lr, dvae_fit.max_overflow_steps (--go-on)",
    ),
    Fault("crashes in a row that saved nothing", _JOB, "STOP", "crashes in a row without progress", end=_loop(None)),
    Fault(
        "starts in a row that moved no checkpoint",
        _JOB,
        "STOP",
        "starts that never reach a checkpoint",
        end=_loop(ledger.STOPS),
        names="cluster.hours",
    ),
    Fault(
        "a GPU whose memory is too small",
        "tests/train/planning/test_planning.py",
        "STOP",
        "a GPU's memory is too small",
        {0: (1, _memory()), 1: (1, _GONE)},
        names="dvae_fit.",
    ),
    Fault(
        "a rank that the kernel killed for want of memory",
        "tests/train/advice/test_verdicts.py",
        "STOP",
        "a node's memory is too small",
        {0: (1, _GONE)},
        {1: "SIGKILL"},
        1,
        names="cluster.memory_gib",
    ),
    Fault(
        "a GPU with uncorrected errors, or that fell off the bus",
        "tests/train/verbs/test_doctor.py",
        "RESTART ELSEWHERE",
        "a node is broken",
        {0: (1, "RuntimeError: CUDA error: uncorrectable ECC error encountered"), 1: (1, _GONE)},
        checks=("ecc: uncorrected errors on GPU 3 (floor: none)",),
        names="n0",
    ),
    Fault(
        "a node whose own disk is full",
        _STORAGE,
        "RESTART ELSEWHERE",
        "a node's own disk is full",
        {0: (1, _full_disk("/tmp/launcher-0/metrics-x/events")), 1: (1, _GONE)},
        checks=("disk: 0.0 GiB (floor: 2.0 GiB)",),
        names="n0",
    ),
    Fault(
        "a run folder whose disk is full",
        "tests/train/weights/test_checkpoint_outage.py",
        "STOP",
        "the disk of the run folder is full",
        {0: (1, _full_disk()), 1: (1, _GONE)},
        names="run.root",
    ),
    Fault(
        "shared memory that is too small",
        "tests/data_pipeline/loading/test_loaders_memory.py",
        "STOP",
        "shared memory is too small",
        {0: (1, _GONE)},
        {1: "SIGBUS"},
        names="cluster.shm_gib",
    ),
    Fault(
        "an outage of the storage, throttling, resets, silence",
        _STORAGE,
        "RESTART",
        "the storage gave no answer",
        {0: (1, _explained("SlowDown")), 1: (1, _GONE)},
    ),
    Fault("credentials that have expired", _STORAGE, "RESTART", "the storage gave no answer", {0: (1, _explained("ExpiredToken", 400))}),
    Fault("an outage while ranks end", _AGENT, "RESTART", "the storage gave no answer", {0: (1, _UNREACHABLE), 1: (1, _UNREACHABLE)}),
    Fault(
        "a lost node, or a link that went down",
        "tests/infra/test_meeting.py",
        "RESTART",
        "a node or its link was lost",
        {0: (1, _GONE)},
        lost=_SILENT,
    ),
    Fault(
        "the same node lost twice",
        "tests/infra/test_meeting.py",
        "RESTART ELSEWHERE",
        "the same node again",
        {0: (1, _GONE)},
        lost=_SILENT,
        times=2,
        names="n1",
    ),
    Fault("a rank that hangs", _WATCHDOG, "RESTART", "a rank hung", {1: (1, _HANG), 0: (1, f"ended after rank 1: {_HANG}")}),
    Fault("a rank that was stopped (SIGSTOP)", _WATCHDOG, "RESTART", "a rank hung", {0: (1, _WAITS)}, {1: "SIGKILL"}),
    Fault(
        "ranks that hang on the same node twice",
        _WATCHDOG,
        "RESTART ELSEWHERE",
        "the same node again",
        {1: (1, _HANG), 0: (1, f"ended after rank 1: {_HANG}")},
        times=2,
        names="n1",
    ),
    Fault(
        "nodes that do not meet",
        _AGENT,
        "RESTART",
        "nodes did not meet",
        {0: (1, "the 2 nodes of job 7.0 did not meet at n0:20007 within 600 s: node 1 did not start, or cannot reach it.")},
    ),
    Fault(
        "a rendezvous that goes away",
        _AGENT,
        "RESTART",
        "nodes did not meet",
        end=(
            1,
            "node 0's rendezvous at n0:20007 went away (RendezvousConnectionError): its launcher was killed, or the network between the nodes is broken; rank 1: x",
        ),
    ),
    Fault("a killed rank (SIGKILL)", _LAUNCHER, "RESTART", "a rank or its launcher was killed", {0: (1, _GONE)}, {1: "SIGKILL"}),
    Fault("a killed launcher", _LAUNCHER, "RESTART", "a rank or its launcher was killed"),
    Fault(
        "a broken process (SIGSEGV, SIGABRT ...)",
        "tests/train/advice/test_verdicts.py",
        "RESTART",
        "a process broke",
        {0: (1, _GONE)},
        {1: "SIGSEGV"},
    ),
    Fault(
        "a loader's worker that was killed",
        "tests/data_pipeline/loading/test_loaders_workers.py",
        "RESTART",
        "a rank or its launcher was killed",
        {0: (1, _WORKER), 1: (1, _GONE)},
    ),
    Fault("an error of the code", _LAUNCHER, "RESTART", "an error of the code", _BOTH),
    Fault("the same error of the code again", _LAUNCHER, "STOP", "the same error again, and no checkpoint between", _BOTH, times=2),
)
"""All of them, those of one rule together."""
