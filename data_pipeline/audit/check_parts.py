"""Integrity checks of a shard set, part by part: hashes, markers, ids, records. Problems are collected and not raised, so that one damaged file hides no other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.audit.alike import Alike, reason_of
from data_pipeline.images.crops import CropBox, decode
from data_pipeline.images.mirroring import is_mirrored
from data_pipeline.shards import links
from data_pipeline.shards.part_files import INDEX, U64, unpack_captions
from data_pipeline.shards.rows import Row, ShardRows
from data_pipeline.shards.schema import check_columns, read_marker_file, read_part_index
from data_pipeline.shards.shard_set import CAPTIONS, DONE, FURTHER, IDS, IMAGE_SCHEMA, MANIFEST, PRINTS, part_name
from infra import scratch, storage
from infra.digests import id_hash
from infra.errors import DataError, UnreachableError
from infra.seeds import derive

_TOLD = 3  # how many record problems of one file are listed; the others are only counted


@dataclass(frozen=True)
class Problem:
    """A fault of one file."""

    file: str
    what: str
    delete: tuple[str, ...] = ()
    """URLs to delete, so that their stage writes them again."""
    stage: str = ""
    """The stage that writes the file, if it is not the one that writes the set."""


@dataclass(frozen=True)
class Rules:
    """The rules against which the records of a set are checked."""

    schema: str
    settings: Mapping[str, Any]
    """The settings in the manifest."""
    vocab: int = 0
    """Size of the codebook; 0: unknown, so codes are not checked against it."""
    decode: bool = False
    """Decode every image."""


@dataclass(frozen=True)
class PartJob:
    """One part to check: everything that a worker process needs."""

    set_url: str
    part: Mapping[str, Any]
    """The manifest's entry: name, count, files."""
    entries: tuple[Mapping[str, Any], ...]
    """The entries of the part's shards in the set's index."""
    rules: Rules
    version_url: str
    """Folder of the version's index and manifest."""
    images: PartJob | None = None
    """For a part of codes: the part of images that it was made from, to know the sizes of the images."""

    @property
    def place(self) -> str:
        return storage.join(self.set_url, self.part["name"])


@dataclass
class PartResult:
    """What was found in one part."""

    problems: list[Problem] = field(default_factory=list)
    files: int = 0
    num_bytes: int = 0
    records: int = 0
    ids: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))
    """Of ids.u64, or of the records where that file is damaged."""
    alike: Alike = field(default_factory=Alike)


@dataclass
class _Columns:
    """The columns of a part's records that its side files repeat."""

    ids: list[int] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    captions: list[list[str]] = field(default_factory=list)


def check_part(job: PartJob) -> PartResult:
    """Check one part: its marker against the manifest, files against hashes, index against shards, records against the rules, side files against the records.

    Raises:
        UnreachableError: the storage gives no answer, and would give none for the next file either.
        DataError: many files in a row fail alike, as the next ones would.
    """
    result = PartResult()
    result.problems += [Problem(storage.join(job.place, DONE), what, (job.place,)) for what in _marker_problems(job)]
    with _local(job, result) as (folder, sound):
        # If the part's own index is intact it says where the rows are, and the set's index must agree with it.
        try:
            entries = _own_entries(job, folder) if INDEX in sound else list(job.entries)
        except DataError as error:
            result.problems.append(Problem(storage.join(job.place, INDEX), _without_place(error, str(folder / INDEX)), (job.place,)))
            return result
        if entries != list(job.entries):
            what = f"lists other shards of {job.part['name']} than the part's own index"
            result.problems.append(Problem(storage.join(job.version_url, INDEX), what, (storage.join(job.set_url, MANIFEST), job.version_url)))
        columns, whole = _Columns(), True
        sizes = image_sizes(job.images) if job.images is not None else None
        for entry in entries:
            name = entry["raw_data"]["basename"].partition("/")[2]
            if name not in sound:
                whole = False  # reported already: its hash is wrong
                continue
            found = _check_shard(job, folder / name, entry, sizes, columns)
            result.problems += found
            whole = whole and not found
        result.records = len(columns.ids)
        result.ids = np.array(columns.ids, U64)
        if whole:  # otherwise records that could not be read would look like differences
            result.problems += [
                Problem(storage.join(job.place, name), what, (job.place,)) for name, what in _side_problems(job, folder, sound, columns)
            ]
        if IDS in sound:
            result.ids = _read_u64(folder / IDS)
    return result


