"""What a configuration key declares about itself besides its default, and how a configuration that was stored before the key existed is read.

A key declares the following in ``json_schema_extra`` of its pydantic Field, or in the metadata of a dataclass field. A section can declare for all of its
keys in its ``model_config``.

    may_change   whether a run may continue with another value: ANY_TIME, GOING_ON, or absent (another value is another run)
    before       its value in runs that are older than the key, where that differs from the default
    place        it names files: a relative path is resolved against the working directory of the caller, and stored as an absolute one
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, get_args, get_origin

from pydantic import BaseModel, TypeAdapter
from pydantic.config import JsonDict
from pydantic_core import PydanticUndefined, to_jsonable_python

from infra.errors import ConfigError

MAY_CHANGE, BEFORE = "may_change", "before"
ANY_TIME: JsonDict = {MAY_CHANGE: "any time"}
"""For keys that say how a run is computed and watched, not what it computes."""
GOING_ON: JsonDict = {MAY_CHANGE: "with --go-on"}
"""For keys that change what a training stage computes; from its newest checkpoint on, and recorded as a change point (docs/stage2.md)."""

PLACE: JsonDict = {"place": True}
"""For keys that name a file or folder."""

M = TypeVar("M")


class Key(NamedTuple):
    """One key of a section."""

    name: str
    annotation: Any
    default: Any
    """PydanticUndefined where a value must be given."""
    declared: Mapping[str, Any]

    @property
    def before(self) -> Any:
        """The value that stands for the behaviour before the key existed."""
        return self.declared.get(BEFORE, self.default)


def keys(section: type[Any]) -> Iterator[Key]:
    """The keys of a pydantic model or dataclass that are stored."""
    if dataclasses.is_dataclass(section):
        for field in dataclasses.fields(section):
            default = field.default if field.default is not dataclasses.MISSING else PydanticUndefined
            yield Key(field.name, field.type, default, field.metadata)
        return
    of_all = section.model_config.get("json_schema_extra") or {}
    for name, info in section.model_fields.items():
        if not info.exclude:
            declared = {**of_all, **(info.json_schema_extra or {})}
            yield Key(name, info.annotation, info.get_default(call_default_factory=True), declared)


def declared(model: type[Any], path: str) -> Mapping[str, Any]:
    """What the key at a dotted path declares; a key below a list has the list's declarations. Empty for a key that does not exist."""
    found: Mapping[str, Any] = {}
    for part in path.split("."):
        key = next((key for key in keys(model) if key.name == part), None)
        if key is None:
            return {}
        found = {**{name: found[name] for name in (MAY_CHANGE,) if name in found}, **key.declared}
        inner, many = _inner(key.annotation)
        if inner is None or many:
            return found
        model = inner
    return found


def completed(model: type[Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """A stored configuration with its missing keys filled in, each with the value that stands for the behaviour before the key existed.

    Keys that are never stored are left out: where a run lies is known from its folder.
    """
    left_out = {name for name, info in getattr(model, "model_fields", {}).items() if info.exclude}
    tree = {name: value for name, value in stored.items() if name not in left_out}
    for key in keys(model):
        inner, many = _inner(key.annotation)
        found = tree.get(key.name, PydanticUndefined)
        if found is PydanticUndefined:
            if inner is not None and not many:
                tree[key.name] = completed(inner, {})
            elif key.before is not PydanticUndefined:
                tree[key.name] = to_jsonable_python(key.before)
        elif inner is not None and many and isinstance(found, list):
            tree[key.name] = [completed(inner, item) if isinstance(item, dict) else item for item in found]
        elif inner is not None and isinstance(found, dict):
            tree[key.name] = completed(inner, found)
    return tree


def adopted(config: M, stored: Mapping[str, Any]) -> M:
    """A configuration for continuing a run with a stored one: keys that the stored one lacks and that nobody has set get the value from before they existed."""
    changes: dict[str, Any] = {}
    for key in keys(type(config)):
        mine, theirs = getattr(config, key.name), stored.get(key.name, PydanticUndefined)
        inner, many = _inner(key.annotation)
        if inner is not None and not many:
            changes[key.name] = adopted(mine, theirs if isinstance(theirs, dict) else {})
        elif inner is not None and isinstance(theirs, list) and len(theirs) == len(mine):
            changes[key.name] = tuple(adopted(item, other) for item, other in zip(mine, theirs, strict=True))
        elif theirs is PydanticUndefined and BEFORE in key.declared and not _given(config, key):
            changes[key.name] = TypeAdapter(key.annotation).validate_python(key.before, strict=False)
    changes = {name: value for name, value in changes.items() if value != getattr(config, name)}
    if not changes:
        return config
    if isinstance(config, BaseModel):
        return config.model_copy(update=changes)
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def anchored(config: M, stored: M | None = None) -> M:
    """A configuration whose relative paths are made absolute, so that what is stored means the same wherever it is read.

    Args:
        config: the configuration as it was given.
        stored: the run's stored configuration; values equal to it are left as they are.

    Raises:
        ConfigError: there is a relative path, and the working directory no longer exists.
    """
    changes: dict[str, Any] = {}
    for key in keys(type(config)):
        value = getattr(config, key.name)
        inner, many = _inner(key.annotation)
        known = getattr(stored, key.name, None)
        if stored is not None and value == known:
            continue
        if inner is not None:
            changes[key.name] = tuple(anchored(item) for item in value) if many else anchored(value, known)
        elif key.declared.get("place"):
            changes[key.name] = _absolute(value) if isinstance(value, str) else tuple(map(_absolute, value))
    changes = {name: value for name, value in changes.items() if value != getattr(config, name)}
    return config.model_copy(update=changes) if changes and isinstance(config, BaseModel) else config


def _absolute(place: str) -> str:
    if not place or place == "emoji" or place.startswith("/") or "://" in place:
        return place
    try:
        return os.path.join(os.getcwd(), place.removeprefix("./"))
    except OSError as error:
        raise ConfigError(
            f"{place}: a relative path, but the working directory does not exist any more ({error.strerror}); change to another directory, or give an absolute path."
        ) from error


def _given(config: Any, key: Key) -> bool:
    """Whether somebody set the key. A dataclass does not record that; there, a value equal to the default counts as not set."""
    return key.name in config.model_fields_set if isinstance(config, BaseModel) else getattr(config, key.name) != key.default


def _inner(annotation: Any) -> tuple[type[Any] | None, bool]:
    """The section class inside an annotation, if any, and whether the annotation is a list of such sections."""
    if isinstance(annotation, type) and (issubclass(annotation, BaseModel) or dataclasses.is_dataclass(annotation)):
        return annotation, False
    if isinstance(get_origin(annotation), type) and issubclass(get_origin(annotation), Sequence):
        return _inner(get_args(annotation)[0])[0], True
    return None, False
