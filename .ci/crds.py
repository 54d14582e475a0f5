"""Write tests/crds from the CRD files of projects: group, kind, and the schema of each served version that is not deprecated. Usage: .ci/crds.py FOLDER

FOLDER holds files such as config/crd/bases has them; tests/crds/SOURCES.md names repositories and commits. Descriptions and list types are left out, rules stay.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

TARGET = Path(__file__).resolve().parent.parent / "tests" / "crds"
WANTED = (
    "jobset.x-k8s.io_jobsets",
    *(f"kueue.x-k8s.io_{name}" for name in ("clusterqueues", "localqueues", "resourceflavors", "topologies")),
    *(f"trainer.kubeflow.org_{name}" for name in ("trainingruntimes", "trainjobs")),
)
DROPPED = {"description", "x-kubernetes-list-type", "x-kubernetes-list-map-keys", "x-kubernetes-map-type"}


def slim(node: Any, *, names: bool = False) -> Any:
    """A schema without words; ``names``: the keys are names of fields, which may be called 'description' themselves."""
    if isinstance(node, dict):
        return {key: slim(value, names=key == "properties" and not names) for key, value in node.items() if names or key not in DROPPED}
    return [slim(each) for each in node] if isinstance(node, list) else node


def main(folder: Path) -> None:
    """Write every wanted file."""
    for name in WANTED:
        spec = yaml.load((folder / f"{name}.yaml").read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]
        served = [version for version in spec["versions"] if version["served"]]
        versions = {version["name"]: slim(version["schema"]["openAPIV3Schema"]) for version in served if not version.get("deprecated")}
        for schema in versions.values():
            schema["properties"].pop("status", None)
            trim(schema)
        found = {
            "group": spec["group"],
            "kind": spec["names"]["kind"],
            "deprecated": [version["name"] for version in served if version.get("deprecated")],
            "versions": versions,
        }
        (TARGET / f"{name}.json").write_text(json.dumps(found, separators=(",", ":")) + "\n")
        print(name, sorted(versions), "deprecated:", found["deprecated"])


def trim(schema: dict[str, Any]) -> None:
    """The MPI and Flux policies of training runtimes, which are large and not ours."""
    policy = schema["properties"]["spec"]["properties"].get("mlPolicy", {}).get("properties", {})
    for name in ("mpi", "flux"):
        policy.pop(name, None)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