def _side_problems(job: PartJob, folder: Path, sound: set[str], columns: _Columns) -> Iterator[tuple[str, str]]:
    """Where the index, ids.u64, prints.u64, further.u64 and the captions file disagree with the records."""
    count = len(columns.ids)
    if count != job.part["count"]:
        yield INDEX, f"names shards of {count} records, the manifest counts {job.part['count']}"
    if IDS in sound:
        yield from ((IDS, what) for what in _difference("the ids of the records", _read_u64(folder / IDS).tolist(), columns.ids))
    if PRINTS in sound:
        prints = _read_u64(folder / PRINTS)
        yield from ((PRINTS, what) for what in _difference("three numbers a record, the third of its group", prints[2::3].tolist(), columns.groups))
    if FURTHER in sound:
        further = _read_u64(folder / FURTHER)
        if len(further) % 2 or not np.isin(further[::2], np.array(columns.ids, U64)).all():
            yield FURTHER, "is not two numbers a row, the first of a record's id: it names records that the part does not have"
    if CAPTIONS in sound:
        try:
            captions = list(unpack_captions((folder / CAPTIONS).read_bytes(), count, CAPTIONS))
        except DataError as error:
            yield CAPTIONS, _without_place(error, CAPTIONS)
        else:
            yield from ((CAPTIONS, what) for what in _difference("the captions of the records", captions, columns.captions))


def _difference(what: str, stored: Sequence[Any], expected: Sequence[Any]) -> Iterator[str]:
    if len(stored) != len(expected):
        yield f"is not {what}: it holds {len(stored)}, the shards {len(expected)} records"
    elif stored != expected:
        first = next(row for row, (one, other) in enumerate(zip(stored, expected, strict=True)) if one != other)
        yield f"is not {what}: row {first} is the first that differs"


def _marker_problems(job: PartJob) -> Iterator[str]:
    place = storage.join(job.place, DONE)
    try:
        marker = read_marker_file(place)
        if part_name(marker["inputs"]) != job.part["name"]:
            yield f"marks {part_name(marker['inputs'])}, not {job.part['name']}"
        if marker["count"] != job.part["count"]:
            yield f"counts {marker['count']} records, the manifest {job.part['count']}"
        ours, theirs = ({file["name"]: file["sha256"] for file in files} for files in (job.part["files"], marker["files"]))
        for name in sorted(ours.keys() | theirs.keys()):
            if ours.get(name) != theirs.get(name):
                yield f"has another hash of {name} than the manifest: the part was written again after the set was merged"
    except UnreachableError:  # says nothing about the file, which must not be deleted because of it
        raise
    except DataError as error:
        yield _without_place(error, place)


