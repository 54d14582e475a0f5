"""Section: the exact commands to reproduce the run."""

from __future__ import annotations

import json
import shlex

from train.config import PRESETS
from train.report.markup import Child, el, join, note, table
from train.report.view import RunView, Section


def _commands(run: RunView) -> list[str]:
    """The commands that run every stage anew. If the run began from a preset and was never changed, that command with 'demo' in place of its stage is enough;
    otherwise the whole configuration is needed, which includes later changes."""
    words = shlex.split(str(run.provenance.get("command") or ""))
    begun = words[3:] if words[:2] == ["python", "launcher.py"] and len(words) > 3 else []
    if begun and (PRESETS / f"{begun[0]}.toml").is_file() and not run.provenance.get("changes"):
        others = [word for word in begun[1:] if not word.startswith("run.name=")]
        return [
            "# every stage, into a run folder of another name",
            shlex.join(["python", "launcher.py", "demo", begun[0], *others, f"run.name={run.name}-again"]),
        ]
    return [
        f"# save the configuration below as {run.name}.json",
        shlex.join(["python", "launcher.py", "demo", f"{run.name}.json", f"run.name={run.name}-again"]),
    ]


def section(run: RunView) -> Section | None:
    """Commit, environment, command and the whole configuration."""
    if not run.config:
        return Section("reproduce", "Reproduce", note("The run folder holds no configuration."))
    commit = str(run.provenance.get("commit", "unknown"))
    clean = commit.removesuffix("+dirty")
    lines = [
        f"git checkout {clean}" if clean != "unknown" else "# the commit is not known: this was no git checkout",
        "pip install -r requirements.txt -c constraints.txt",
        *_commands(run),
    ]
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
