"""Run the pods of a JobSet or an Indexed Job on this machine: each in network, UTS, mount and process namespaces of its own, joined by veth pairs.

Stands in for kubelet and the controllers: variables, labels, names of the headless Service, /dev/shm, exit codes, the failure policies of
tests/support/manifests.py, restarts of the gang or of one index. Leaves out images, scheduling, probes and users. Needs root; touches no file of the host.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.manifests import Manifest, job_failure, jobset_action

_PREFIX = "10.77.0."


def available() -> bool:
    """Whether namespaces can be made here."""
    probe = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "true"]
    return os.geteuid() == 0 and subprocess.run(probe, capture_output=True).returncode == 0


def _inside(pid: int, *command: str) -> None:
    subprocess.run(["nsenter", "-t", str(pid), "-n", *command], check=True, capture_output=True)


@contextlib.contextmanager
def network(count: int) -> Iterator[list[int]]:
    """Network namespaces on one switch; yields the process that holds each."""
    holders = [subprocess.Popen(["unshare", "--net", "sleep", "infinity"]) for _ in range(count + 1)]
    ours = os.readlink("/proc/self/ns/net")
    try:
        for holder in holders:
            while os.readlink(f"/proc/{holder.pid}/ns/net") == ours:
                time.sleep(0.01)
        switch = holders[-1].pid
        _inside(switch, "ip", "link", "add", "br0", "type", "bridge")
        _inside(switch, "ip", "link", "set", "br0", "up")
        for index, holder in enumerate(holders[:-1]):
            _inside(switch, "ip", "link", "add", f"v{index}", "type", "veth", "peer", "name", "eth0", "netns", str(holder.pid))
            _inside(switch, "ip", "link", "set", f"v{index}", "master", "br0", "up")
            _inside(holder.pid, "ip", "addr", "add", f"{_PREFIX}{index + 10}/24", "dev", "eth0")
            _inside(holder.pid, "ip", "link", "set", "eth0", "up")
            _inside(holder.pid, "ip", "link", "set", "lo", "up")
        yield [holder.pid for holder in holders[:-1]]
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()


@dataclass
class Cluster:
    """One JobSet or Indexed Job, and what became of it."""

    document: Manifest
    folder: Path
    environment: dict[str, str]
    """What the ConfigMap and the secret would bring."""
    uid: str = "uid-1"
    events: list[str] = field(default_factory=list)
    output: Path = field(init=False)

    def __post_init__(self) -> None:
        self.output = self.folder / "pods.log"
        self.gang = self.document["kind"] == "JobSet"
        self.job: Manifest = self.document["spec"]["replicatedJobs"][0]["template"]["spec"] if self.gang else self.document["spec"]
        self.name: str = self.document["metadata"]["name"]
        self.restart = 0
        self.pods: dict[int, subprocess.Popen[bytes]] = {}

    def run(self, disturb: Callable[[Cluster], None], timeout_s: float) -> str:
        """Run to the end; ``disturb`` is called all the time. Returns Complete, or why it failed."""
        count = self.job["completions"]
        failures, done = dict.fromkeys(range(count), 0), set[int]()
        deadline = time.monotonic() + timeout_s
        with network(count) as self._holders:
            try:
                self.pods = {index: self._start(index) for index in range(count)}
                while len(done) < count:
                    assert time.monotonic() < deadline, f"not finished in {timeout_s} s:\n{self.output.read_text()[-3000:]}"
                    disturb(self)
                    for index, pod in list(self.pods.items()):
                        if index in done or pod.poll() is None:
                            continue
                        code = pod.returncode if pod.returncode >= 0 else 128 - pod.returncode
                        if code == 0:
                            done.add(index)
                        elif (ended := self._failed(index, code, failures, done)) is not None:
                            return ended
                        if not self.pods or self.pods.get(index) is not pod:
                            break
                    time.sleep(0.05)
                return "Complete"
            finally:
                self._stop_all()

    def _failed(self, index: int, code: int, failures: dict[int, int], done: set[int]) -> str | None:
        action, message = job_failure(self.job, code)
        self.events.append(f"pod {index}: exit code {code}, {action}")
        if not self.gang:
            failures[index] += action == "Count"
            if action == "FailIndex" or failures[index] > self.job["backoffLimitPerIndex"]:
                self.events.append(f"index {index} failed")
                done.add(index)
            else:
                self.pods[index] = self._start(index)
            return None
        answer = jobset_action(self.document["spec"], "PodFailurePolicy" if action == "FailJob" else "BackoffLimitExceeded", message)
        self.events.append(answer)
        if answer == "FailJobSet":
            return message
        self._stop_all()
        done.clear()
        self.restart += 1
        self.pods = {each: self._start(each) for each in failures}
        return None

    def _stop_all(self) -> None:
        for pod in self.pods.values():
            if pod.poll() is None:
                os.killpg(pod.pid, signal.SIGKILL)
                pod.wait()

    def _start(self, index: int) -> subprocess.Popen[bytes]:
        container = self.job["template"]["spec"]["containers"][0]
        host = f"{self.name}-workers-0-{index}" if self.gang else f"{self.name}-{index}"
        env = self._variables(container, index)
        words = [self._expand(word, env) for word in container["command"] + container.get("args", [])]
        hosts = self.folder / "hosts"
        names = [f"{self.name}-workers-0-{i}" for i in range(self.job["completions"])]
        hosts.write_text("127.0.0.1 localhost\n" + "".join(f"{_PREFIX}{i + 10} {n}.{self.name} {n}\n" for i, n in enumerate(names)))
        set_up = f'hostname {host}; mount --bind {hosts} /etc/hosts; mount -t tmpfs -o size=1G tmpfs /dev/shm; exec "$@"'
        spaces = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", set_up, "sh"]
        with self.output.open("ab") as log:
            return subprocess.Popen(
                ["nsenter", "-t", str(self._holders[index]), "-n", *spaces, *words], env=env, stdout=log, stderr=log, start_new_session=True
            )

    def _variables(self, container: dict[str, Any], index: int) -> dict[str, str]:
        labels = self.job["template"]["metadata"]["labels"] | {
            "batch.kubernetes.io/job-completion-index": str(index),
            "batch.kubernetes.io/controller-uid": self.uid,
            "jobset.sigs.k8s.io/jobset-name": self.name,
            "jobset.sigs.k8s.io/jobset-uid": self.uid,
            "jobset.sigs.k8s.io/restart-attempt": str(self.restart),
        }
        fields = {"metadata.uid": f"pod-{index}", "spec.nodeName": f"node-{index}"}
        env = {name: os.environ[name] for name in ("PATH", "OMP_NUM_THREADS") if name in os.environ} | self.environment
        env |= {"JOB_COMPLETION_INDEX": str(index), "KUBERNETES_SERVICE_HOST": "10.96.0.1"}
        for entry in container["env"]:
            path = entry.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath", "")
            label = re.fullmatch(r"metadata\.labels\['(.+)'\]", path)
            env[entry["name"]] = labels.get(label[1], "") if label else fields[path] if path else self._expand(entry["value"], env)
        return env

    @staticmethod
    def _expand(text: str, env: dict[str, str]) -> str:
        return re.sub(r"\$\((\w+)\)", lambda match: env.get(match[1], match[0]), text)
