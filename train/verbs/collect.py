"""``launcher.py collect``: shows the files that a run does not need any more, and deletes them with ``--delete``.

The policy. It applies only to files below the run folder that are older than some days:

- uploads and temporary files that were never finished;
- incomplete checkpoints, those without meta.json, that are older than the newest complete one (of complete ones every save keeps ``<stage>_fit.keep``);
- versions of shard sets that are not the newest and that no run in the same root names, and the parts that belong to no other version.

Shared places (data.images, data.codes) and what links lead to outside of the run folder are not touched unless all roots of runs that read from them are named.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass

from data_pipeline.shards.deletion import Superseded, plan_superseded
from data_pipeline.shards.schema import read_manifest
from infra import globs, kept_within, storage, unfinished_writes
from infra.errors import ConfigError
from infra.run_folder import RunFolder
from infra.text import counted
from train.run import places
from train.run.stage_table import STAGES, TRAINED
from train.verbs.targets import Run, open_run

DAYS = 7.0
"""Age of a file from which on no job can still be writing it: jobs end or are restarted within hours."""
_HASH = re.compile(r'"([0-9a-f]{64})"')
_CHECKPOINT = re.compile(r"step-[0-9]{8}")


@dataclass(frozen=True)
class Findings:
    """What can be deleted according to the policy."""

    leftovers: list[unfinished_writes.Leftover]
    checkpoints: list[str]
    """URLs of the folders of incomplete checkpoints."""
    sets: list[Superseded]

    def lines(self) -> Iterator[str]:
        """Describe the findings in lines of text."""
        for each in self.leftovers:
            yield f"{each.url}: {'unfinished upload' if each.upload else 'temporary file'}, {counted(round(each.days), 'day')} old"
        yield from (f"{url}: checkpoint without its marker" for url in self.checkpoints)
        yield from (
            f"{each.set_url}: {counted(len(each.versions), 'superseded version')} ({', '.join(each.versions)}), {counted(len(each.parts), 'part')}"
            for each in self.sets
        )

    def delete(self) -> None:
        """Delete all of it."""
        for leftover in self.leftovers:
            leftover.remove()
        for url in self.checkpoints:
            storage.delete_prefix(url)
        for superseded in self.sets:
            superseded.carry_out()


def main(url: str, days: float, roots: list[str], *, delete: bool) -> None:
    """Show what can be deleted of a run folder according to the policy, and with ``delete`` delete it.

    Args:
        url: the run folder.
        days: files that are younger than this are left alone, because they may still be written.
        roots: the roots of all runs that read from this run's shared places; empty: shared places are left alone.

    Raises:
        ConfigError: this is not a run folder, a stage that writes shard sets is running in it, or the runs in the same root cannot be listed.
        DataError: a manifest is damaged; nothing is deleted.
    """
    run = open_run(url)
    with contextlib.ExitStack() as held:
        for label in places.leases(run.folder, "prepare", "encode") if delete else ():
            held.enter_context(run.folder.lock(label))
        found = look(run, time.time() - days * 86400, roots)
        lines = list(found.lines())
        for line in lines:
            print(line)
        if delete:
            found.delete()
    print(
        f"{len(lines)} {'deleted' if delete else 'to delete: run again with --delete'}"
        if lines
        else f"nothing of {url} is older than {days:g} days and unneeded"
    )


def look(run: Run, before: float, roots: list[str]) -> Findings:
    """Find everything that can be deleted according to the policy; see ``main``."""
    beside = run.folder.url.rpartition("/")[0] or "."
    runs = _runs_below(beside)
    if run.folder.url not in runs:
        raise ConfigError(
            f"{beside}: the runs beside {run.folder.url} cannot be listed, so it is not known what they need; rename folders with *, ? or [."
        )
    runs |= {each for root in roots for each in _runs_below(root)}
    named = frozenset(identity for each in sorted(runs) for identity in _named_by(RunFolder(each)))
    sets = [url for url in _sets(run) if roots or (url.startswith(f"{run.folder.url}/") and not _leads_out(url))]
    pinned = _with_parents(named, sets)
    superseded = [each for each in (plan_superseded(url, pinned, before) for url in sets) if each is not None]
    return Findings(unfinished_writes.find(run.folder.url, before), list(_unmarked(run.folder, before)), superseded)


def _leads_out(url: str) -> bool:
    return not storage.is_remote(url) and kept_within.leads_out(storage.local_path(url))


def _runs_below(root: str) -> set[str]:
    base, found = storage.glob(storage.join(globs.escape(root), "*", "config.json"))
    return {storage.join(base, info.name).removesuffix("/config.json") for info in found}


def _named_by(run: RunFolder) -> Iterator[str]:
    """Every content hash in a run's done.json files and exports, whatever it identifies: a hash too many keeps a version too many, one too few would delete data."""
    for stage in STAGES:
        for url in (run.at(stage, "done.json"), run.at(stage, "export", "config.json")):
            if storage.exists(url):
                yield from _HASH.findall(storage.read_text(url))


def _with_parents(named: frozenset[str], sets: list[str]) -> frozenset[str]:
    """The named versions, and the versions that the named and the newest ones of these sets were made from: to validate codes, their images are needed."""
    manifests = []
    for url in sets:
        places_of = [
            storage.join(url, "versions", name) for name in storage.list_files(storage.join(url, "versions")) if name.endswith("/manifest.json")
        ]
        found = {str(manifest["content_hash"]): manifest for manifest in map(read_manifest, places_of)}
        newest = storage.join(url, "manifest.json")
        manifests += [manifest for identity, manifest in found.items() if identity in named]
        manifests += [read_manifest(newest)] if storage.exists(newest) else []
    return named | {str(parent) for manifest in manifests for parent in manifest["parents"].values()}


def _sets(run: Run) -> list[str]:
    images = [places.image_set(run.cfg, run.folder, split) for split in places.SPLITS]
    return images + [places.code_set(run.cfg, run.folder, crop, split) for crop in range(run.cfg.encode.crops) for split in places.SPLITS]


def _unmarked(run: RunFolder, before: float) -> Iterator[str]:
    """Incomplete checkpoints, which a killed save or a killed deletion left behind: older than the newest complete one, and with only old files."""
    for stage in TRAINED:
        base = run.at(stage, "checkpoints")
        if _leads_out(base):
            continue  # another run's, which is only read here
        names = storage.list_files(base)
        folders = {folder for folder in (name.split("/")[0] for name in names) if _CHECKPOINT.fullmatch(folder)}
        complete = {folder for folder in folders if f"{folder}/meta.json" in names}
        for folder in sorted(folders - complete):
            files = [storage.join(base, name) for name in names if name.startswith(f"{folder}/")]
            if complete and folder < max(complete) and all(storage.modified(url) < before for url in files):
                yield storage.join(base, folder)
