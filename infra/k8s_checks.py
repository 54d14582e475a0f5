"""What a job asks of Kueue, looked up in the cluster before it is submitted: where it is missing, the job would wait in silence for ever. No torch."""

from __future__ import annotations

import re
import sys

from infra import environment, kubectl
from infra.errors import ConfigError
from infra.job import JobSpec

QUEUE = "kueue.x-k8s.io/queue-name"
"""Label of a job: the LocalQueue, in the job's own namespace, through which Kueue admits it."""


def unsaid_endpoint(spec: JobSpec, rendered: str) -> str:
    """A line where S3 is another server for who submits than for pods; '' where nothing is to be said."""
    given = environment.text("S3_ENDPOINT_URL")
    if not given or not spec.run_url.startswith("s3://") or re.search(r"^  S3_ENDPOINT_URL:", rendered, re.M):
        return ""
    return (
        "S3_ENDPOINT_URL is set here, and in no setting of the pods: unless the secret launcher-s3 has it, they ask AWS. Name it in "
        "infra/k8s/site/kustomization.yaml, whose recipes show how."
    )


def require(spec: JobSpec, job: str) -> None:
    """Refuse a job whose queue or level of topology the cluster does not have.

    Args:
        job: the job's rendered manifest.

    Raises:
        ConfigError: one of them is not there.
    """
    if spec.shape == "gang" and spec.cluster.topology:
        levels = _names(["topologies.kueue.x-k8s.io"], "{.items[*].spec.levels[*].nodeLabel}")
        if levels is not None and spec.cluster.topology not in levels:
            raise ConfigError(
                f"cluster.topology = {spec.cluster.topology}: no Topology of this cluster has such a level (it has: {', '.join(levels) or 'none'}), so Kueue would "
                "never admit the job; name one of them, or leave it empty."
            )
    queue = re.search(rf"^    {re.escape(QUEUE)}: (\S+)$", job, re.M)
    if queue is None:
        return
    name, namespace = queue[1].strip("\"'"), spec.cluster.namespace
    queues = _names(["localqueues.kueue.x-k8s.io", f"--namespace={namespace}"], "{.items[*].metadata.name}")
    if queues is not None and name not in queues:
        raise ConfigError(
            f"queue {name}: namespace {namespace} has no LocalQueue of this name (it has: {', '.join(queues) or 'none'}), so Kueue would never admit the job; "
            "name one of them by cluster.queue, choose cluster.namespace, or have the queue made (docs/cluster.md, 'Queues')."
        )


def _names(what: list[str], path: str) -> list[str] | None:
    """Names that the cluster lists; None where this account may not list them, which is no reason to refuse its job."""
    try:
        return kubectl.run(["get", *what, f"--output=jsonpath={path}", kubectl.PATIENCE]).split()
    except ConfigError as error:
        if "(Forbidden)" not in str(error):
            raise
        print(f"not checked, because this account may not list them: {what[0]}", file=sys.stderr, flush=True)
        return None
