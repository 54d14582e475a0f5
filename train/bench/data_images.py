"""Images into pictures: decoding and Listing 2 against libjpeg-turbo alone, torchvision and webdataset. ``python -m train.bench.data_images``

All in one thread, from 1,000 generated files in memory (webdataset reads them from a tar in the page cache, as it must).
"""

from __future__ import annotations

import io
import itertools
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image

from data_pipeline.images import CropBox, Decoding, cut, decode, picture, transformer_crop
from infra.seeds import generator
from train.bench import photographs
from train.bench.harness import Figure, Options, Result, main, measure, start, threads

_TARGET, _SCALE_MAX = 256, 9 / 8
_CHUNK = 50
_DECODE, _EXACT, _FAST = "decode at full size", "decode + Listing 2, exact", "decode + Listing 2, fast"
_TORCHVISION, _WEBDATASET = "torchvision: Pillow + RandomResizedCrop + ToTensor", "webdataset: Pillow + RandomResizedCrop + ToTensor"
_UNIT = "images/s"


def run(options: Options) -> Result:
    """Images/s of each, in one thread."""
    return compare(photographs.files(), options)


def compare(files: list[bytes], options: Options) -> Result:
    """See run."""
    sizes = {"files": len(files), "size": "500 x 375", "quality": 90, "chroma": "4:2:0", "mean_file_bytes": round(np.mean([len(f) for f in files]))}
    result = start("data-images", "Images: decoding and Listing 2 at 256 pixels", options, **sizes, threads=1)
    for package in ("simplejpeg", "numba", "pillow", "torchvision"):
        result.versions[package] = version(package)
    crops = [_draw(index, 0)((photographs.WIDTH, photographs.HEIGHT)) for index in range(len(files))]
    image = decode(files[0])

    with threads(1):
        rate = partial(_rate, files, options)
        result.floor[_DECODE] = rate(lambda _, file: simplejpeg.decode_jpeg(file))
        # At an eighth, nearly all that is left is reading the entropy-coded bits: nobody can skip them.
        result.floor["decode at an eighth of the size"] = rate(lambda _, file: simplejpeg.decode_jpeg(file, min_height=1, min_width=1))
        result.measured[_EXACT] = rate(partial(_ours, "exact"))
        result.measured[_FAST] = rate(partial(_ours, "fast"))
        result.measured["decode, exact"] = rate(lambda _, file: decode(file))
        result.measured["Listing 2 of a decoded image"] = rate(lambda index, _: cut(image, crops[index], _TARGET))
        result.measured["seeding and drawing a crop"] = rate(lambda index, _: _draw(index, 0)((photographs.WIDTH, photographs.HEIGHT)))
        result.measured["fast, difference from exact"] = _difference(files)
        result.peers["Pillow: decode"] = rate(lambda _, file: np.asarray(Image.open(io.BytesIO(file))))
        _measure_peers(result, files, options)

    result.ratio("exact over torchvision", _EXACT, _TORCHVISION, goal=2.0)
    if _WEBDATASET in result.peers:
        result.ratio("exact over webdataset", _EXACT, _WEBDATASET, goal=2.0)
    result.ratio("exact over decoding alone", _EXACT, _DECODE)
    result.ratio("fast over decoding alone", _FAST, _DECODE, goal=0.9)
    result.ratio("decoding alone over torchvision", _DECODE, _TORCHVISION)
    result.notes.append(
        "Decoding alone is simplejpeg's libjpeg-turbo into a new array. Pillow's wheels have the same library; torchvision reads with Pillow."
    )
    result.notes.append("The difference of 'fast' is the peak signal-to-noise ratio of each of 200 pictures: median, lowest and highest.")
    return result


def _rate(files: list[bytes], options: Options, work: Callable[[int, bytes], object]) -> Figure:
    """Images/s of work(index, file), which goes round the files, a chunk a call."""
    turn: Iterator[tuple[int, bytes]] = itertools.cycle(enumerate(files))

    def chunk() -> None:
        for index, file in itertools.islice(turn, _CHUNK):
            work(index, file)

    return measure(chunk, _CHUNK, _UNIT, options)


def _draw(index: int, seed: int) -> Callable[[tuple[int, int]], CropBox]:
    return partial(transformer_crop, target=_TARGET, scale_max=_SCALE_MAX, rng=generator(seed, "crop", 0, f"{index:08d}"))


def _ours(decoding: Decoding, index: int, file: bytes) -> object:
    return picture(file, _draw(index, 0), _TARGET, decoding)


def _difference(files: list[bytes]) -> Figure:
    ratios = []
    for index, file in enumerate(files[:200]):
        exact, fast = (picture(file, _draw(index, 0), _TARGET, decoding)[0].astype(np.float64) for decoding in ("exact", "fast"))
        ratios.append(float(10 * np.log10(255**2 / max(np.square(exact - fast).mean(), 1e-6))))
    return Figure(float(np.median(ratios)), min(ratios), max(ratios), "dB", len(ratios))


def _measure_peers(result: Result, files: list[bytes], options: Options) -> None:
    from torchvision import transforms  # two seconds

    augment = transforms.Compose([transforms.RandomResizedCrop(_TARGET), transforms.ToTensor()])
    bytes_only = transforms.Compose([transforms.RandomResizedCrop(_TARGET), transforms.PILToTensor()])
    result.peers[_TORCHVISION] = _rate(files, options, lambda _, file: augment(Image.open(io.BytesIO(file)).convert("RGB")))
    result.peers["torchvision: the same with PILToTensor"] = _rate(
        files, options, lambda _, file: bytes_only(Image.open(io.BytesIO(file)).convert("RGB"))
    )
    if find_spec("webdataset") is None:
        result.notes.append("webdataset is not installed and was not measured; make bench-peers installs it.")
        return
    with tempfile.TemporaryDirectory() as folder:
        samples = iter(_webdataset(files, Path(folder) / "train-000000.tar", augment))
        result.peers[_WEBDATASET] = _rate(files, options, lambda _, file: next(samples))
    result.versions["webdataset"] = version("webdataset")


def _webdataset(files: list[bytes], path: Path, augment: Callable[[Any], Any]) -> Any:
    """An endless webdataset of the files, with Pillow and torchvision's transforms as its documentation has it."""
    with tarfile.open(path, "w") as tar:
        for index, file in enumerate(files):
            member = tarfile.TarInfo(f"{index:08d}.jpg")
            member.size = len(file)
            tar.addfile(member, io.BytesIO(file))
    webdataset = import_module("webdataset")
    return webdataset.WebDataset(str(path), shardshuffle=False).decode("pil").to_tuple("jpg").map_tuple(augment).repeat()


if __name__ == "__main__":
    main(run)
