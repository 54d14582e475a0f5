"""What the stages of a job read, looked at when it is submitted: what is not there is found in a second, and not after a night in a queue."""

from __future__ import annotations

from data_pipeline.config import SourceConfig
from data_pipeline.sources.open_source import find_kind
from infra import storage
from infra.commands import launcher
from infra.errors import DataError
from infra.run_folder import RunFolder
from train.config import RunConfig
from train.run import places
from train.run.stage_table import used_by


def check(cfg: RunConfig, on: str, *, prepares: bool) -> list[str]:
    """Look at the places that the configuration names, before it becomes a run's: names alone, no record is read.

    Args:
        prepares: whether the stage prepare is among what is submitted, and has something to do.

    Returns:
        A line on each place that cannot be seen from here.

    Raises:
        DataError: nothing that can be read is there.
    """
    sources = [source for source in cfg.data.sources if prepares and not source.is_emoji]
    named: list[tuple[str, str, SourceConfig | None]] = [("data.sources", source.url, source) for source in sources]
    named += [("data.takedown", cfg.data.takedown, None)] if cfg.data.takedown else []
    unseen = []
    for key, url, source in named:
        if on == "k8s" and not storage.is_remote(url):
            unseen.append(f"{key} = {url} is a path: pods see it only where the image or the site's folder brings it; it was not looked at")
        elif source is not None:
            _check_source(source)
        elif not storage.exists(url):
            raise DataError(f"{key} = {url}: does not exist; name a text file with an id on each line, or leave it empty. Nothing was submitted.")
    return unseen


def _check_source(source: SourceConfig) -> None:
    if not source.kind:
        find_kind(source.url, source.roots)
    elif next(storage.glob(source.url)[1], None) is None:
        raise DataError(f"data.sources: {source.url}: no such folder or file, or it is empty; correct the entry. Nothing was submitted.")


def require(stage: str, cfg: RunConfig, run: RunFolder) -> None:
    """Where a scheduler knows no order of jobs: what the stage needs must be there.

    Raises:
        DataError: it is not.
    """
    for need in used_by(cfg)[stage].needs:
        if not places.finished(cfg, run, need):
            raise DataError(
                f"{stage} needs what '{need}' makes, which has not finished, and Kubernetes starts jobs at once: run '{launcher(need, run.url)} --on k8s' "
                "first, and submit this once it has (a new run: with its preset and values in place of the folder)."
            )
