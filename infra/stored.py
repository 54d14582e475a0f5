"""Reads back our JSON files and checks each against a description of its fields, because anybody may have changed the file.

A description is a ``Stored`` model. A valid file is returned as the plain dictionary that it holds, so that comparisons and digests are those of the file
itself. An invalid one is a DataError that names the file, the field, what was found there and what to do.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from infra import shown, storage
from infra.errors import DataError, ExitCode, MissingError

Count = Annotated[int, Field(ge=0, lt=1 << 53)]
"""A number of records, bytes or updates."""
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Seconds = Annotated[float, Field(ge=-1e12, le=1e12, allow_inf_nan=False)]
"""A time or a duration."""
Number = Annotated[float, Field(allow_inf_nan=False)]
"""Any finite number."""


def _exit_code(code: int) -> int:
    return int(ExitCode(code))


Code = Annotated[int, AfterValidator(_exit_code)]
"""One of the exit codes."""


class Stored(BaseModel):
    """Base of the descriptions: types are strict; fields that a description does not name are allowed, with any value."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)


class Identified(Stored):
    """A manifest of anything that has a content hash."""

    content_hash: Annotated[str, Field(min_length=1, max_length=200)]
    parents: dict[str, str] = Field(default_factory=dict)


def content_hash(url: str) -> str:
    """The content hash in a manifest; 'none' if there is no such file.

    Raises:
        DataError: it is damaged.
    """
    found = read_if_there(url, Identified)
    return "none" if found is None else str(found["content_hash"])


def read(url: str, model: type[Stored], remedy: str = "") -> dict[str, Any]:
    """A stored file, checked.

    Args:
        url: of the file.
        model: what its fields must be.
        remedy: what to do if it is damaged.

    Raises:
        DataError: it is missing, not JSON, or does not match the description.
    """
    found: dict[str, Any] = storage.read_json(url)
    check(found, model, url, remedy)
    return found


def read_if_there(url: str, model: type[Stored], remedy: str = "") -> dict[str, Any] | None:
    """As ``read``, but None if there is no such file. It costs one request, none of which only asks whether the file exists."""
    try:
        return read(url, model, remedy)
    except MissingError:
        return None


def read_list(url: str, model: type[Stored], remedy: str = "") -> list[dict[str, Any]]:
    """A stored list; each entry is checked against the description, see ``read``."""
    found = storage.read_json(url)
    check_list(found, model, url, remedy)
    return list(found)


def check_list(found: Any, model: type[Stored], place: str, remedy: str = "") -> None:
    """Check a list that was read already; see ``check``."""
    if not isinstance(found, list):
        raise DataError(
            f"{place}: damaged, or not written by this project: expected a list, found {type(found).__name__}; "
            f"{remedy or 'delete it and run the stage that wrote it again'}."
        )
    for number, entry in enumerate(found):
        check(entry, model, f"{place}, entry {number}", remedy)


def check(found: Any, model: type[Stored], place: str, remedy: str = "") -> None:
    """Check a value that was read already.

    Raises:
        DataError: it does not match the description; ``place`` names the file in the message.
    """
    try:
        model.model_validate(found)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(step) for step in first["loc"]) or "the file"
        what = str(first.get("ctx", {}).get("error") or first["msg"])
        given = "" if first["type"] == "missing" else f", found {shown.value(first['input'], 100)}"
        raise DataError(
            f"{place}: damaged, or not written by this project: {where}: {what[:1].lower()}{what[1:]}{given}; "
            f"{remedy or 'delete it and run the stage that wrote it again'}."
        ) from None
