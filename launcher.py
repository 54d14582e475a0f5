"""The only command: ``python launcher.py STAGE PRESET [section.key=value ...]``. Runs a stage on this machine, in one process or several, or submits a job."""

from __future__ import annotations

import sys
from typing import Annotated

if __name__ == "__main__":
    from infra import logs, output, signals

    STOP = signals.install()  # before anything slow: a signal that arrives during imports must set a flag, not kill
    output.speak_utf8()
    output.last()
    logs.show()

import typer

from infra import environment
from infra.errors import ExitCode, ReportedError, UsageError
from train.run.stage_table import STAGES
from train.verbs import watching_commands
from train.verbs.arguments import Chain, DryRun, GoOn, Nproc, On, Overrides, Preset, Restarts, Run, Share, finite

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Train a text-to-image transformer on your own captioned images: data, dVAE, code tokens, transformer, pictures, report.\n\n"
    "PRESET is a name in train/presets (tiny, demo, ...), a .toml file, or an existing run folder. "
    "Any value can be overridden as section.key=value; docs/configuration.md lists all keys.\n\n"
    "Exit codes: 0 done, 1 crash, 64 usage, 65 data, 75 saved (requeue), 78 configuration, 93 diverged.",
)


def _add_stage(name: str) -> None:
    def command(
        preset: Preset,
        overrides: Overrides = None,
        on: On = "local",
        nproc: Nproc = 0,
        share: Share = "",
        chain: Chain = False,
        restarts: Restarts = 0,
        dry_run: DryRun = False,
        go_on: GoOn = False,
        worker: Annotated[bool, typer.Option("--worker", hidden=True)] = False,
    ) -> None:
        from train import launch
        from train.verbs import compare

        if name == "report" and (others := compare.others(overrides or [])):
            compare.main([preset, *others], [word for word in overrides or [] if word not in others])
            return
        launch.stage(
            name,
            preset,
            overrides or [],
            on=on,
            nproc=nproc,
            dry_run=dry_run,
            worker=worker,
            stop=STOP,
            share=share,
            chain=chain,
            restarts=restarts,
            go_on=go_on,
        )

    app.command(name, help=STAGES[name].help)(command)


for _name in STAGES:
    _add_stage(_name)


@app.command()
def demo(
    preset: Preset = "demo", overrides: Overrides = None, on: On = "local", nproc: Nproc = 0, restarts: Restarts = 0, dry_run: DryRun = False
) -> None:
    """Run every stage in turn, from raw data to pictures and a report.

    Finished stages are skipped, and interrupted ones continue. Prints the projected time first, and the paths of the results last.
    """
    from train import launch

    launch.demo(preset, overrides or [], on=on, nproc=nproc, dry_run=dry_run, stop=STOP, restarts=restarts)


