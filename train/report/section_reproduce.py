"""The exact command to reproduce the run."""

from __future__ import annotations

import json

from train.report.markup import Child, el, join, note, table
from train.report.view import RunView, Section


def section(run: RunView) -> Section | None:
    """Commit, environment, command and the whole configuration."""
    if not run.config:
        return Section("reproduce", "Reproduce", note("The run folder holds no configuration."))
    commit = str(run.provenance.get("commit", "unknown"))
    clean = commit.removesuffix("+dirty")
    command = f"python launcher.py demo {run.name}.json"
    lines = [
        f"git checkout {clean}" if clean != "unknown" else "# the commit is not known: this was no git checkout",
        "pip install -r requirements.txt -c constraints.txt",
        f"# save the configuration below as {run.name}.json; set run.name in it to a new name",
        command,
    ]
    given = run.provenance.get("command")
    if isinstance(given, str) and given:
        lines = [*lines[:2], given]
    warnings: Child = None
    if commit.endswith("+dirty"):
        warnings = note("Tracked files differed from this commit when the run began: the commit alone does not reproduce it.")
    config = json.dumps(run.config, indent=2, sort_keys=True, ensure_ascii=False)
    versions = run.provenance.get("versions")
    rows: list[list[Child]] = [[name, str(version)] for name, version in versions.items()] if isinstance(versions, dict) else []
    seed = run.section("run").get("seed")
    return Section(
        "reproduce",
        "Reproduce",
        join(
            note(f"Everything random follows from the seed {seed}." if seed is not None else None),
            el("pre", el("code", "\n".join(lines))),
            warnings,
            el("details", el("summary", f"{run.name}.json, the whole configuration"), el("pre", el("code", config))),
            el("details", el("summary", "versions"), table(["package", "version"], rows)) if rows else None,
        ),
    )
