"""The fields of a run folder's JSON files, against which they are checked when they are read back; see ``infra/stored.py``."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from infra.job import NAMESPACE
from infra.stored import Code, Count, Number, Seconds, Stored

_Text = Annotated[str, Field(max_length=1 << 20)]


class Config(Stored):
    """config.json: sections of keys. The configuration itself checks their values when a run is started from it."""

    __pydantic_extra__: dict[str, dict[str, Any]]


class _Place(Stored):
    """Where the folder has been since a time."""

    url: _Text
    time: Seconds = 0.0


class Provenance(Stored):
    """provenance.json."""

    created: Seconds = 0.0
    commit: _Text = ""
    command: _Text = ""
    changes: list[dict[str, Any]] = Field(default_factory=list)
    places: list[_Place] = Field(default_factory=list)


class Done(Stored):
    """<stage>/done.json."""

    seconds: Seconds = 0.0
    world_size: Count | None = None
    versions: dict[str, _Text] = Field(default_factory=dict)
    parents: dict[str, Any] = Field(default_factory=dict)
    summary: dict[str, Any] = Field(default_factory=dict)
    throughput: dict[str, Any] = Field(default_factory=dict)


class Begin(Stored):
    """exits/<stage>/attempt-<k>/begin.json."""

    time: Seconds = 0.0
    size: Annotated[int, Field(ge=1, lt=1 << 24)] = 1
    run_id: _Text = ""
    start: _Text = ""
    rendezvous: _Text = ""
    restart: Count = 0
    saved: Annotated[int, Field(ge=-1, lt=1 << 53)] = -1


class End(Stored):
    """exits/<stage>/attempt-<k>/end.json."""

    code: Code
    reason: _Text
    ended: Seconds = 0.0
    """When the last of the crashed ranks ended; 0 if none crashed."""


class Lost(Stored):
    """exits/<stage>/attempt-<k>/lost.json: nodes that stopped giving signs of life."""

    reason: _Text


class Alike(End):
    """Ranks of a node that ended with the same code and reason, each as [rank, time]."""

    ranks: list[Annotated[list[Seconds], Field(min_length=2, max_length=2)]]


class NodeSummary(Stored):
    """exits/<stage>/attempt-<k>/node-<n>.json."""

    node: Count
    ranks: Annotated[int, Field(ge=0, lt=1 << 24)]
    alike: list[Alike]


class RankRecord(End):
    """exits/<stage>/attempt-<k>/rank-<r>.json."""

    rank: Count
    time: Seconds


_JOB = r"^[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?$"


class Submitted(Stored):
    """jobs/<stage>.json. What it says becomes words of squeue, scancel and kubectl: in a run of somebody else, an option among them could end every job."""

    scheduler: Literal["slurm", "k8s"]
    job: Annotated[str, Field(pattern=_JOB)]
    """SLURM: digits. Kubernetes: name of the object."""
    name: Annotated[str, Field(pattern=r"^([a-z0-9][a-z0-9-]{0,100})?$")] = ""
    """SLURM: the job's name, which tells it from a job of another cluster, or of later, that has the same number."""
    submitted: Seconds
    asked: list[_Text] = Field(default_factory=list)
    output: Annotated[str, Field(max_length=5000, pattern=r"^(([^\x00]*/)?[a-z0-9][a-z0-9-]{0,100}-(%A_%a|%j)\.out)?$")] = ""
    """SLURM: pattern of the files that hold its output, below the run folder where it begins with no /. Other files are not read by what it says."""
    kind: Literal["", "job", "jobset"] = ""
    namespace: Annotated[str, Field(pattern=NAMESPACE)] = ""
    """Kubernetes: as kubectl names them."""
    shares: Count = 1

    @model_validator(mode="after")
    def _of_its_scheduler(self) -> Self:
        if self.scheduler == "slurm" and not re.fullmatch("[0-9]{1,18}", self.job):
            raise ValueError("job: a job of SLURM has a number")
        if ".." in self.output.split("/"):
            raise ValueError("output: leads out of its folder")
        return self