@app.command()
def draw(
    run: Annotated[str, typer.Argument(help="Run folder, finished or under way, or what 'export --package' wrote; local or s3://.")] = "",
    captions: Annotated[list[str] | None, typer.Argument(metavar="[CAPTION]...", help="What to draw.", show_default=False)] = None,
    file: Annotated[str, typer.Option(help="Captions, one a line; '-': standard input.")] = "",
    n: Annotated[int, typer.Option(min=1, max=1 << 16, help="Pictures of each caption.")] = 4,
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds draw equal pictures.")] = 0,
    temperature: Annotated[float, typer.Option(callback=finite, help="Below 1: likelier pictures; above 1: more varied ones.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, max=1 << 20, help="Draw among the k likeliest codes only; 0: among all.")] = 0,
    top_p: Annotated[float, typer.Option(callback=finite, help="Draw among the likeliest codes that make up this probability.")] = 1.0,
    guidance: Annotated[
        float, typer.Option(callback=finite, help="How much the caption counts; needs a model trained with dalle_fit.caption_dropout.")
    ] = 1.0,
    image: Annotated[str, typer.Option(help="Complete the upper part of this image.")] = "",
    keep_rows: Annotated[int, typer.Option(min=0, max=1 << 16, help="How many rows of codes to keep of --image; 0: 15 of 32.")] = 0,
    fit: Annotated[str, typer.Option(help="How --image becomes a square: crop or letterbox.")] = "crop",
    rerank: Annotated[
        str, typer.Option(help="Order candidates by: none, clip (the run's), or a folder with an exported one or one of open_clip.")
    ] = "none",
    search: Annotated[bool, typer.Option("--search", help="Candidates compete while they are drawn; needs --rerank.")] = False,
    out: Annotated[str, typer.Option(help="Folder for pictures; default: drawings in a local run, else drawings here.")] = "",
    format: Annotated[str, typer.Option(help="png or webp; both lossless.")] = "png",
    grid: Annotated[bool, typer.Option("--grid", help="Also write one picture that shows all.")] = False,
    batch: Annotated[int, typer.Option(min=0, max=1 << 16, help="Pictures drawn at once; 0: as many as memory allows.")] = 0,
    window: Annotated[
        int, typer.Option(min=0, max=1 << 16, help="Codes guessed ahead in one pass; pictures do not change; 0: chosen by the device.")
    ] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda; default: the GPU if there is one.")] = "",
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16, fp16, or int8 on a CPU.")] = "auto",
    deterministic: Annotated[bool, typer.Option("--deterministic", help="On a CPU: the same bits at any --batch and --window.")] = False,
    again: Annotated[str, typer.Option(help="Draw one recorded picture again: a line of a samples.jsonl, or FILE:NUMBER.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON line for each picture, and everything else to standard error.")] = False,
) -> None:
    """Draw pictures of your own captions, with a finished run, one that is still training, or a package.

    Example: launcher.py draw runs/demo "a red fox" "a blue house" --n 8 --grid
    """
    from train.drawing.settings import Settings
    from train.verbs import draw as verb

    settings = Settings(n, seed, temperature, top_k or None, top_p if top_p != 1 else None, guidance, keep_rows or None, fit, batch, window, search)  # type: ignore[arg-type]
    options = verb.Options(settings, file, image, rerank, out, format, grid, device, precision, as_json, again, deterministic)
    verb.main(run, captions or [], options, STOP)


@app.command()
def play(
    run: Annotated[str, typer.Argument(help="Run folder, finished or under way, or what 'export --package' wrote; local or s3://.")],
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 serves the page to other machines, too, without a password.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: a free one.")] = 7860,
    rerank: Annotated[str, typer.Option(help="As for draw.")] = "none",
    device: Annotated[str, typer.Option(help="cpu or cuda; default: the GPU if there is one.")] = "",
    precision: Annotated[str, typer.Option(help="As for draw.")] = "auto",
) -> None:
    """Serve a page to type captions into: candidates appear row by row as they are drawn."""
    from train.verbs import play as verb

    verb.main(run, host, port, rerank, device, precision, STOP)


watching_commands.add_to(app)


@app.command(name="import-dvae")
def import_dvae(
    encoder: Annotated[str, typer.Argument(help="encoder.pkl of the released dVAE, or any file of such a module.")],
    decoder: Annotated[str, typer.Argument(help="decoder.pkl.")],
    preset: Preset,
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option(min=1, max=1 << 30, help="Validation images on which the imported weights are measured.")] = 16,
) -> None:
    """Use a dVAE from pickled modules of the dall-e package instead of training one, with encode and later stages to follow. No code in the files is executed."""
    from train.verbs import import_dvae as verb

    verb.dvae(encoder, decoder, preset, overrides or [], samples)


@app.command(name="import-vqgan")
def import_vqgan(
    weights: Annotated[str, typer.Argument(help="Checkpoint of taming-transformers or LlamaGen: .ckpt, .pt or .safetensors.")],
    preset: Preset,
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option(min=1, max=1 << 30, help="Validation images on which the imported weights are measured.")] = 16,
) -> None:
    """Use a published VQGAN as the image tokenizer (dvae.kind = 'vqgan'), as import-dvae does with the released dVAE."""
    from train.verbs import import_dvae as verb

    verb.vqgan(weights, preset, overrides or [], samples)


