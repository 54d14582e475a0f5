"""Stage ``report``: the run folder -> report.html.

Command: python launcher.py report PRESET
"""

import logging

from infra.world import World
from train.config import RunConfig
from train.report.page import build

_log = logging.getLogger(__name__)


def run(cfg: RunConfig, run_url: str, world: World) -> str:
    """Write the report of a run, finished or not. The main rank writes; the others have nothing to do.

    Returns:
        URL of the page, on every rank.
    """
    if not world.is_main:
        return f"{run_url.rstrip('/')}/report.html"
    url = build(run_url)
    _log.info("report of '%s': %s", cfg.run.name, url)
    return url
