"""``launcher.py validate URL``: the integrity check of shard sets and tokenizers: hashes, records and lineage. If something is wrong, names the command to run."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from multiprocessing import get_context

import numpy as np
from numpy.typing import NDArray

from data_pipeline.audit.alike import Alike
from data_pipeline.audit.check_parts import PartJob, PartResult, Problem, Rules, check_part
from data_pipeline.audit.check_set import Layout, read_ids, read_layout, repeated, shown_ids
from data_pipeline.shards.shard_set import CODES_SCHEMA, IDS, IMAGE_SCHEMA, MANIFEST, ShardSet
from data_pipeline.shards.spellings import read_takedown
from data_pipeline.tokenizer import read_manifest
from infra import storage
from infra.commands import launcher
from infra.errors import ConfigError, DataError, ReportedError, StopRequested, UnreachableError
from infra.progress import Progress, table
from infra.signals import StopFlag
from infra.text import counted
from train.verbs.lineage_checks import code_parents, export_parents, tokenizer_parents
from train.verbs.targets import Place, Run, Target, open_run, resolve, schema_of

_AHEAD = 4  # number of parts queued for each process
_NAMED = 5


@dataclass(frozen=True)
class Options:
    """The options of ``validate``."""

    images: str = ""
    """URL of an image set, or of a root of image sets; empty: the run's."""
    run: str = ""
    """Run folder that the sets belong to; empty: the URL, if it is a run folder."""
    version: str = ""
    """Version of a shard set; empty: the newest."""
    workers: int = 0
    """Number of processes; 0: one for each core."""
    decode: bool = False
    """Whether to decode every image."""
    takedown: str = ""
    """URL of a take-down list; its images need not have codes. Empty: the run's, or none."""


@dataclass(frozen=True)
class Checked:
    """What was checked in one place, and what is wrong there."""

    place: str
    looked_at: str
    problems: Sequence[Problem]
    stage: str
    """The stage that writes it."""


def main(url: str, options: Options, stop: StopFlag) -> None:
    """Check everything at a URL, and print what was checked and what is wrong.

    Raises:
        ConfigError: options that do not fit.
        DataError: there is nothing to validate, or something is wrong: the damaged files are named, with what to run.
        StopRequested: a signal asked to stop; nothing was changed.
        UnreachableError: the storage gives no answer for one file after all attempts; the rest is not looked at. Nor is it after files in a row that
            come damaged alike (a DataError).
    """
    target = resolve(url)
    if not target.sets and not target.tokenizers:
        raise DataError(f"{url}: neither a shard set, nor a folder of such, a tokenizer or a run folder with data; raw data are read with 'inspect'.")
    if options.version and target.kind != "set":
        raise ConfigError(f"--version {options.version}: {url} is no single shard set; name one, for example {storage.join(url, 'train')}.")
    run = open_run(options.run) if options.run else target.run
    images = _image_sets(options, run, target)
    listed = read_takedown(options.takedown or (run.cfg.data.takedown if run else ""))
    checked = [_check_set(place, options, run, images, listed, stop) for place in target.sets]
    checked += [_check_tokenizer(place, images) for place in target.tokenizers]
    if run is not None:
        checked.append(Checked(run.folder.at("*", "export"), "lineage of exports", list(export_parents(run)), "dalle"))
    _report(url, checked, run)


def _image_sets(options: Options, run: Run | None, target: Target) -> list[str]:
    """URLs of the image sets that codes and tokenizers may name as their parents."""
    if options.images:
        found = [place.url for place in resolve(options.images).sets if schema_of(place.url) == IMAGE_SCHEMA]
        if not found:
            raise ConfigError(f"--images {options.images}: no image set there; name a set, or the folder that holds train and validation.")
        return found
    sets = target.sets if run is target.run else resolve(run.folder.url).sets if run else ()
    return [place.url for place in sets if schema_of(place.url) == IMAGE_SCHEMA]