class LiveRank(Stored):
    """A rank in live/<stage or share>/node-<n>.json."""

    rank: Count
    state: Annotated[str, Field(max_length=8)] = ""
    """The kernel's letter for its process; empty where it is gone."""
    heard_s: Seconds = 0.0
    """Since it last showed that it runs, when the file was written."""
    said_s: Seconds = 0.0
    """Since it last said what it is at."""
    phase: _Text = ""
    """What it does that is no update."""
    title: _Text = ""
    done: Count = 0
    total: Count = 0
    unit: _Text = ""
    rate: Number = 0.0
    """Units a second, over the last minute."""
    eta_s: Number | None = None
    loss: float | None = None
    of_median: Number | None = None
    """Speed of the last updates over the median of this attempt's."""
    usual_s: Seconds = 0.0
    """Seconds of an update, the median of this attempt's; 0 where it is not known."""
    skipped: Count = 0
    slow: list[Annotated[list[Number], Field(min_length=2, max_length=2)]] = Field(default_factory=list)
    """Stragglers: rank, and time of its own work over the median of all ranks."""


class Live(Stored):
    """live/<stage or share>/node-<n>.json."""

    attempt: Count
    node: Count
    name: _Text
    written: Seconds
    every_s: Seconds = 10.0
    ended: bool = False
    ranks: list[LiveRank]


class Evidence(Stored):
    """exits/<stage>/attempt-<k>/evidence-<n>.json: what a launcher knows of ranks that ended by a fault."""

    node: Count
    name: _Text
    signals: dict[str, _Text] = Field(default_factory=dict)
    """Rank -> signal that ended it."""
    out_of_memory_kills: Count = 0
    """Processes that the kernel killed on the node in this attempt for want of memory."""
    checks: list[_Text] = Field(default_factory=list)
    """What of the node missed its floor afterwards."""
    words: dict[str, list[_Text]] = Field(default_factory=dict)
    """Rank -> the last lines that it printed."""


class Rows(Stored):
    """<stage>/rows.json."""

    rows: Annotated[int, Field(ge=1, lt=1 << 31)]


class PrecisionChoice(Stored):
    """precision.json."""

    precision: Literal["bf16", "fp16", "fp32"]


class NodeVersions(Stored):
    """preflight/<job>/node-<i>.json."""

    node: _Text
    producer: dict[str, Any]


class ChangePoint(Stored):
    """An entry of <stage>/changes.json, and of a checkpoint's list of change points."""

    step: Count
    changed: dict[str, Annotated[list[Any], Field(min_length=2, max_length=2)]]
    schedule: Literal["recomputed", "kept", "restarted"]
    curve: Annotated[list[Count], Field(min_length=2, max_length=2)]
    time: Seconds = 0.0
    commit: _Text = ""


class AttentionEngine(Stored):
    """attention/<device>-<dtype>.json."""

    engine: Annotated[str, Field(pattern=r"^[a-z0-9_-]{1,40}$")]


class Evaluation(Stored):
    """evaluate/metrics.json: the figures that docs/demo.md quotes."""

    psnr_db: Number
    code_use: Number
    ce_below_unigram_percent: Number
    image_ce_nats: Number
    unigram_entropy_nats: Number
    caption_gain_nats: Number
    clip_chance: Number
    clip_recall_at_1: Number


class _Split(Stored):
    count: Count
    licenses: dict[str, Count]


class Summary(Stored):
    """images/summary.json."""

    splits: dict[str, _Split]


class Request(Stored):
    """locks/<stage>/request-*.json."""

    job: _Text
    restart: Count


class Lease(Stored):
    """locks/<stage>/<n>.json."""

    token: _Text
    node: _Text
    pid: Annotated[int, Field(ge=0, lt=1 << 31)]
    process: _Text
    job: _Text
    restart: Count
    begun: Seconds
    lease_s: Annotated[float, Field(gt=0, le=1e6)]
    beat: Count = 0
    released: bool = False
