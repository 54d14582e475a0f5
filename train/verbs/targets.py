"""Finds out what a URL given to ``inspect`` or ``validate`` refers to: a shard set, a tokenizer, a folder of such, a run folder, or raw data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from infra import storage
from infra.errors import ConfigError
from infra.run_folder import RunFolder
from train.config import RunConfig, load_run
from train.run import places

Kind = Literal["set", "tokenizer", "folder", "run", "source"]
SET_SCHEMAS = ("image/", "codes/")
TOKENIZER_SCHEMA = "tokenizer/"


@dataclass(frozen=True)
class Place:
    """One version of a shard set."""

    url: str
    version: str = ""
    """Content hash; empty: the newest."""


@dataclass(frozen=True)
class Run:
    """A run folder and its configuration."""

    cfg: RunConfig
    folder: RunFolder

    @property
    def decoder(self) -> bool:
        """Whether the run has an exported dVAE."""
        return storage.exists(self.folder.at("dvae", "export", "config.json"))


@dataclass(frozen=True)
class Target:
    """What was found at a URL."""

    kind: Kind
    sets: tuple[Place, ...] = ()
    """Shard sets, image sets first. Those of a run are in the versions that its stages made or found."""
    tokenizers: tuple[str, ...] = ()
    run: Run | None = None


def resolve(url: str) -> Target:
    """Find out what is at a URL. Asks only whether a few files exist; lists no folder."""
    url = url.rstrip("/") or url
    if url == "emoji":
        return Target("source")
    if is_run(url):
        run = open_run(url)
        roots = (places.images(run.cfg, run.folder), run.cfg.data.codes or run.folder.at("codes"))
        tokenizer = places.tokenizer(run.cfg, run.folder)
        pinned = _pinned(run)
        found = tuple(Place(each, pinned.get(each, "")) for root in roots for each in _sets_below(root))
        return Target("run", found, (tokenizer,) if schema_of(tokenizer).startswith(TOKENIZER_SCHEMA) else (), run)
    schema = schema_of(url)
    if schema.startswith(SET_SCHEMAS):
        return Target("set", (Place(url),))
    if schema.startswith(TOKENIZER_SCHEMA):
        return Target("tokenizer", (), (url,))
    sets = tuple(Place(each) for each in _sets_below(url))
    return Target("folder", sets) if sets else Target("source")


def _pinned(run: Run) -> dict[str, str]:
    """Set -> version, for the sets that a run's finished stages name. So a run does not see what others append to a shared set."""
    images, codes = ((run.folder.done(stage) or {}).get("versions", {}) for stage in ("prepare", "encode"))
    found = {places.image_set(run.cfg, run.folder, split): version for split, version in images.items()}
    for name, version in codes.items():
        crop, _, split = name.partition("/")
        found[places.code_set(run.cfg, run.folder, int(crop) if crop.isdecimal() else -1, split)] = version
    return found


def open_run(url: str) -> Run:
    """Open a run folder by its URL.

    Raises:
        ConfigError: there is no run, or its configuration was written by another version of this code.
    """
    if not is_run(url):
        raise ConfigError(f"{url}: no run folder (config.json and provenance.json are missing); name one, for example runs/demo.")
    return Run(load_run(url, []), RunFolder(url))


def is_run(url: str) -> bool:
    """Whether there is a run folder at a URL."""
    return all(storage.exists(storage.join(url, name)) for name in ("provenance.json", "config.json"))


def schema_of(url: str) -> str:
    """The schema that the manifest at a URL names; empty if there is no manifest of this project.

    Raises:
        DataError: the manifest is not valid JSON.
    """
    place = storage.join(url, "manifest.json")
    if not storage.exists(place):
        return ""
    found = storage.read_json(place)
    return str(found.get("schema", "")) if isinstance(found, dict) else ""


def _sets_below(root: str) -> Iterator[str]:
    yield from _splits(root)
    crop = 0
    while found := list(_splits(storage.join(root, f"crop-{crop}"))):
        yield from found
        crop += 1


def _splits(root: str) -> Iterator[str]:
    for split in places.SPLITS:
        url = storage.join(root, split)
        if schema_of(url).startswith(SET_SCHEMAS):
            yield url
