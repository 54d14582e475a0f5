"""A link between two pods goes down in mid-training: the node behind it is named, and the gang goes on once it is there again. Needs root; about 2 minutes."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest

from infra import ledger
from infra.run_folder import RunFolder
from tests.infra.test_k8s_run import named, settings
from tests.support import k8s_local, manifests
from tests.support.root import ROOT
from tests.system.test_training import copy_of, run_stage

pytestmark = pytest.mark.soak


def test_a_link_that_goes_down_names_the_node_behind_it(kubectl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not k8s_local.available():
        pytest.skip("no namespaces: this test needs root and unshare")
    monkeypatch.chdir(ROOT)
    (tmp_path / "base").mkdir()
    run_stage("prepare", str(tmp_path / "base"), [])
    run = (
        copy_of(tmp_path / "base", tmp_path / "pods", changes={"dvae_fit.steps": 400, "dvae_fit.eval_every": 400, "dvae_fit.save_every": 10}) / "tiny"
    )
    document = named(manifests.build(kubectl, ROOT / "infra" / "k8s" / "overlays" / "cpu"), "JobSet", "dvae")
    down: list[float] = []

    def link(cluster: k8s_local.Cluster, state: str) -> None:
        subprocess.run(["nsenter", "-t", str(cluster._holders[1]), "-n", "ip", "link", "set", "eth0", state], check=True)

    def disturb(cluster: k8s_local.Cluster) -> None:
        if not down and list((run / "dvae" / "checkpoints").glob("*/meta.json")):
            down.append(time.monotonic())
            link(cluster, "down")
        elif len(down) == 1 and cluster.restart:
            down.append(time.monotonic())
            link(cluster, "up")

    cluster = k8s_local.Cluster(document, tmp_path, settings(run) | {"LAUNCHER_HANG_S": "30"})
    assert cluster.run(disturb, timeout_s=900) == "Complete", cluster.output.read_text()
    first = ledger.read(RunFolder(str(run)), "dvae")[0]
    print(f"the gang ended {down[1] - down[0]:.0f} s after the link went down: {first.reason}")
    text = cluster.output.read_text()
    assert "node 1 (" in text and "has given no sign for" in text, text[-3000:]
    begin = json.loads((run / "exits/dvae/attempt-1/begin.json").read_text())
    assert begin["run_id"] == "uid-1.1" and begin["start"]
