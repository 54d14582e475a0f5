"""Keeps the global batch when a run continues with another number of ranks: with fewer ranks, each makes more micro-batches, which never become larger."""

from __future__ import annotations

import logging

from infra import storage, stored
from infra.run_folder import RunFolder
from infra.run_records import Rows
from infra.world import World
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
    url = run.at(stage, "rows.json")
    found = stored.read_if_there(url, Rows)
    if found is None and fit.batch % (world.size * fit.accumulation):
        return cfg
    rows = fit.batch // (world.size * fit.accumulation) if found is None else int(found["rows"])
    if world.is_main and found is None:
        storage.write_json(url, {"rows": rows, "ranks": world.size})
    count = accumulation(fit.batch, world.size, rows)
    if count is None or count == fit.accumulation:
        return cfg
    if world.is_main:
        log.warning(
            "%s: %d ranks take %s.accumulation = %d instead of %d; the batch stays %d", stage, world.size, key, count, fit.accumulation, fit.batch
        )
    return cfg.model_copy(update={key: getattr(cfg, key).model_copy(update={"accumulation": count})})
