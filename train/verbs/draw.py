"""``launcher.py draw RUN CAPTION ...``: draws pictures of any captions with the models of a run, which may still be training, or of a package."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from infra import shown, storage
from infra.errors import ConfigError, StopRequested, UsageError
from infra.signals import StopFlag
from train.drawing import again, prompt_image, samples
from train.drawing.captions import notes, read_captions, shortened
from train.drawing.gallery import Gallery, ranked
from train.drawing.samples import FORMATS, Line
from train.drawing.settings import Settings
from train.drawing.source import Models, locate, open_models
from train.drawing.told import Told, say_compiling
from train.loop.goodput import process_age_s


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    settings: Settings = field(default_factory=Settings)
    file: str = ""
    image: str = ""
    rerank: str = "none"
    out: str = ""
    format: str = "png"
    grid: bool = False
    device: str = ""
    precision: str = "auto"
    json: bool = False
    again: str = ""
    deterministic: bool = False


def main(url: str, captions: Sequence[str], options: Options, stop: StopFlag) -> None:
    """Draw, print what was drawn and where, and record it.

    Raises:
        UsageError: no caption, or an unknown format.
        ConfigError, DataError: there are no models to draw with, or something cannot be drawn.
        StopRequested: a signal came. Finished pictures are kept, and the same command draws the rest.
    """
    if options.format not in FORMATS:
        raise UsageError(f"--format {options.format}: accepted are {', '.join(FORMATS)}.")
    for option, value in (("--file", options.file), ("--image", options.image), ("--rerank", options.rerank), ("--out", options.out)):
        if shown.place_holds_password(value):  # before it is printed, or anything is loaded
            raise ConfigError(f"{option}: {shown.NO_PASSWORDS}")
    if options.again:
        _again(url, captions, options)
        return
    wanted = read_captions(captions, options.file)
    if not url or not wanted:
        raise UsageError("nothing to draw: give a run and a caption, as in: launcher.py draw runs/demo 'a red fox'; or --file captions.txt.")
    out = options.out or _default_out(url)
    storage.check_writable(out)
    models, settings = _open(url, options)
    for note in [*_unquoted(captions), *(note for caption in wanted for note in notes(models.tokenizer, caption))]:
        print(f"note: {note}", file=sys.stderr, flush=True)
    if stop:
        raise StopRequested("stopped by a signal before the first picture.")
    gallery = Gallery(models, settings, out, tuple(_prefix(models, options)), options.format)
    began, told = time.monotonic(), Told()
    try:
        count = gallery.draw(wanted, stop, lambda caption, lines: _show(gallery, caption, lines, options), told)
    finally:
        told.finish()
    seconds = time.monotonic() - began
    kept = len(wanted) * settings.n - count
    _say(options, f"drew {count} pictures in {seconds:.1f} s" + (f"; {kept} were drawn before (another --seed draws others)" if kept else ""))
    if options.grid:
        print(gallery.grid(wanted), file=sys.stderr if options.json else sys.stdout, flush=True)


def _unquoted(captions: Sequence[str]) -> list[str]:
    """A note where a caption seems to have been given without quotes: each of its words is a caption then."""
    if len(captions) < 2 or any(len(caption.split()) != 1 for caption in captions):
        return []
    return [f"{len(captions)} captions of one word each; a caption of several words goes in quotes: '{shortened(' '.join(captions))}'"]


def _default_out(url: str) -> str:
    """The default folder of pictures: ``drawings`` in the folder of a local run, else in the working directory, so that packages and buckets are not changed."""
    place = locate(url)
    return storage.join(place.url, "drawings") if place.run is not None and not storage.is_remote(place.url) else "drawings"


def _open(url: str, options: Options) -> tuple[Models, Settings]:
    began = time.monotonic()
    models = open_models(url, options.device, options.precision, options.rerank, deterministic=options.deterministic)
    options.settings.check(models.cfg)
    what = f"{models.description} ({models.lineage['dalle'][:12]}), {models.device.type}, {models.precision}"
    _say(options, f"{models.url}: {what}; loaded in {time.monotonic() - began:.1f} s, {process_age_s():.1f} s after the start of the command")
    say_compiling(models.device, lambda words: _say(options, words))
    return models, options.settings


def _prefix(models: Models, options: Options) -> list[int]:
    """Codes of the image that is to be continued.

    Raises:
        UsageError: a number of rows to keep was given without an image.
    """
    settings = options.settings
    if not options.image:
        if settings.keep_rows is not None:
            raise UsageError("--keep-rows needs an image: give --image too.")
        return []
    rows, grid = prompt_image.kept_rows(models, settings.keep_rows), models.cfg.dvae.grid
    codes = prompt_image.codes(models, prompt_image.read(options.image, models.cfg.dvae.image_size, settings.fit), settings.keep_rows)
    _say(options, f"{options.image}: its first {rows} of {grid} rows of codes are kept")
    return codes


def _show(gallery: Gallery, caption: str, lines: list[Line], options: Options) -> None:
    """Print what was drawn for a caption, and where."""
    if options.json:
        for line in ranked(lines):
            print(json.dumps(line | {"url": storage.join(gallery.folder(caption).url, line["file"])}, ensure_ascii=False, sort_keys=True), flush=True)
        return
    print(shortened(caption) or "(empty caption)")
    for line in ranked(lines):
        worth = "" if line["score"] is None else f"   similarity {line['score']:.3f}"
        print(f"  {storage.join(gallery.folder(caption).url, line['file'])}   seed {line['seed']}{worth}")
    sys.stdout.flush()


def _again(url: str, captions: Sequence[str], options: Options) -> None:
    """Draw one recorded picture again.

    Raises:
        UsageError: captions were given too; they would be ignored.
        DataError: there is no such record, or the weights are not those that it names.
    """
    if captions or options.file:
        raise UsageError("--again draws one recorded picture; captions and --file are for new ones.")
    line = samples.find_line(options.again)
    try:
        precision, deterministic = again.precision_of(line, options.precision), bool(line["shaped_by"]["deterministic"])
        options = replace(options, precision=precision, settings=Settings(), deterministic=deterministic)
        models, _ = _open(url or line["source"], options)
        picture, data = again.again(models, line)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"--again: the line is incomplete ({error}); give one exactly as {samples.SAMPLES} has it.") from error
    # Lines of different drawings name equal files, so by default each has a folder.
    target = storage.join(options.out or samples.folder("again", line["caption"], line["key"]).url, line["file"])
    storage.write_bytes(target, data)
    found = again.verdict(line, picture, data)
    if options.json:
        print(json.dumps({"url": target, "caption": picture.caption, "verdict": found, "sha256_before": line["sha256"]}, ensure_ascii=False))
        return
    print(f"{shortened(picture.caption)}\n  {target}   {found}")


def _say(options: Options, words: str) -> None:
    print(words, file=sys.stderr if options.json else sys.stdout, flush=True)