def _check_set(where: Place, options: Options, run: Run | None, images: Sequence[str], listed: frozenset[str], stop: StopFlag) -> Checked:
    url, layout = where.url, read_layout(where.url, options.version or where.version)
    schema = str(layout.manifest.get("schema", ""))
    vocab = run.cfg.dvae.vocab if run is not None else 0
    rules = Rules(schema, layout.manifest.get("settings") or {}, vocab, options.decode)
    problems = list(layout.problems)
    jobs = layout.jobs(rules)
    parent: Layout | None = None
    if schema == CODES_SCHEMA:
        parent, found = code_parents(layout, images, run)
        problems += found
        if parent is not None:
            jobs, found = _with_images(layout, jobs, parent)
            problems += found
    results = _run(jobs, f"validate {url}", options.workers, stop)
    problems += [problem for result in results for problem in result.problems]
    if not problems:  # damaged ids would be reported as missing and repeated ones
        shown = shown_ids(layout, [result.ids for result in results])
        problems += _ids_once(storage.join(url, "*", IDS), shown, parent, listed)
    words = [
        counted(sum(r.files for r in results), "file"),
        counted(sum(r.num_bytes for r in results), "byte"),
        counted(sum(r.records for r in results), "record"),
    ]
    return Checked(url, ", ".join([*words, *_unchecked(schema, parent, run)]), problems, "encode" if schema == CODES_SCHEMA else "prepare")


def _unchecked(schema: str, parent: Layout | None, run: Run | None) -> Iterator[str]:
    """What could not be checked, because the options name nothing to compare it with."""
    if schema == CODES_SCHEMA:
        if run is None:
            yield "not compared with a dVAE (--run)"
        if parent is None:
            yield "not compared with images (--images)"


def _with_images(layout: Layout, jobs: Sequence[PartJob], parent: Layout) -> tuple[list[PartJob], list[Problem]]:
    """Combine each part of codes with the part of images that it was made from; both sets have as many parts, in the same order."""
    owners = parent.jobs(Rules(IMAGE_SCHEMA, {}))
    if len(owners) != len(jobs):
        what = f"has {len(jobs)} parts, the images that it names have {len(owners)}"
        return list(jobs), [Problem(storage.join(layout.url, MANIFEST), what)]
    return [replace(job, images=owner) for job, owner in zip(jobs, owners, strict=True)], []


def _ids_once(place: str, shown: NDArray[np.uint64], parent: Layout | None, listed: frozenset[str]) -> Iterator[Problem]:
    if repeated(shown):
        yield Problem(place, f"{repeated(shown)} records would be shown twice: their ids repeat, and the version does not exclude them")
    if parent is not None:
        ids = read_ids(parent)
        theirs = shown_ids(parent, ids)
        # By the rules of readers: in both spellings, and by the id of any row of an image.
        hidden = np.concatenate([*ids, np.zeros(0, np.uint64)])[ShardSet(parent.url, parent.manifest, listed).taken_down]
        missing, strange = len(np.setdiff1d(np.setdiff1d(theirs, shown), hidden)), len(np.setdiff1d(shown, theirs))
        if missing or strange:
            yield Problem(place, f"{missing} images of {parent.url} have no codes here, {strange} codes have no image there")


def _run(jobs: Sequence[PartJob], title: str, workers: int, stop: StopFlag) -> list[PartResult]:
    """Check parts in parallel. The results are in the order of the jobs.

    Raises:
        StopRequested: a signal asked to stop.
        DataError: many files in a row fail alike.
    """
    workers = min(workers or len(os.sched_getaffinity(0)), len(jobs))
    results: dict[int, PartResult] = {}
    alike = Alike()
    with Progress(sum(int(job.part["count"]) for job in jobs), title, "records") as progress:
        done = 0
        for index, result in _in_order_of_ending(jobs, workers, stop):
            results[index] = result
            alike.include(result.alike)
            done += int(jobs[index].part["count"])
            progress.update(done, problems=sum(len(found.problems) for found in results.values()))
    return [results[index] for index in range(len(jobs))]


