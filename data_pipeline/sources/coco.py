"""COCO's captions: ``annotations/captions_*.json``, with images in a folder beside it. Each input shard is a run of consecutive images."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from typing import Any

from data_pipeline.config import SourceConfig
from data_pipeline.sources import foreign_json
from data_pipeline.sources.origin import Origin
from data_pipeline.sources.pairs import Census, Found, InputShard, Unreadable
from data_pipeline.sources.rows_to_pairs import (
    IMAGE_SUFFIXES,
    MISSING_IMAGE,
    NO_ID,
    ODD_CAPTION,
    OUTSIDE,
    REPEATED_ID,
    REPEATED_NAME,
    BadRecord,
    Draft,
    distinct,
    named_by,
    split_of_name,
    text_in,
    with_images,
)
from infra import storage, strict_json
from infra.errors import DataError, UnchangingError, UnreachableError

_LOOKED_AT = 4  # how many images are looked for in each folder
_NAME = re.compile(r"(^|/)captions?_([^/]*)\.json$", re.IGNORECASE)


def is_captions(name: str) -> bool:
    """Whether a file holds captions in COCO's format, judged by its name; instances_*.json and the like hold none."""
    return _NAME.search(name) is not None


@dataclass(frozen=True)
class Annotations:
    """The content of one file: its images in order, and the captions of each."""

    images: list[dict[str, Any]]
    captions: dict[Any, list[Any]]
    strays: list[Any] = field(default_factory=list)
    """Ids of images that have captions but are not listed."""
    repeated: frozenset[str] = frozenset()
    """Ids that several images have: whose a caption is cannot be told."""
    nobodys: int = 0
    """Number of annotations that name no image."""
    unclear: int = 0
    """Number of annotations in which a key occurs twice."""


