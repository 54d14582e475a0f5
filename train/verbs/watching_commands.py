"""The commands of ``launcher.py`` that watch and end runs: their options; what they do is in the modules beside this one."""

from __future__ import annotations

from typing import Annotated

import typer

from infra.errors import UsageError
from train.run.stage_table import STAGES
from train.verbs.arguments import Run, finite

_app = typer.Typer()
_Runs = Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders, local or s3://.", show_default=False)]


def add_to(app: typer.Typer) -> None:
    """Add these commands to the launcher's, which hands its stop flag on as the context's object."""
    app.registered_commands += _app.registered_commands


@_app.command()
def status(
    context: typer.Context,
    runs: _Runs,
    watch: Annotated[bool, typer.Option("--watch", help="Look again and again, until stopped.")] = False,
    every: Annotated[float, typer.Option(callback=finite, min=0.1, max=86400, help="Seconds between two looks.")] = 5.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: a line for each look.")] = False,
) -> None:
    """Show where each stage of a run stands, live, queued or dead, by the files of its folder; of several runs, a line each."""
    from train.verbs import status as verb

    verb.main(runs, as_json=as_json, watch_s=every if watch else 0.0, stop=context.obj)


@_app.command()
def tensorboard(
    context: typer.Context,
    runs: _Runs,
    out: Annotated[str, typer.Option(help="Folder of the copy, which is continued; default: a temporary one, deleted at the end.")] = "",
    once: Annotated[bool, typer.Option("--once", help="Bring the copy in --out up to date, and end.")] = False,
    every: Annotated[float, typer.Option(callback=finite, min=0.5, max=86400, help="Seconds between two looks at the storage.")] = 30.0,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 serves other machines, too, without a password.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: a free one.")] = 6006,
) -> None:
    """Serve TensorBoard over runs on any storage, several at once: event files are copied as they grow, and nothing is read twice."""
    from train.verbs import tensorboard as verb

    verb.main(runs, verb.Options(out, every, once, host, port), context.obj)


@_app.command(name="logs")
def show_logs(
    context: typer.Context,
    run: Run,
    stage: Annotated[str, typer.Option(help="Stage, or a share of one (encode.0-of-3); default: what was begun last.")] = "",
    rank: Annotated[int, typer.Option(min=-1, max=1 << 20, help="One rank; -1: all.")] = -1,
    attempt: Annotated[int, typer.Option(min=-1, max=1 << 30, help="Attempt, counted from 0; -1: the newest.")] = -1,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the attempt ends.")] = False,
) -> None:
    """Show what the ranks of an attempt printed: from the run folder, from a SLURM job's output, or from pods."""
    from train.verbs import logs as verb

    verb.main(run, stage, None if rank < 0 else rank, None if attempt < 0 else attempt, follow=follow, stop=context.obj)


@_app.command()
def cancel(
    run: Run,
    stage: Annotated[str, typer.Option(help="Only this stage.")] = "",
) -> None:
    """End what works on a run, here or as a job, and take out of the queue what waits; what trains saves first, and goes on when it is started again."""
    from train.verbs import cancel as verb

    if stage and stage not in STAGES:
        raise UsageError(f"stage '{stage}' is not known; stages: {', '.join(STAGES)}.")
    verb.main(run, stage)


@_app.command()
def why(
    run: Run,
    stage: Annotated[str, typer.Option(help="Stage, or a share of one; default: all that did not end well.")] = "",
    attempt: Annotated[int, typer.Option(min=-1, max=1 << 30, help="Attempt, counted from 0; -1: the newest.")] = -1,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say why an attempt failed, by its evidence, and what to do: RESTART, RESTART ELSEWHERE or STOP, by which rule, and what was lost."""
    from train.verbs import why as verb

    verb.main(run, stage, None if attempt < 0 else attempt, as_json=as_json)


@_app.command(hidden=True)
def sample(
    context: typer.Context,
    run: Run,
    step: Annotated[int, typer.Option(min=1, max=1 << 53, help="The checkpoint after this update.")],
    aside: Annotated[bool, typer.Option("--aside", help="At the lowest priority.")] = False,
) -> None:
    """Draw the captions of section [samples] with one checkpoint of a run that trains. Training itself starts this."""
    from train.verbs import sample as verb

    verb.main(run, step, context.obj, aside=aside)