def _in_order_of_ending(jobs: Sequence[PartJob], workers: int, stop: StopFlag) -> Iterator[tuple[int, PartResult]]:
    if workers <= 1:
        for index, job in enumerate(jobs):
            _refuse_if_stopped(stop)
            yield index, check_part(job)
        return
    # Not forked from this process, which has threads and connections, but from a server process that has only imported what is needed.
    context = get_context("forkserver")
    context.set_forkserver_preload(["data_pipeline.audit.check_parts"])
    with ProcessPoolExecutor(workers, context, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN)) as pool:
        waiting: dict[Future[PartResult], int] = {}
        following = iter(enumerate(jobs))
        for index, job in following:
            waiting[pool.submit(check_part, job)] = index
            if len(waiting) >= _AHEAD * workers:
                break
        while waiting:
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                if stop:
                    pool.shutdown(cancel_futures=True)
                _refuse_if_stopped(stop)
                if isinstance(future.exception(), ReportedError):
                    pool.shutdown(cancel_futures=True)  # each further file would take as long until the storage is given up
                yield waiting.pop(future), future.result()
                for index, job in following:
                    waiting[pool.submit(check_part, job)] = index
                    break


def _refuse_if_stopped(stop: StopFlag) -> None:
    if stop:
        raise StopRequested("validate: stopped by a signal; nothing was changed.")


def _check_tokenizer(url: str, images: Sequence[str]) -> Checked:
    place = storage.join(url, "manifest.json")
    try:
        manifest = read_manifest(url)
        model = storage.join(url, "tokenizer.model")
        problems = list(tokenizer_parents(place, manifest, images))
        if hashlib.sha256(storage.read_bytes(model)).hexdigest() != manifest["sha256"]:
            problems.append(Problem(model, "damaged: its SHA-256 is not the manifest's", (url,)))
    except UnreachableError:
        raise
    except DataError as error:
        problems = [Problem(place, str(error), (url,))]
    return Checked(url, "2 files", problems, "tokenizer")


def _report(url: str, checked: Sequence[Checked], run: Run | None) -> None:
    table([{"checked": each.place, "looked at": each.looked_at, "problems": len(each.problems)} for each in checked])
    problems = [(problem, _remedy(problem, problem.stage or each.stage, run)) for each in checked for problem in each.problems]
    if not problems:
        print("no problems found")
        return
    # Lines, not a table: a path that is wrapped within a column cannot be copied.
    by_file: dict[str, list[str]] = {}
    for problem, _ in problems:
        by_file.setdefault(problem.file, []).append(problem.what)
    files, remedies = list(by_file), list(dict.fromkeys(remedy for _, remedy in problems))
    print("\n".join(["", "wrong", *(f"  {file}\n      {f'{chr(10)}      '.join(whats)}" for file, whats in by_file.items())]))
    print("\n".join(["", "to mend it", *(f"  {remedy}" for remedy in remedies)]))
    named = ", ".join(files[:_NAMED]) + (f" and {len(files) - _NAMED} more" if len(files) > _NAMED else "")
    raise DataError(
        f"{url}: {counted(len(problems), 'problem')} in {counted(len(files), 'file')}: {named}. To mend it: {'; '.join(remedies[:_NAMED])}."
    )


def _remedy(problem: Problem, stage: str, run: Run | None) -> str:
    folder = run.folder.url if run else "RUN"
    # A finished stage does not run again unless its done.json is deleted. If the whole folder is deleted, done.json goes with it.
    places = [*problem.delete, *(() if storage.join(folder, stage) in problem.delete else (storage.join(folder, stage, "done.json"),))]
    return f"delete {' and '.join(places)}, then run '{launcher(stage, folder)}'"