@contextmanager
def _local(job: PartJob, result: PartResult) -> Iterator[tuple[Path, set[str]]]:
    """The part's folder on this machine, and the names of the files in it whose size and hash are right. The others are added to the problems."""
    remote = storage.is_remote(job.place)
    with scratch.folder("validate-") as room:
        folder = Path(room) if remote else storage.local_path(job.place)
        sound = set()
        for file in job.part["files"]:
            place, path = storage.join(job.place, file["name"]), folder / file["name"]
            result.files += 1
            try:
                links.check(place)
                if remote:
                    storage.download_file(place, path)
                size = path.stat().st_size if path.is_file() else -1
                found = storage.sha256_file(path)
            except UnreachableError:
                raise
            except DataError as error:
                result.problems.append(Problem(place, _without_place(error, place), (job.place,)))
                if remote and (reason := reason_of(error)):
                    result.alike.wrong(reason, str(error).rstrip("."))
                continue
            result.num_bytes += size
            if found == file["sha256"]:
                sound.add(file["name"])
                result.alike.right()
                continue
            what = f"{size} bytes instead of {file['bytes']}" if size != file["bytes"] else "its SHA-256 is not the manifest's"
            result.problems.append(Problem(place, f"damaged: {what}", (job.place,)))
            if remote and size == file["bytes"]:
                result.alike.wrong("other bytes", f"{place}: {what}")
        yield folder, sound


def _own_entries(job: PartJob, folder: Path) -> list[Mapping[str, Any]]:
    """The entries of the part's own index, with shard names as in the set's index."""
    found: list[Mapping[str, Any]] = list(read_part_index(str(folder / INDEX)))
    return [{**entry, "raw_data": {**entry["raw_data"], "basename": f"{job.part['name']}/{entry['raw_data']['basename']}"}} for entry in found]


def _check_shard(job: PartJob, path: Path, entry: Mapping[str, Any], sizes: Mapping[str, tuple[int, int]] | None, columns: _Columns) -> list[Problem]:
    place = storage.join(job.set_url, entry["raw_data"]["basename"])
    complaints: list[str] = []
    try:
        for number, row in enumerate(read_shard(path, entry, job.rules.schema, place)):
            record = dict(row)
            columns.ids.append(id_hash(record["id"]))
            if job.rules.schema == IMAGE_SCHEMA:
                columns.groups.append(id_hash(record["group"]))
                columns.captions.append(record["captions"])
            what = record_problem(record, job.rules, None if sizes is None else sizes.get(record["id"], (0, 0)))
            if what:
                complaints.append(f"record {number} ('{record['id'][:80]}'): {what}")
    except DataError as error:
        complaints.append(_without_place(error, place))
    if len(complaints) > _TOLD:
        complaints[_TOLD:] = [f"and {len(complaints) - _TOLD} more records like these"]
    return [Problem(place, what, (job.place,)) for what in complaints]


def read_shard(path: Path, entry: Mapping[str, Any], schema: str, place: str) -> Iterator[Row]:
    """All rows of a local shard file.

    Args:
        path: the file.
        entry: the shard's entry in the index.
        schema: schema of the set.
        place: URL of the file, for messages.

    Raises:
        DataError: the columns are not those of the schema, or the file's table of offsets or a row is damaged.
    """
    check_columns(schema, entry, place)
    rows = ShardRows(path, entry, place)
    try:
        yield from (rows[number] for number in range(len(rows)))
    finally:
        rows.close()


def record_problem(record: Mapping[str, Any], rules: Rules, size: tuple[int, int] | None) -> str:
    """What is wrong with one record; empty if nothing is.

    Args:
        record: columns and values.
        rules: the rules of the set.
        size: (width, height) of the image that the codes were made from; (0, 0): there is no such image; None: unknown.
    """
    captions = record["captions"]
    if not record["id"]:
        return "the id is empty"
    if not isinstance(captions, list) or not captions or not all(isinstance(caption, str) and caption.strip() for caption in captions):
        return f"captions are {str(captions)[:80]!r}, expected a list of at least one text that is not blank"
    return _image_problem(record, rules) if rules.schema == IMAGE_SCHEMA else _code_problem(record, rules, size)


def _image_problem(record: Mapping[str, Any], rules: Rules) -> str:
    width, height, split = record["width"], record["height"], rules.settings.get("split")
    if width <= 0 or height <= 0:
        return f"{width} x {height} pixels"
    if not record["image"]:
        return "the image has no bytes"
    if split and record["split"] != split:
        return f"belongs to split '{record['split']}', the set is '{split}'"
    if rules.decode:
        try:
            pixels = decode(record["image"])
        except DataError as error:
            return str(error)
        if pixels.shape[:2] != (height, width):
            return f"the image has {pixels.shape[1]} x {pixels.shape[0]} pixels, the record says {width} x {height}"
    return ""


