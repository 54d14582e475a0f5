"""Configuration: TOML preset + ``section.key=value`` overrides -> frozen, strict models -> sorted JSON. No torch."""

from __future__ import annotations

import copy
import datetime
import json
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from infra import s3_client, shown, strict_json
from infra.errors import ConfigError


class Section(BaseModel):
    """Base of every configuration section: frozen, strict, no unknown keys, attribute docstrings as descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)


M = TypeVar("M", bound=BaseModel)


def parse(text: str, origin: str) -> dict[str, Any]:
    """Parse a TOML preset, or JSON where ``origin`` ends in .json (a run folder's ``config.json``), into plain dictionaries.

    Raises:
        ConfigError: not valid TOML or JSON, or no sections at the top level.
    """
    kind = "JSON" if origin.endswith(".json") else "TOML"
    try:
        loaded = strict_json.loads(text) if kind == "JSON" else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{origin}: not valid {kind}: {error}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{origin}: expected sections at the top level, found {type(loaded).__name__}.")
    return loaded


def parse_overrides(overrides: list[str]) -> list[tuple[list[str], Any]]:
    """Split ``section.key=value`` words; values are TOML literals, and anything that is not one is a plain string.

    Raises:
        ConfigError: a word has no ``=`` or an empty key.
    """
    parsed = []
    for word in overrides:
        key, equals, value = word.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(f"override '{shown.cut(word)}': expected section.key=value, for example dalle_fit.steps=1000.")
        try:
            parsed.append((key.split("."), tomllib.loads(f"v = {value}")["v"]))
        except (tomllib.TOMLDecodeError, RecursionError):
            parsed.append((key.split("."), value))
    return parsed


def as_typed(overrides: list[str]) -> dict[str, str]:
    """``{"section.key": "the text behind ="}`` for the overrides whose parsed value prints differently from what was typed (dates, 1_000, 0x10)."""
    words = dict(word.partition("=")[::2] for word in overrides)
    return {key: words[key] for key, value in ((".".join(path), value) for path, value in parse_overrides(overrides)) if str(value) != words[key]}


def load(model: type[M], tree: dict[str, Any], origin: str, overrides: list[str]) -> M:
    """Build ``model`` from a parsed preset (named by ``origin`` in messages) and command-line overrides.

    Raises:
        ConfigError: an unknown key (the accepted ones are listed), a wrong type (the key is named), a section whose values contradict each other, or a password
            in a URL, here or in an endpoint that the environment sets (configurations are stored, so they may not hold one).
    """
    s3_client.refuse_passwords()
    tree = copy.deepcopy(tree)
    for path, value in parse_overrides(overrides):
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                raise ConfigError(f"override '{'.'.join(path)}': '{part}' is a value, not a section.")
        node[path[-1]] = value
    return validate(model, tree, origin, as_typed(overrides))


def validate(model: type[M], tree: dict[str, Any], origin: str, typed: Mapping[str, str] | None = None) -> M:
    """Validate plain dictionaries, and turn every complaint of pydantic into one that names the key and what it accepts.

    Args:
        typed: section.key -> the value as it was typed on the command line, for messages.
    """
    typed = typed or {}
    for key, text in _texts(tree):
        if shown.place_holds_password(text):
            raise ConfigError(f"{origin}: {key}: {shown.NO_PASSWORDS}")
    for key, value in flatten(tree).items():
        if isinstance(value, datetime.date | datetime.time):
            raise ConfigError(
                f"{origin}:\n  {key}: {typed.get(key, value)} is read as a date or a time, which no key accepts; {_quoted(key, typed.get(key, str(value)))}."
            )
    try:
        # pydantic's JSON mode: 3 is accepted as a float and a list as a tuple, but "3" is not a number and 3.0 is not an integer.
        return model.model_validate_json(json.dumps(tree), strict=True)
    except ValidationError as error:
        lines = [_complaint(model, tree, dict(detail), typed) for detail in error.errors()]
        raise ConfigError(f"{origin}:\n  " + "\n  ".join(lines)) from error
    except TypeError as error:
        raise ConfigError(f"{origin}: a value cannot be written as JSON ({error}); dates and times are not accepted.") from error


def _texts(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every string in a tree, with its key."""
    if isinstance(tree, str):
        yield key, tree
    elif isinstance(tree, dict):
        for name, inner in tree.items():
            yield from _texts(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(tree, list):
        for inner in tree:
            yield from _texts(inner, key)


def _quoted(key: str, text: str) -> str:
    """How to type a value so that it is read as text; the outer quotes are for the shell, which removes them."""
    return f"write '{key}=\"{text}\"' for text"


def _complaint(model: type[BaseModel], tree: dict[str, Any], detail: dict[str, Any], typed: Mapping[str, str]) -> str:
    where = [str(part) for part in detail["loc"]]
    key = ".".join(where)
    if detail["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        accepted = ", ".join(sorted(accepted_keys(model, where[:-1])))
        place = f"in [{'.'.join(where[:-1])}]" if len(where) > 1 else "as sections"
        return f"{key}: unknown key; accepted {place}: {accepted}."
    if detail["type"] == "value_error":
        return f"{key or 'configuration'}: {detail['ctx']['error']}"
    read = shown.value(detail["input"])
    given = f"given: {typed[key]} (read as {read})" if key in typed else f"given: {read}"
    hint = (
        f"; {_quoted(key, typed.get(key, str(detail['input'])))}"
        if detail["type"] == "string_type" and not isinstance(detail["input"], list | dict)
        else ""
    )
    return f"{key}: {detail['msg']}; {given}{hint}."


def accepted_keys(model: type[BaseModel], path: list[str]) -> list[str]:
    """The keys that a section accepts, for error messages."""
    schema = model.model_json_schema()
    node = schema
    for part in path:
        node = node["items"] if node.get("type") == "array" and "items" in node else node.get("properties", {}).get(part, {})
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
    return list(node.get("properties", {}))


def to_json(config: BaseModel) -> str:
    """The resolved configuration as sorted, indented JSON: what ``config.json`` holds."""
    plain = TypeAdapter(type(config)).dump_python(config, mode="json")
    return json.dumps(plain, indent=2, sort_keys=True) + "\n"


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` -> ``{"a.b": 1}``."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line for each key whose value differs: ``key: old -> new``."""
    a, b = flatten(old), flatten(new)
    missing = "(absent)"
    return [
        f"{key}: {shown.value(a.get(key, missing))} -> {shown.value(b.get(key, missing))}"
        for key in sorted(a | b)
        if a.get(key, missing) != b.get(key, missing)
    ]
