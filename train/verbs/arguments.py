"""Arguments and options that several commands of the launcher share."""

import math
from typing import Annotated

import typer


def finite(value: float) -> float:
    """Refuses inf and nan, which ranges of the command line let through."""
    if not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


Preset = Annotated[str, typer.Argument(help="Preset name, .toml file or run folder.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[section.key=value]...", help="Values that differ from the preset.", show_default=False)
]
Run = Annotated[str, typer.Argument(help="Run folder, local or s3://.")]
On = Annotated[str, typer.Option(help="Where to run: local, slurm or k8s.")]
Nproc = Annotated[int, typer.Option(min=0, max=1 << 16, help="Processes; 0: one for each GPU, or two on a CPU.")]
Share = Annotated[str, typer.Option(help="I/N: do the I-th of N shares of the work (prepare, encode, generate); our array jobs know theirs.")]
Chain = Annotated[bool, typer.Option("--chain", help="With --on slurm: submit every stage that is not finished, each after those that it needs.")]
Restarts = Annotated[
    int, typer.Option(min=0, max=1 << 16, help="Start ranks again after a crash, up to so many in a row that save none; jobs: cluster.retries.")
]
GoOn = Annotated[bool, typer.Option("--go-on", help="A training stage goes on with other values from its newest checkpoint, a change point.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the resolved configuration and the exact command, and stop.")]
