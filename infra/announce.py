"""Step, loss and time to go where a scheduler shows them: SLURM's comment of the job, and the status of a Kubeflow TrainJob. Off where neither is here.

Called by the thread that listens to the ranks (``infra/listening.py``) of the launcher that has rank 0, which need not be node 0's; never by a training loop, and
no oftener than every EVERY_S. Whatever goes wrong there is said once, and ends no run.
"""

from __future__ import annotations

import datetime
import json
import logging
import shutil
import ssl
import subprocess
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from infra import environment, live
from infra.job import Job
from infra.live import Facts
from infra.progress import duration, three_digits

log = logging.getLogger(__name__)

EVERY_S = 30.0
"""Seconds between two announcements; the last one of an attempt comes at once. LAUNCHER_ANNOUNCE_S."""
_PATIENCE_S = 10.0
_FAILURES = 5
"""In a row, after which nothing more is tried."""
_URL, _TOKEN, _CA = (f"KUBEFLOW_TRAINER_STATUS_{name}" for name in ("URL", "TOKEN", "CA_CERT"))
"""What Kubeflow Trainer (from 2.3 on) gives pods; the token and the certificate are names of files, which are renewed under a run."""

Channel = Callable[[Facts], None]


class Announcer:
    """Passes on what rank 0 said, to channels that are here."""

    def __init__(self, channels: list[tuple[str, Channel]]) -> None:
        self._channels = channels
        self._failures = {name: 0 for name, _ in channels}
        self._every_s = environment.seconds("LAUNCHER_ANNOUNCE_S", EVERY_S)
        self._due = 0.0

    def __call__(self, facts: Facts) -> None:
        """Announce, unless that was done a moment ago."""
        now = time.monotonic()
        if not facts.get("total") or (now < self._due and not facts.get("ended")):
            return
        self._due = now + self._every_s
        if (quiet_s := live.quiet_s(facts)) is not None:
            facts = facts | {"quiet_s": quiet_s, "eta_s": facts.get("eta_s") if facts.get("phase") else None}
        for name, channel in self._channels:
            if self._failures[name] >= _FAILURES:
                continue
            try:
                channel(facts)
                self._failures[name] = 0
            except Exception as error:  # whatever it is, training goes on
                self._failures[name] += 1
                if self._failures[name] == 1:
                    log.warning("%s does not show this run: %s", name, _said(error))


def announcer(job: Job) -> Announcer | None:
    """The announcer of a job; None where there is nobody to tell."""
    channels: list[tuple[str, Channel]] = []
    if job.id and job.id == environment.text("SLURM_JOB_ID") and shutil.which("scontrol"):
        channels.append(("SLURM's comment", SlurmComment(job.id)))
    if environment.text(_URL):
        channels.append(("the TrainJob's status", trainjob_status))
    return Announcer(channels) if channels else None


def line(facts: Facts) -> str:
    """One line: ``dvae 120/1500 8.1/s loss 0.412 ETA 2:51``."""
    words = [str(facts.get("label", "")), f"{facts['done']}/{facts['total']}"]
    if facts.get("ended"):
        words.append("ended")
    elif facts.get("rate"):
        words.append(f"{three_digits(facts['rate'])}/s" + (f" ({facts['quiet_s']:.0f} s ago)" if facts.get("quiet_s") else ""))
    if facts.get("loss") is not None:
        words.append(f"loss {facts['loss']:.4g}")
    if facts.get("eta_s") is not None and not facts.get("ended"):
        words.append(f"ETA {duration(facts['eta_s'])}")
    if facts.get("phase"):
        words.append(f"({facts['phase']})")
    return " ".join(words)


class SlurmComment:
    """The comment of a job, which squeue and scontrol show; one that its owner or site has set is left as it is."""

    def __init__(self, job: str) -> None:
        self._job = job
        self._last: str | None = None

    def __call__(self, facts: Facts) -> None:
        """Set it.

        Raises:
            RuntimeError: SLURM does not take it, or somebody else has set one.
        """
        if self._last is None and (there := self._there()) and not there.startswith(f"{facts.get('label')} "):
            raise RuntimeError(f"job {self._job} has a comment already, which stays: {there[:80]}")
        text = line(facts)
        _run(["scontrol", "update", f"JobId={self._job}", f"Comment={text}"])
        self._last = text

    def _there(self) -> str:
        shown = _run(["scontrol", "show", "job", self._job])
        found = next((each.strip() for each in shown.splitlines() if each.strip().startswith("Comment=")), "")
        return found.removeprefix("Comment=").strip()


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_S, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:3])} ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def trainjob_status(facts: Facts) -> None:
    """Tell Kubeflow Trainer, which shows it in the TrainJob's status, by one POST.

    Raises:
        ValueError: no place for a token: not HTTPS, or its file is missing.
        OSError: no answer, or a refusal.
    """
    url, token, ca = (environment.text(name) for name in (_URL, _TOKEN, _CA))
    if not url.startswith("https://"):
        raise ValueError(f"{_URL} is not https://: the token is sent nowhere else")
    if not token or not Path(token).is_file():
        raise ValueError(f"{_TOKEN} names no file that can be read")
    context = ssl.create_default_context(cafile=ca or None)
    headers = {"Authorization": f"Bearer {Path(token).read_text().strip()}", "Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(status(facts)).encode(), headers, method="POST")
    with urllib.request.build_opener(urllib.request.HTTPSHandler(context=context), _NoRedirects).open(request, timeout=_PATIENCE_S) as answer:
        answer.read()


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A token that is sent on to wherever an answer says would be given away."""

    def redirect_request(self, *_: Any) -> None:
        return None


def status(facts: Facts) -> dict[str, Any]:
    """What is posted."""
    metrics = {"step": str(facts["done"]), "loss": None if facts.get("loss") is None else f"{facts['loss']:.6g}", "stage": facts.get("label")}
    found: dict[str, Any] = {
        "progressPercentage": min(100, 100 * int(facts["done"]) // max(1, int(facts["total"]))),
        "metrics": [{"name": name, "value": value} for name, value in metrics.items() if value],
        "lastUpdatedTime": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    if facts.get("eta_s") is not None:
        found["estimatedRemainingSeconds"] = max(0, round(facts["eta_s"]))
    return {"trainerStatus": found}


def _said(error: Exception) -> str:
    """An error in words, which hold no header of a request."""
    code = getattr(error, "code", "")
    return f"HTTP {code}" if code else f"{type(error).__name__}: {error}"