@app.command()
def plan(
    preset: Preset,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=0, max=1 << 20, help="Machines; 0: cluster.nodes.")] = 0,
    gpus: Annotated[int, typer.Option(min=0, max=1 << 10, help="GPUs in each machine; 0: cluster.gpus, or one where that is 0.")] = 0,
    memory: Annotated[float, typer.Option(callback=finite, min=0, max=1e6, help="GB of a GPU; 0: as its datasheet says.")] = 0.0,
    gpu: Annotated[str, typer.Option(help="Datasheet, as L4 (a wrong name lists them), or numbers: memory_gb=48,...")] = "H100-80GB",
    price: Annotated[float, typer.Option(callback=finite, min=0, max=1e6, help="Price of one GPU for an hour: shows what the run costs.")] = 0.0,
    tokens: Annotated[float, typer.Option(callback=finite, min=0, max=1e18, help="Budget of tokens; 0: the preset's updates.")] = 0.0,
    rank: Annotated[int, typer.Option(min=0, max=1 << 20, help="Total rank of gradient compression; 0: the paper's for its widths.")] = 0,
    check: Annotated[bool, typer.Option("--check", help="Run rank 0 without memory and compare: minutes.")] = False,
) -> None:
    """Estimate what training the transformer takes: memory of each GPU for every ZeRO stage and layout, bytes sent, time and energy; and whether it fits."""
    from train.verbs import plan as verb

    verb.main(preset, overrides or [], nodes=nodes, gpus=gpus, memory=memory, gpu=gpu, tokens=tokens, rank=rank, price=price, check=check)