class CocoSource:
    """The captions_*.json files of a folder that also holds the images."""

    def __init__(self, config: SourceConfig, records_per_part: int) -> None:
        self.name = config.url
        self.origin = Origin(config)
        self.records = records_per_part
        self.census = Census()
        self._load = lru_cache(1)(self._annotations)

    def shards(self) -> Iterator[InputShard]:
        """Runs of consecutive images. This reads the captions files whole, because each is a single JSON value.

        Raises:
            DataError: there is no captions file.
        """
        self.census = census = Census()
        files, folders = [], dict[str, None]()
        for info in self.origin.files(census):
            if is_captions(info.name):
                files.append(info)
                census.read += 1
            elif info.name.lower().endswith(IMAGE_SUFFIXES):
                folders[info.name.rpartition("/")[0]] = None
                census.pictures += 1
            else:
                census.pass_over(info.name)
        if not files:
            raise DataError(f"{self.name}: no captions_*.json there; data.sources accepts the folder that holds COCO's annotations/ and images.")
        for info in sorted(files, key=lambda info: info.name):
            try:
                found = self._load(info.name, info.version)
            except UnreachableError:
                raise
            except DataError:  # reading this shard will report the error, and other files are not affected
                yield InputShard(f"{info.name}@0", info.version, ("",), files=(info.name,), sizes=str(info.size), bytes=info.size)
                continue
            folder = self._folder(info.name, list(folders), found)
            splits = frozenset({_split(folder, info.name)})
            for start in range(0, max(1, len(found.images)), self.records):
                end = min(start + self.records, len(found.images))
                name, read = f"{info.name}@{start}", info.size if start == 0 else 0
                yield InputShard(name, info.version, (folder,), (start, end), splits, (info.name,), str(info.size), read, names_images=True)

    def read(self, shard: InputShard, wanted: Callable[[str], bool]) -> Iterator[Found]:
        """The images of a run, each with all of its captions.

        Raises:
            DataError: the captions file is missing, damaged or not in COCO's format.
        """
        name = shard.name.rpartition("@")[0]
        found = self._load(name, shard.version)
        yield from with_images(self._drafts(shard, wanted))
        if shard.span[0] == 0:
            yield from (Unreadable(self.origin.id(f"{name}/{identity}"), MISSING_IMAGE) for identity in found.strays)
            yield from (Unreadable(self.origin.id(f"{name}/annotations/{number}"), NO_ID) for number in range(found.nobodys))
            yield from (Unreadable(self.origin.id(f"{name}/annotations/unclear/{number}"), REPEATED_NAME) for number in range(found.unclear))

    def images(self, shard: InputShard, wanted: Callable[[str], bool]) -> Iterator[str]:
        """As of Source."""
        return named_by(self._drafts(shard, wanted))

    def _drafts(self, shard: InputShard, wanted: Callable[[str], bool]) -> Iterator[Draft | Unreadable]:
        name = shard.name.rpartition("@")[0]
        found = self._load(name, shard.version)
        drafts = (self._draft(name, shard.keys[0], image, found) for image in found.images[slice(*shard.span)])
        return (draft for draft in drafts if isinstance(draft, Unreadable) or wanted(draft.pair.group))

    def credits(self) -> dict[str, str]:
        return self.origin.credits()

    def url(self, name: str) -> str:
        return self.origin.part(name)

    def version(self) -> str:
        return self.origin.version("coco/2")

    def _annotations(self, name: str, version: str) -> Annotations:
        url = self.origin.part(name)
        tree = foreign_json.read(url, "captions in COCO's form", marked=True)
        if isinstance(tree, strict_json.Twice):
            raise UnchangingError(f"{url}: a key of the outermost object occurs twice, so one of two lists would be lost; mend the file.")
        images, said = (tree.get("images"), tree.get("annotations")) if isinstance(tree, dict) else (None, None)
        if images is None or said is None or not _is_rows(images) or not _is_rows(said):
            raise UnchangingError(
                f"{url}: not captions in COCO's form: a JSON object with the lists 'images' (id, file_name) and 'annotations' (image_id, caption)."
            )
        ids = Counter(json.dumps(image["id"]) for image in images if image.get("id") is not None)
        captions: dict[Any, list[Any]] = {identity: [] for identity in ids}
        strays: dict[str, None] = {}
        nobodys = unclear = 0
        for annotation in said:
            if isinstance(annotation, strict_json.Twice):
                unclear += 1
                continue
            identity = json.dumps(annotation.get("image_id"))
            if annotation.get("image_id") is None:
                nobodys += 1
            elif identity in captions:
                captions[identity].append(annotation.get("caption"))
            else:
                strays[identity] = None
        return Annotations(images, captions, list(strays), frozenset(identity for identity, count in ids.items() if count > 1), nobodys, unclear)

    def _folder(self, name: str, folders: list[str], found: Annotations) -> str:
        """The folder of the images, relative to the base: the one named like the file (val2017 for captions_val2017.json), else the first that holds an image."""
        match = _NAME.search(name)
        named = match[2] if match else ""
        paths = list(islice((path for image in found.images if self._is_path(path := text_in(image, "file_name"))), _LOOKED_AT))
        candidates = [folder for folder in folders if folder.rpartition("/")[2] == named]
        for folder in [*candidates, *folders, ""]:
            if any(self._is_there(path, folder) for path in paths):
                return folder
        return candidates[0] if candidates else named

    def _is_path(self, path: str) -> bool:
        try:
            return bool(self.origin.image_url(path, self.origin.base))
        except BadRecord as bad:
            return bad.reason == OUTSIDE  # of the base, but perhaps not of its folder

    def _is_there(self, path: str, folder: str) -> bool:
        try:
            return storage.exists(self.origin.image_url(path, self.origin.url(folder)))
        except (BadRecord, OSError):  # its record will say so
            return False

    def _draft(self, name: str, folder: str, image: dict[str, Any], found: Annotations) -> Draft | Unreadable:
        path = text_in(image, "file_name")
        place = f"{name}/{text_in(image, 'id') or path}"
        row = {key: value for key, value in image.items() if key in ("group",)}
        try:
            if isinstance(image, strict_json.Twice):
                raise BadRecord(REPEATED_NAME)
            captions = distinct(_said(image, found))
            url = self.origin.image_url(path, self.origin.url(folder))
        except BadRecord as bad:
            return Unreadable(self.origin.id(place), bad.reason, bad.why)
        return Draft(self.origin.pair(place, row, captions, _split(folder, name), f"image/{path}"), url)


def _split(folder: str, name: str) -> str:
    return split_of_name(f"{folder}/") or split_of_name(name)


def _said(image: dict[str, Any], found: Annotations) -> list[str]:
    """The captions of an image, which only its id ties to it.

    Raises:
        BadRecord: it has no id, or shares it with another image, or a caption is no text.
    """
    if image.get("id") is None:
        raise BadRecord(NO_ID)
    identity = json.dumps(image["id"])
    if identity in found.repeated:
        raise BadRecord(REPEATED_ID)
    said = [caption for caption in found.captions[identity] if caption is not None]
    if not all(isinstance(caption, str) for caption in said):
        raise BadRecord(ODD_CAPTION)
    return said


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)
