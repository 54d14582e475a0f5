"""A job of the same name in a cluster: left alone, refused with the difference, or replaced. A recording kubectl holds the cluster. A few seconds."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from infra import k8s_standing, k8s_submit
from infra.errors import ConfigError
from infra.job import ClusterConfig, JobSpec, Shape

IMAGE = "registry.example/team/launcher@sha256:" + "0a" * 32
CLUSTER = """#!/bin/sh
# $RECORD/standing is the answer to 'get'; everything else is written down, and 'delete' takes the job away unless it is stuck.
printf '%s\\n' "$*" >> "$RECORD/calls"
case "$1" in
    kustomize) cat "$RECORD/rendered" ;;
    get) [ ! -f "$RECORD/down" ] || { echo 'connection refused' >&2; exit 1; }; cat "$RECORD/standing" 2> /dev/null || true ;;
    delete) [ ! -f "$RECORD/stuck" ] || { echo 'timed out waiting for the condition' >&2; exit 1; }; rm -f "$RECORD/standing" ;;
    apply) cat > "$RECORD/applied"; echo created ;;
esac
"""
RENDERED = """kind: JobSet
metadata:
  annotations:
    text-to-image/asked: '{}'
  labels:
    stage: dalle
spec: SPEC
---
kind: Job
metadata:
  labels:
    stage: prepare
spec: OTHER
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "kubectl").write_text(CLUSTER)
    (tmp_path / "kubectl").chmod(0o755)
    (tmp_path / "rendered").write_text(RENDERED)
    monkeypatch.setenv("RECORD", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


def spec(shape: Shape = "gang", **values: Any) -> JobSpec:
    given: dict[str, Any] = {"image": IMAGE, "nodes": 4} | values
    return JobSpec("dalle", "mine", "s3://bucket/runs/mine", shape, ClusterConfig(**given))


def stands(cluster: Path, job: JobSpec, *conditions: str, asked: dict[str, str] | None = None) -> None:
    """Let the cluster hold a job with these conditions, submitted as ``job``."""
    values = k8s_standing.asked(job, k8s_submit.digest(job, (cluster / "rendered").read_text())) if asked is None else asked
    found = {
        "metadata": {"name": job.name, "annotations": {k8s_standing.ASKED: json.dumps(values)} if values else {}},
        "status": {"conditions": [{"type": "Suspended", "status": "False"}, *({"type": each, "status": "True"} for each in conditions)]},
    }
    (cluster / "standing").write_text(json.dumps(found))


def verbs(cluster: Path) -> list[str]:
    return [line.split()[0] for line in (cluster / "calls").read_text().splitlines()]


def test_nothing_there_is_submitted(cluster: Path) -> None:
    assert k8s_submit.submit(spec()) == "created\n" and verbs(cluster) == ["kustomize", "get", "apply"]
    assert "get jobset mine-" in (cluster / "calls").read_text() and "--namespace=default" in (cluster / "calls").read_text()


@pytest.mark.parametrize(
    ("condition", "shape", "word"), [("Completed", "gang", "finished"), ("Failed", "gang", "failed"), ("Complete", "node", "finished")]
)
def test_an_ended_job_is_replaced_under_its_name_and_the_dry_run_says_so(cluster: Path, condition: str, shape: Shape, word: str) -> None:
    stands(cluster, spec(shape, nodes=2), condition)
    assert f"# replace: {'jobset' if shape == 'gang' else 'job'} {spec().name} in namespace default has {word}; it is deleted" in k8s_submit.shown(
        spec(shape)
    )
    assert "delete" not in verbs(cluster), "a dry run changes nothing"
    assert k8s_submit.submit(spec(shape)) == "created\n" and verbs(cluster)[-2:] == ["delete", "apply"]
    assert "--cascade=foreground" in (cluster / "calls").read_text(), "its pods are gone before the next ones come"


def test_a_live_job_with_the_same_values_is_left_alone(cluster: Path) -> None:
    stands(cluster, spec())
    assert k8s_submit.submit(spec()).endswith("is there already with the same values, and not ended: left alone\n")
    assert verbs(cluster) == ["kustomize", "get"]
    (cluster / "rendered").write_text(RENDERED.replace("OTHER", "CHANGED"))
    assert "left alone" in k8s_submit.submit(spec()), "another stage's files are not this one's"


def test_a_live_job_with_other_values_is_refused_with_the_difference(cluster: Path) -> None:
    stands(cluster, spec())
    with pytest.raises(ConfigError) as refused:
        k8s_submit.submit(spec(nodes=8, disk_gib=500))
    assert "cluster.disk_gib = 0, now 500; cluster.nodes = 4, now 8. Give the values that it has, or delete it first (it saves)" in str(refused.value)
    assert f"kubectl delete jobset {spec().name} -n default" in str(refused.value) and "apply" not in verbs(cluster)
    assert "# refuse: " in k8s_submit.shown(spec(nodes=8))
    (cluster / "rendered").write_text(RENDERED.replace("SPEC", "CHANGED"))
    with pytest.raises(ConfigError, match=r"the files of overlay cpu \(or of its base or site\) have changed"):
        k8s_submit.submit(spec())
    stands(cluster, spec(), asked={})
    with pytest.raises(ConfigError, match=r"it was not submitted by launcher\.py"):
        k8s_submit.submit(spec())


def test_pods_that_do_not_go_are_named_and_nothing_is_applied_over_them(cluster: Path) -> None:
    stands(cluster, spec(), "Failed")
    (cluster / "stuck").touch()
    with pytest.raises(
        ConfigError, match=r"timed out waiting for the condition A pod that is not removed is on a node that does not answer: docs/cluster\.md"
    ):
        k8s_submit.submit(spec())
    assert "apply" not in verbs(cluster)


def test_a_dry_run_without_a_cluster_says_that_it_was_not_asked(cluster: Path) -> None:
    (cluster / "down").touch()
    assert "# the cluster was not asked what is there already: kubectl get jobset" in k8s_submit.shown(spec())
    with pytest.raises(ConfigError, match="connection refused"):
        k8s_submit.submit(spec())
