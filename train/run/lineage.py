"""Compares what the finished stages of a run were made from with what the run holds now. Reads only small JSON files."""

from __future__ import annotations

from data_pipeline.shards.shard_set import MANIFEST
from infra import storage, stored
from infra.commands import launcher
from infra.run_folder import RunFolder
from train.config import RunConfig
from train.run import places
from train.run.stage_table import STAGES, TRAINED, used_by

_WEIGHTS = (*TRAINED, "tokenizer")


def there(cfg: RunConfig, run: RunFolder) -> dict[str, set[str]]:
    """Kind of input -> the content hashes that exist in the run now."""
    found = {kind: set(((run.done(stage) or {}).get("versions") or {}).values()) for kind, stage in (("images", "prepare"), ("codes", "encode"))}
    for name, url in [
        ("tokenizer", storage.join(places.tokenizer(cfg, run), MANIFEST)),
        *((n, run.at(n, "export", "config.json")) for n in TRAINED),
    ]:
        marker = stored.read_if_there(url, stored.Identified)
        found[name] = set() if marker is None else {str(marker["content_hash"])}
    return found


def seen_by(stage: str, cfg: RunConfig, run: RunFolder, now: dict[str, set[str]]) -> dict[str, set[str]]:
    """What a stage reads of what ``there`` found: to those that draw, "dalle" is the transformer that the run draws with; stage align begins with the one before."""
    return now if stage == "align" else now | {"dalle": now[places.transformer(cfg, run)]}


def out_of_date(cfg: RunConfig, run: RunFolder, stage: str) -> str:
    """Describes from which older weights or tokenizer a finished stage was made. Empty if it was made from the present ones, or is not finished.

    An input that does not exist any more, such as an export that was deleted to save space, makes no stage out of date.
    """
    marker = run.done(stage)
    parents = {kind: each for kind, each in ((marker or {}).get("parents") or {}).items() if kind in _WEIGHTS}
    if not parents:
        return ""
    now = seen_by(stage, cfg, run, there(cfg, run))
    old = [f"{kind} {each[:12]}, the run has {min(now[kind])[:12]}" for kind, each in sorted(parents.items()) if now[kind] and each not in now[kind]]
    return f"made from {' and '.join(old)}" if old else ""


def remedy(run: RunFolder, stage: str) -> str:
    """The command that brings a stage up to date with the weights that it uses."""
    command = launcher(stage, run.url)
    return f"delete {run.at(stage)} and run '{command}'" if STAGES[stage].trains else f"run '{command}'"


def waiting(cfg: RunConfig, run: RunFolder) -> list[str]:
    """Stages that have something to do: those that are not finished, those that are out of date, and those that will be once the stages before them have run."""
    found: list[str] = []
    moved: set[str] = set()
    for name, entry in used_by(cfg).items():
        old = bool(out_of_date(cfg, run, name)) or bool(moved & set(entry.needs))
        due = not places.finished(cfg, run, name) or old
        if due or entry.repeats:
            found.append(name)
        if due and (entry.trains or old):
            moved.add(name)
    return found
