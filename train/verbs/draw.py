"""``launcher.py draw RUN CAPTION ...``: draws pictures of any captions with the models of a run, which may still be training, or of a package."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from PIL import Image

from infra import files, shown, storage
from infra.errors import ConfigError, StopRequested, UsageError
from infra.signals import StopFlag
from infra.text import counted
from train.drawing import again, prompt_image, samples
from train.drawing.captions import notes, read_captions, shortened
from train.drawing.gallery import Gallery, ranked
from train.drawing.place import Place, locate
from train.drawing.samples import FORMATS, Line
from train.drawing.settings import Settings
from train.drawing.source import Asked, Models, open_place
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

    @property
    def asked(self) -> Asked:
        """How the models shall be opened."""
        return Asked(self.device, self.precision, self.rerank, self.deterministic)

    def for_new_pictures(self) -> list[str]:
        """The given options that shape new pictures, as the command line names them."""
        plain, settings = Options(), vars(Settings())
        given = [name for name, value in vars(self.settings).items() if value != settings[name]]
        given += [name for name in ("image", "rerank", "format", "grid") if getattr(self, name) != getattr(plain, name)]
        return [f"--{name.replace('_', '-')}" for name in given]


def main(url: str, captions: Sequence[str], options: Options, stop: StopFlag) -> None:
    """Draw, print what was drawn and where, and record it. Everything that can be wrong is looked at before weights are read, which takes longest.

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
    place = locate(url)
    image = _checked(place, options, len(wanted))
    out = options.out or _default_out(place)
    with files.elsewhere(files.WITH_OUT):
        storage.check_writable(out)
    models = _open(place, options)
    for note in [*_unquoted(captions), *(note for caption in wanted for note in notes(models.tokenizer, caption))]:
        print(f"note: {note}", file=sys.stderr, flush=True)
    if stop:
        raise StopRequested("stopped by a signal before the first picture.")
    gallery = Gallery(models, options.settings, out, tuple(_prefix(models, image, options)), options.format)
    began, told = time.monotonic(), Told()
    try:
        count = gallery.draw(wanted, stop, lambda caption, lines: _show(gallery, caption, lines, options), told)
    finally:
        told.finish()
    kept = len(wanted) * options.settings.n - count
    before = f"; {kept:,} {'was' if kept == 1 else 'were'} drawn before (another --seed draws others)" if kept else ""
    _say(options, f"drew {counted(count, 'picture')} in {time.monotonic() - began:.1f} s{before}")
    if options.grid:
        print(gallery.grid(wanted), file=sys.stderr if options.json else sys.stdout, flush=True)


def _checked(place: Place, options: Options, captions: int) -> Image.Image | None:
    """Check all options as far as it takes no weights; the square image that is to be continued, if there is one.

    Raises:
        UsageError: a number of rows to keep was given without an image.
        ConfigError, DataError: as ``main``.
    """
    settings, asked = options.settings, options.asked
    settings.check(place.cfg)
    settings.check_search(options.rerank != "none")
    if settings.keep_rows is not None and not options.image:
        raise UsageError("--keep-rows needs an image: give --image too.")
    asked.room(place).check_asked(settings, captions)
    asked.check(place)
    return prompt_image.read(options.image, place.cfg.dvae.image_size, settings.fit) if options.image else None


def _unquoted(captions: Sequence[str]) -> list[str]:
    """A note where a caption seems to have been given without quotes: each of its words is a caption then."""
    if len(captions) < 2 or any(len(caption.split()) != 1 for caption in captions):
        return []
    return [f"{len(captions)} captions of one word each; a caption of several words goes in quotes: '{shortened(' '.join(captions))}'"]


def _default_out(place: Place) -> str:
    """The default folder of pictures: ``drawings`` in the folder of a local run, else in the working directory, so that packages and buckets are not changed."""
    return storage.join(place.url, "drawings") if place.run is not None and not storage.is_remote(place.url) else "drawings"


def _open(place: Place, options: Options) -> Models:
    began = time.monotonic()
    models = open_place(place, options.asked)
    what = f"{models.description} ({models.lineage['dalle'][:12]}), {models.device.type}, {models.precision}"
    _say(options, f"{models.url}: {what}; loaded in {time.monotonic() - began:.1f} s, {process_age_s():.1f} s after the start of the command")
    say_compiling(models.device, lambda words: _say(options, words))
    return models


def _prefix(models: Models, image: Image.Image | None, options: Options) -> list[int]:
    """Codes of the image that is to be continued."""
    if image is None:
        return []
    grid, keep = models.cfg.dvae.grid, options.settings.keep_rows
    codes = prompt_image.codes(models, image, keep)
    _say(options, f"{options.image}: the first {prompt_image.kept_rows(grid, keep)} of its {grid} rows of codes are kept")
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
        UsageError: something was given that only new pictures take; it would be ignored.
        DataError: there is no such record, or the weights are not those that it names.
    """
    if captions or options.file:
        raise UsageError("--again draws one recorded picture; captions and --file are for new ones.")
    if ignored := options.for_new_pictures():
        raise UsageError(f"--again draws one recorded picture as its line says; {ignored[0]} is for new ones.")
    line = samples.find_line(options.again)
    try:
        precision, deterministic = again.precision_of(line, options.precision), bool(line["shaped_by"]["deterministic"])
        options = replace(options, precision=precision, deterministic=deterministic)
        place = again.holding(locate(url or line["source"]), line)
        again.check(place.cfg, place.url, options.asked.check(place), line)
        again.check_room(options.asked.room(place), line)
        # Lines of different drawings name equal files, so by default each has a folder.
        folder = options.out or samples.folder("again", line["caption"], line["key"]).url
        with files.elsewhere(files.WITH_OUT):
            storage.check_writable(folder)
        picture, data = again.again(_open(place, options), line)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"--again: the line is incomplete ({error}); give one exactly as {samples.SAMPLES} has it.") from error
    target = storage.join(folder, line["file"])
    storage.write_bytes(target, data)
    found = again.verdict(line, picture, data)
    if options.json:
        print(json.dumps({"url": target, "caption": picture.caption, "verdict": found, "sha256_before": line["sha256"]}, ensure_ascii=False))
        return
    print(f"{shortened(picture.caption)}\n  {target}   {found}")


def _say(options: Options, words: str) -> None:
    print(words, file=sys.stderr if options.json else sys.stdout, flush=True)
