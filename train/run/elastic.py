"""Keeps the global batch when a run continues with another number of ranks: with fewer ranks, each makes more micro-batches, which never become larger."""

from __future__ import annotations

import logging

from infra import storage, stored
from infra.run_folder import RunFolder
from infra.run_records import Rows
from infra.world import World
from train import config_batch
from train.config import RunConfig

log = logging.getLogger(__name__)


def accumulation(batch: int, ranks: int, rows: int) -> int | None:
    """The smallest number of micro-batches for each rank that divides the batch evenly into micro-batches of at most ``rows`` samples. None if there is none."""
    if batch % ranks:
        return None
    share = batch // ranks
    return next(count for count in range(1, share + 1) if share % count == 0 and share // count <= rows)


def adapted(cfg: RunConfig, run: RunFolder, stage: str, world: World) -> RunConfig:
    """The configuration with the accumulation that this number of ranks needs. Micro-batches are at most as large as in the first attempt, where they fitted
    into memory.

    A batch that cannot be divided among the ranks is left as it is: ``train.run.inputs.micro_batch`` refuses it.
    """
    key, fit = f"{stage}_fit", cfg.fit(stage)
    if fit is None:
        return cfg
    found = _known_rows(run, stage)
    if found is None and fit.batch % (world.size * fit.accumulation):
        return cfg
    rows = fit.batch // (world.size * fit.accumulation) if found is None else found
    if world.is_main and found is None:
        storage.write_json(run.at(stage, "rows.json"), {"rows": rows, "ranks": world.size})
    count = accumulation(fit.batch, world.size, rows)
    if count is None or count == fit.accumulation:
        return cfg
    if world.is_main:
        log.warning(
            "%s: %d ranks take %s.accumulation = %d instead of %d; the batch stays %d", stage, world.size, key, count, fit.accumulation, fit.batch
        )
    return cfg.model_copy(update={key: getattr(cfg, key).model_copy(update={"accumulation": count})})


def check(cfg: RunConfig, run: RunFolder, stage: str, ranks: int) -> None:
    """Say before a stage starts what its start would say: whether its batch divides over so many ranks.

    Raises:
        ConfigError: it does not.
    """
    fit = cfg.fit(stage)
    if fit is None or fit.batch % (ranks * fit.accumulation) == 0:  # first, because a dry run may not be able to read the run's storage
        return
    if fit.batch % ranks or _known_rows(run, stage) is None:
        config_batch.rows(fit.batch, fit.accumulation, ranks, f"{stage}_fit")


def _known_rows(run: RunFolder, stage: str) -> int | None:
    """Samples in a rank's micro-batch in the first attempt; None where there was none."""
    found = stored.read_if_there(run.at(stage, "rows.json"), Rows)
    return None if found is None else int(found["rows"])
