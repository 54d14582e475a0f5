"""The only command: ``python launcher.py STAGE PRESET [section.key=value ...]``. Runs a stage here, in one process or as agent of several ranks."""

from __future__ import annotations

import sys
from typing import Annotated

if __name__ == "__main__":
    from infra import signals

    STOP = signals.install()  # before anything slow: a signal that arrives during imports must set a flag, not kill

import typer

from infra.errors import ExitCode, ReportedError, UsageError
from train.stages import STAGES

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train a text-to-image transformer on your own captioned images: data, dVAE, code tokens, transformer, pictures, report.\n\n"
    "PRESET is a name in train/presets (tiny, demo, ...), a .toml file, or an existing run folder. "
    "Any value can be overridden as section.key=value; docs/configuration.md lists all keys.\n\n"
    "Exit codes: 0 done, 1 crash, 64 usage, 65 data, 75 saved (requeue), 78 configuration, 93 diverged.",
)

Preset = Annotated[str, typer.Argument(help="Preset name, .toml file or run folder.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[section.key=value]...", help="Values that differ from the preset.", show_default=False)
]
On = Annotated[str, typer.Option(help="Where to run: local, slurm or k8s.")]
Nproc = Annotated[int, typer.Option(min=0, help="Processes; 0: one for each GPU, or two on a CPU.")]
Share = Annotated[
    str, typer.Option(help="I/N: do the I-th of N shares of the work (prepare and encode); array tasks of SLURM and Indexed Jobs know theirs.")
]
Chain = Annotated[bool, typer.Option("--chain", help="With --on slurm: submit every stage that is not finished, each after those that it needs.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the resolved configuration and the exact command, and stop.")]


def _add_stage(name: str) -> None:
    def command(
        preset: Preset,
        overrides: Overrides = None,
        on: On = "local",
        nproc: Nproc = 0,
        share: Share = "",
        chain: Chain = False,
        dry_run: DryRun = False,
        worker: Annotated[bool, typer.Option("--worker", hidden=True)] = False,
    ) -> None:
        from train import front

        front.stage(name, preset, overrides or [], on=on, nproc=nproc, dry_run=dry_run, worker=worker, stop=STOP, share=share, chain=chain)

    app.command(name, help=STAGES[name].help)(command)


for _name in STAGES:
    _add_stage(_name)


@app.command()
def demo(preset: Preset = "demo", overrides: Overrides = None, on: On = "local", nproc: Nproc = 0, dry_run: DryRun = False) -> None:
    """Run every stage in turn, from raw data to pictures and a report.

    Finished stages are skipped and interrupted ones go on. Prints the projected time first, and the paths of the results last.
    """
    from train import front

    front.demo(preset, overrides or [], on=on, nproc=nproc, dry_run=dry_run, stop=STOP)


@app.command()
def status(run: Annotated[str, typer.Argument(help="Run folder, local or s3://.")]) -> None:
    """Show how far each stage of a run is, and how its attempts ended."""
    from train.verbs import status as verb

    verb.main(run)


@app.command()
def takedown(preset: Preset, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Delete the shards that hold records of the list data.takedown; prepare and encode then make them again without.

    Loaders hide the records on the list at once, whether this has run or not.
    """
    from train.verbs import takedown as verb

    verb.main(preset, overrides or [], dry_run=dry_run)


@app.command()
def verdict(stage: Annotated[str, typer.Argument(help="Stage.")], preset: Preset, overrides: Overrides = None) -> None:
    """Say what a scheduler should do after an attempt at a stage: ends with 75 to requeue, with any other code to stop. For job scripts."""
    from train import front

    if stage not in STAGES:
        raise UsageError(f"stage '{stage}' is not known; stages: {', '.join(STAGES)}.")
    front.verdict(stage, preset, overrides or [])


@app.command()
def doctor(
    preset: Annotated[str, typer.Argument(help="Preset, .toml file or run folder: its storage and inputs are checked too.")] = "",
    overrides: Overrides = None,
) -> None:
    """Check this machine (and, under srun, all nodes of the job) in half a minute: GPUs, network, /dev/shm, disk, S3, clock, versions, inputs."""
    from train.verbs import doctor as verb

    verb.main(preset, overrides or [])


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help="Name of a benchmark, or 'docs' to render docs/benchmarks.md.")],
    out: Annotated[str, typer.Option(help="Folder for the JSON file.")] = "bench/out",
    seconds: Annotated[float, typer.Option(min=0.01, help="Time given to each measured figure.")] = 1.0,
) -> None:
    """Run a benchmark and write its figures as JSON; floors are measured in the same run."""
    from train.verbs import bench as verb

    verb.main(name, out, seconds)


@app.command()
def docs(demo: Annotated[str, typer.Option(help="Also write docs/demo.md and its pictures from this finished run.")] = "") -> None:
    """Regenerate what is generated in docs/: the configuration reference and its JSON Schema."""
    from train.verbs import demo_page
    from train.verbs import docs as verb

    verb.main()
    if demo:
        demo_page.main(demo)


def main(arguments: list[str]) -> int:
    """Run one command line and return its exit code."""
    try:
        code = app(arguments, standalone_mode=False)
    except ReportedError as error:
        print(f"{error.exit_code.name.lower()} error: {error}", file=sys.stderr)
        return error.exit_code
    except Exception as error:
        if hasattr(error, "format_message"):  # typer's own complaint about the command line
            print(f"usage error: {error.format_message()} See 'launcher.py --help'.", file=sys.stderr)
            return ExitCode.USAGE
        if type(error).__name__ in ("Abort", "NoArgsIsHelpError"):
            return ExitCode.USAGE
        raise
    return int(code or 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
