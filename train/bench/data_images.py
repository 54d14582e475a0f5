"""Decoding images and cropping them as in Listing 2 of the paper, compared with libjpeg-turbo, torchvision and webdataset. ``python -m train.bench.data_images``

Everything runs in one thread, on 1,000 generated files in memory. Only webdataset must read them from a tar file, which is in the page cache.
"""

from __future__ import annotations

import io
import itertools
import statistics
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from data_pipeline.images.crops import CropBox, cut, decode, picture, transformer_crop
from infra.seeds import generator
from train.bench import photographs
from train.bench.harness import Result, main, start
from train.machine.rates import Figure, Options, measure, threads

_TARGET, _SCALE_MAX = 256, 9 / 8
_CHUNK = 20
_DECODE, _ENTROPY = "decode at full size", "decode at an eighth of the size"
_EXACT, _FAST = "decode + Listing 2, exact", "decode + Listing 2, fast"
_TORCHVISION, _WEBDATASET = "torchvision: Pillow + RandomResizedCrop + ToTensor", "webdataset: Pillow + RandomResizedCrop + ToTensor"
_UNIT = "images/s"
Work = Callable[[int, bytes], object]
"""Called with an index and the file of this index."""


def run(options: Options) -> Result:
    """Measure images/s of each implementation, in one thread."""
    return compare(photographs.files(), options)


def compare(files: list[bytes], options: Options) -> Result:
    """See run."""
    sizes = {"files": len(files), "size": "500 x 375", "quality": 90, "chroma": "4:2:0", "mean_file_bytes": round(np.mean([len(f) for f in files]))}
    result = start("data-images", "Images: decoding and Listing 2 at 256 pixels", options, **sizes, threads=1)
    for package in ("simplejpeg", "numba", "pillow", "torchvision"):
        result.versions[package] = version(package)
    works = _ours(files)
    floor, ours = {_DECODE, _ENTROPY}, set(works)
    with tempfile.TemporaryDirectory() as folder, threads(1):
        works |= _theirs(files, Path(folder))
        for name, figure in _take_turns(files, works, options).items():
            (result.floor if name in floor else result.measured if name in ours else result.peers)[name] = figure
    result.measured["fast, difference from exact"] = _difference(files)

    result.ratio("exact over torchvision", _EXACT, _TORCHVISION, goal=2.0)
    if _WEBDATASET in result.peers:
        result.ratio("exact over webdataset", _EXACT, _WEBDATASET, goal=2.0)
        result.versions["webdataset"] = version("webdataset")
    else:
        result.notes.append("webdataset is not installed and was not measured; make bench-peers installs it.")
    result.ratio("exact over decoding alone", _EXACT, _DECODE)
    result.ratio("fast over decoding alone", _FAST, _DECODE, goal=0.9)
    result.ratio("decoding alone over torchvision", _DECODE, _TORCHVISION)
    result.notes.append(
        "Decoding alone is simplejpeg's libjpeg-turbo into a new array. Pillow's wheels have the same library; torchvision reads with Pillow."
    )
    result.notes.append("The difference of 'fast' is the peak signal-to-noise ratio of each of 200 pictures: median, lowest and highest.")
    return result


def _take_turns(files: list[bytes], works: dict[str, Work], options: Options) -> dict[str, Figure]:
    """Images/s of each work. They take turns of a few images each, so that other load on the machine affects all equally, and ratios stay correct."""
    turns = 4 * options.runs
    once = replace(options, seconds=options.seconds / turns, runs=1)
    rates: dict[str, list[float]] = {name: [] for name in works}
    chunks = {name: _chunks(files, work) for name, work in works.items()}
    for _ in range(turns):
        for name, chunk in chunks.items():
            rates[name].append(measure(chunk, _CHUNK, _UNIT, once).value)
    return {name: Figure(statistics.median(some), min(some), max(some), _UNIT, turns) for name, some in rates.items()}


def _chunks(files: list[bytes], work: Work) -> Callable[[], None]:
    """A function that does the work for the next chunk of files; after the last file it starts again with the first."""
    turn: Iterator[tuple[int, bytes]] = itertools.cycle(enumerate(files))

    def chunk() -> None:
        for index, file in itertools.islice(turn, _CHUNK):
            work(index, file)

    return chunk


def _draw(index: int) -> Callable[[tuple[int, int]], CropBox]:
    return partial(transformer_crop, target=_TARGET, scale_max=_SCALE_MAX, rng=generator(photographs.SEED, "crop", 0, f"{index:08d}"))


def _ours(files: list[bytes]) -> dict[str, Work]:
    size = photographs.WIDTH, photographs.HEIGHT
    crops = [_draw(index)(size) for index in range(len(files))]
    image = decode(files[0])
    return {
        _DECODE: lambda _, file: simplejpeg.decode_jpeg(file),
        # At an eighth of the size, nearly all of the work is the entropy decoding, which no decoder can skip.
        _ENTROPY: lambda _, file: simplejpeg.decode_jpeg(file, min_height=1, min_width=1),
        _EXACT: lambda index, file: picture(file, _draw(index), _TARGET),
        _FAST: lambda index, file: picture(file, _draw(index), _TARGET, "fast"),
        "decode, exact": lambda _, file: decode(file),
        "Listing 2 of a decoded image": lambda index, _: cut(image, crops[index], _TARGET),
        "seeding and drawing a crop": lambda index, _: _draw(index)(size),
    }


def _difference(files: list[bytes]) -> Figure:
    ratios = []
    for index, file in enumerate(files[:200]):
        exact, fast = (picture(file, _draw(index), _TARGET, decoding)[0].astype(np.float64) for decoding in ("exact", "fast"))
        ratios.append(float(10 * np.log10(255**2 / max(np.square(exact - fast).mean(), 1e-6))))
    return Figure(float(np.median(ratios)), min(ratios), max(ratios), "dB", len(ratios))


def _theirs(files: list[bytes], folder: Path) -> dict[str, Work]:
    from torchvision import transforms  # imported here because it takes two seconds

    augment = transforms.Compose([transforms.RandomResizedCrop(_TARGET), transforms.ToTensor()])
    bytes_only = transforms.Compose([transforms.RandomResizedCrop(_TARGET), transforms.PILToTensor()])
    works: dict[str, Work] = {
        "Pillow: decode": lambda _, file: np.asarray(Image.open(io.BytesIO(file))),
        _TORCHVISION: lambda _, file: augment(Image.open(io.BytesIO(file)).convert("RGB")),
        "torchvision: the same with PILToTensor": lambda _, file: bytes_only(Image.open(io.BytesIO(file)).convert("RGB")),
    }
    if find_spec("webdataset") is not None:
        samples = iter(_webdataset(files, folder / "train-000000.tar", augment))
        works[_WEBDATASET] = lambda _, file: next(samples)
    return works


def _webdataset(files: list[bytes], path: Path, augment: Callable[[Any], Any]) -> Any:
    """An endless webdataset of the files, with Pillow and torchvision's transforms, as in the documentation of webdataset."""
    with tarfile.open(path, "w") as tar:
        for index, file in enumerate(files):
            member = tarfile.TarInfo(f"{index:08d}.jpg")
            member.size = len(file)
            tar.addfile(member, io.BytesIO(file))
    webdataset = import_module("webdataset")
    return webdataset.WebDataset(str(path), shardshuffle=False).decode("pil").to_tuple("jpg").map_tuple(augment).repeat()


if __name__ == "__main__":
    main(run)