def _code_problem(record: Mapping[str, Any], rules: Rules, size: tuple[int, int] | None) -> str:
    codes, settings = record["codes"], rules.settings
    if rules.vocab and int(codes.max()) >= rules.vocab:
        return f"holds code {int(codes.max())}, the dVAE has {rules.vocab}"
    if "crop_index" in settings and record["crop_index"] != settings["crop_index"]:
        return f"is of crop {record['crop_index']}, the set of crop {settings['crop_index']}"
    if {"seed", "crop_index"} <= settings.keys() and record["seed"] != derive(settings["seed"], "crop", settings["crop_index"], record["id"]):
        return "its seed does not follow from the run's seed and its id"
    try:
        crop = CropBox.from_json(record["crop"])
    except (KeyError, TypeError, ValueError) as error:
        return f"the crop is no crop box ({type(error).__name__}: {error})"
    return _mirror_problem(crop, record, settings) or crop_problem(crop, int(settings.get("image_size", 0)), size)


def _mirror_problem(crop: CropBox, record: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    never = settings.get("unmirrored", [])
    if not isinstance(never, list) or not all(isinstance(word, str) for word in never):
        return "its set names as unmirrored what are no words"
    mirrored = "unmirrored" in settings and is_mirrored(settings.get("seed", 0), record["id"], record["crop_index"], record["captions"], never)
    if crop.flip == mirrored:
        return ""
    return f"its crop is {'' if crop.flip else 'not '}mirrored, against its id, its captions and the words in the settings of its set"


def crop_problem(crop: CropBox, image_size: int, size: tuple[int, int] | None) -> str:
    """What is wrong with a crop box; empty if nothing is.

    Args:
        crop: the box.
        image_size: side of the crop in pixels; 0: unknown.
        size: as in ``record_problem``.
    """
    left, top, right, bottom = crop.box
    side = right - left
    if size == (0, 0):
        return "there is no image of this id in the image set that the codes name"
    if not (0 <= left < right and top >= 0 and side == bottom - top):
        return f"the crop box {list(crop.box)} is no square in an image"
    if size is not None and (right > size[0] or bottom > size[1]):
        return f"the crop box {list(crop.box)} reaches out of its image of {size[0]} x {size[1]} pixels"
    if not image_size <= crop.resize <= side:
        return f"the crop is resized to {crop.resize}, outside {image_size} to {side}"
    if min(crop.offset) < 0 or max(crop.offset) + image_size > crop.resize:
        return f"the crop at {list(crop.offset)} of {image_size} pixels reaches out of the resized {crop.resize}"
    return ""


def image_sizes(job: PartJob) -> dict[str, tuple[int, int]] | None:
    """Id -> (width, height) for the images of a part; None if one of its files is damaged (the check of the image set reports it)."""
    sizes = {}
    with _local(job, PartResult()) as (folder, sound):
        try:
            for entry in job.entries:
                name = entry["raw_data"]["basename"].partition("/")[2]
                if name not in sound:
                    return None
                place = storage.join(job.set_url, entry["raw_data"]["basename"])
                for record in read_shard(folder / name, entry, job.rules.schema, place):
                    sizes[record["id"]] = (int(record["width"]), int(record["height"]))
        except DataError:
            return None
    return sizes


def _read_u64(path: Path) -> NDArray[np.uint64]:
    data = path.read_bytes()
    return np.frombuffer(data[: len(data) // 8 * 8], U64)


def _without_place(error: DataError, place: str) -> str:
    return str(error).removeprefix(f"{place}: ").rstrip(".")
