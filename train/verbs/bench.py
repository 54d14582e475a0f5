"""``launcher.py bench NAME``: run a benchmark and write its JSON; ``bench docs`` renders docs/benchmarks.md."""

from __future__ import annotations

from pathlib import Path

from infra import files, storage
from infra.errors import UsageError


def main(name: str, out: str, seconds: float) -> None:
    """Run one benchmark, or render the page.

    Raises:
        UsageError: there is no such benchmark (the known ones are listed), or ``out`` is on other storage.
        ConfigError: ``out`` cannot be written to.
    """
    if storage.is_remote(out):
        raise UsageError(f"--out {out}: figures are written to a folder of this machine; copy them from there.")
    from train.bench import docs, harness, table  # torch
    from train.machine import rates
    from train.ranks.device import keep_memory

    if name == "docs":
        docs.main()
        return
    with files.elsewhere(files.WITH_OUT):
        storage.check_writable(out)  # before minutes of measuring
    keep_memory()  # as every training stage does, so that the figures apply to training
    # 'data' means both data-codes and data-images
    several = list(table.BENCHES) if name == "all" else [other for other in table.BENCHES if other.startswith(f"{name}-")]
    for chosen in several or [name]:
        try:
            result = table.run(chosen, rates.Options(seconds=seconds))
        except ValueError as error:
            raise UsageError(f"{error}, all, docs.") from error
        print(harness.write(result, Path(out)))