@app.command()
def takedown(preset: Preset, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Delete the shards that hold records on the list data.takedown; prepare and encode then make them again without these records.

    Loaders hide the records on the list immediately, whether this command has run or not.
    """
    from train.verbs import takedown as verb

    verb.main(preset, overrides or [], dry_run=dry_run)


@app.command()
def collect(
    run: Run,
    days: Annotated[float, typer.Option(callback=finite, min=1, max=1e5, help="Age from which on; younger things may be under way.")] = 7.0,
    runs: Annotated[list[str] | None, typer.Option(help="Root of runs that read this one's shared places: those go too.")] = None,
    delete: Annotated[bool, typer.Option("--delete", help="Delete what is shown.")] = False,
) -> None:
    """Show what a run no longer needs, and delete it with --delete: unfinished uploads, unfinished checkpoints, superseded versions of shard sets.

    Only old things below the run folder, and no version that a run beside this one refers to. Use it while no stage of the run is working.
    """
    from train.verbs import collect as verb

    verb.main(run, days, runs or [], delete=delete)


@app.command()
def verdict(stage: Annotated[str, typer.Argument(help="Stage.")], preset: Preset, overrides: Overrides = None) -> None:
    """For job scripts: decide what a scheduler should do after an attempt at a stage. Ends with 75 to requeue, and with any other code to stop."""
    from train import launch

    if stage not in STAGES:
        raise UsageError(f"stage '{stage}' is not known; stages: {', '.join(STAGES)}.")
    launch.verdict(stage, preset, overrides or [])


@app.command()
def doctor(
    preset: Annotated[str, typer.Argument(help="Preset, .toml file or run folder, whose storage and inputs are checked, too.")] = "",
    overrides: Overrides = None,
) -> None:
    """Check this machine (and, under srun, all nodes of the job) in half a minute: GPUs, network, /dev/shm, disk, S3, clock, versions, inputs."""
    from train.verbs import doctor as verb

    verb.main(preset, overrides or [])


@app.command()
def inspect(
    url: Annotated[str, typer.Argument(help="Raw data (as in data.sources), a set, a folder of sets, a tokenizer or a run folder.")],
    out: Annotated[str, typer.Option(help="PNG file of the contact sheet; default: inspect-<name>.png here.")] = "",
    samples: Annotated[int, typer.Option(min=0, max=1 << 30, help="Number of random records for the statistics.")] = 500,
    pictures: Annotated[int, typer.Option(min=0, max=1 << 16, help="Records on the contact sheet; 0: none.")] = 48,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the choice of records.")] = 0,
    tokenizer: Annotated[str, typer.Option(help="Tokenizer that counts the tokens of captions; default: the run's.")] = "",
    run: Annotated[str, typer.Option(help="Run folder whose dVAE draws code sets; default: URL, if it is a run.")] = "",
    version: Annotated[str, typer.Option(help="Version of a shard set; default: the newest.")] = "",
    takedown: Annotated[str, typer.Option(help="Take-down list; default: the run's.")] = "",
    count: Annotated[bool, typer.Option("--count", help="Count all records of raw data, which reads its whole index.")] = False,
) -> None:
    """Show what is in a data set: counts, sizes, captions, sources, lineage, and a contact sheet of random records."""
    from train.verbs import inspect as verb

    verb.main(url, verb.Options(out, samples, pictures, seed, tokenizer, run, version, takedown, count))


@app.command()
def validate(
    url: Annotated[str, typer.Argument(help="A shard set, a folder of sets, a tokenizer or a run folder; local or s3://.")],
    images: Annotated[
        str, typer.Option(help="Image set, or folder of image sets, from which codes and tokenizer were made; default: the run's.")
    ] = "",
    run: Annotated[str, typer.Option(help="Run folder that sets belong to; default: URL, if it is a run.")] = "",
    version: Annotated[str, typer.Option(help="Version of a shard set; default: the newest.")] = "",
    workers: Annotated[int, typer.Option(min=0, max=1 << 12, help="Number of processes; 0: one for each core.")] = 0,
    decode: Annotated[bool, typer.Option("--decode", help="Also decode every image and compare its size.")] = False,
    takedown: Annotated[str, typer.Option(help="Take-down list, whose images need no codes; default: the run's.")] = "",
) -> None:
    """Check every file, record and reference of shard sets and tokenizers; if something is damaged, says what to run and ends with 65."""
    from train.verbs import validate as verb

    verb.main(url, verb.Options(images, run, version, workers, decode, takedown), STOP)


@app.command()
def export(
    run: Run,
    stage: Annotated[str, typer.Option(help="Whose weights: dvae, dalle or align; empty: of the transformer that the run draws with.")] = "",
    weights: Annotated[str, typer.Option(help="average or raw.")] = "average",
    step: Annotated[int, typer.Option(min=0, max=1 << 53, help="Checkpoint after this update; 0: the newest.")] = 0,
    out: Annotated[str, typer.Option(help="Folder or s3 prefix to write; empty: <run>/<stage>/export, where other stages look.")] = "",
    package: Annotated[bool, typer.Option("--package", help="Write a folder that draws by itself, with model card and licences.")] = False,
) -> None:
    """Write the weights of a checkpoint as safetensors, with a JSON description. Needs neither a GPU nor DeepSpeed."""
    from train.verbs import export as verb

    if package:
        if stage or weights != "average" or step:
            raise UsageError("--package holds the newest averaged weights of all stages; it takes no --stage, --weights and --step.")
        verb.package(run, out)
        return
    verb.main(run, stage, weights, step, out)


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help="A benchmark, or what several names begin with ('data'), 'all', or 'docs': docs/benchmarks.md.")],
    out: Annotated[str, typer.Option(help="Folder for the JSON file.")] = "bench/out",
    seconds: Annotated[float, typer.Option(callback=finite, min=0.01, max=3600, help="Time given to each measured figure.")] = 1.0,
) -> None:
    """Run a benchmark and write its figures as JSON; the reference figures (floors) are measured in the same run."""
    from train.verbs import bench as verb

    verb.main(name, out, seconds)


@app.command()
def docs(
    demo: Annotated[str, typer.Option(help="Also write docs/demo.md and its pictures from this finished run.")] = "",
    note: Annotated[str, typer.Option(help="With --demo: a sentence below its minutes.")] = "",
) -> None:
    """Write the generated files anew: the configuration reference, its JSON Schema, the picture of masks, and the job scripts for SLURM."""
    from train.verbs import demo_page
    from train.verbs import docs as verb

    verb.main()
    if demo:
        demo_page.main(demo, note)


def last_line(error: ReportedError) -> str:
    """The last line of output: the kind of error and its message, or how to continue after a stop."""
    if error.exit_code == ExitCode.REQUEUE:
        return f"stopped: {str(error).rstrip('.')}. Run the same command again to go on."
    return f"{error.exit_code.name.lower()} error: {error}"


def main(arguments: list[str]) -> int:
    """Run one command line and return its exit code."""
    try:
        environment.check()
        code = app(arguments, standalone_mode=False, obj=globals().get("STOP"))
    except ReportedError as error:
        if str(error):
            print(last_line(error), file=sys.stderr)
        return error.exit_code
    except Exception as error:
        if hasattr(error, "format_message"):  # an error of typer about the command line
            print(f"usage error: {error.format_message()} See 'launcher.py --help'.", file=sys.stderr)
            return ExitCode.USAGE
        if type(error).__name__ in ("Abort", "NoArgsIsHelpError"):
            return ExitCode.USAGE
        raise
    return int(code or 0)


if __name__ == "__main__":
    CODE = main(sys.argv[1:])
    if CODE == ExitCode.REQUEUE:
        output.leave(CODE)
    sys.exit(CODE)
