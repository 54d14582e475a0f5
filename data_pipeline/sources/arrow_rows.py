"""Shared by the readers of Parquet and Arrow files: the choice of columns, and the conversion of rows to pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pyarrow

from data_pipeline.sources.arrow_sizes import pieces
from data_pipeline.sources.columns import ABOUT, find_captions, find_image, refuse_repeated, usual_captions
from data_pipeline.sources.origin import Origin
from data_pipeline.sources.pairs import Pair, Unreadable
from data_pipeline.sources.rows_to_pairs import (
    BAD_TEXT,
    BAD_VALUE,
    LARGE_IMAGE,
    MAX_IMAGE_BYTES,
    MISSING_IMAGE,
    BadRecord,
    Draft,
    distinct,
    split_of_name,
    text_in,
)
from infra.errors import UnchangingError

Row = dict[str, Any]


@dataclass(frozen=True)
class Columns:
    """The columns of a file that are read."""

    image: str
    """The column of images: bytes, paths, or structs of both (bytes, path), which Hugging Face's datasets writes."""
    is_struct: bool
    is_path: bool
    captions: tuple[str, ...]
    about: tuple[str, ...]
    """Further columns with facts about a record, such as id, group and licence."""

    @property
    def names_files(self) -> bool:
        """Whether rows may name image files beside the table; a struct whose bytes are empty does so, too."""
        return self.is_path or self.is_struct

    def read(self, with_image: bool) -> list[str]:
        """Names of the columns to read; without images when only the groups of records are needed."""
        image = [self.image] if with_image or self.is_path else [f"{self.image}.path"] if self.is_struct else []
        return list(dict.fromkeys([*self.captions, *self.about, *image]))


def columns_of(origin: Origin, schema: Any, url: str) -> Columns:
    """Choose the columns of a file that are read.

    Raises:
        DataError: there is no column of images or of captions, or its type cannot hold them.
    """
    config, names = origin.config, list(schema.names)
    image, captions = find_image(names, config), find_captions(names, config)
    about = tuple(name for name in ABOUT if name in names and name != image)
    refuse_repeated(url, names, (image, *captions, *about))
    kind = schema.field(image).type if image else None
    if kind is None or not captions or ({"status", "url", "key"} <= set(names) and image == "url"):
        hint = "; it describes the tars or folders beside it: name those" if {"status", "url", "key"} <= set(names) else ""
        raise UnchangingError(
            f"{url}: none of its columns, {', '.join(names)}, is known to hold {'captions' if image and not captions else 'images'}{hint}; "
            "columns are named in data.sources as image and captions."
        )
    for name in captions:
        _check_captions(url, name, schema.field(name).type)
    about = tuple(name for name in about if _is_fact(schema.field(name).type))
    is_struct = pyarrow.types.is_struct(kind) and {field.name for field in kind} >= {"bytes"}
    if is_struct:
        _check_struct(url, image, kind)
    value = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    is_path = pyarrow.types.is_string(value) or pyarrow.types.is_large_string(value)
    is_bytes = pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)
    if not (is_struct or is_path or is_bytes):
        raise UnchangingError(f"{url}: column '{image}' is of type {kind}; accepted are bytes, strings (paths) and structs of bytes and path.")
    return Columns(image, is_struct, is_path, captions, about)


def _is_fact(kind: Any) -> bool:
    """Whether a column holds strings or integers; others say nothing about a record (``text_in``), so they are not converted."""
    types = pyarrow.types
    value = kind.value_type if types.is_dictionary(kind) else kind
    return bool(types.is_integer(value) or types.is_string(value) or types.is_large_string(value) or types.is_string_view(value))


def _check_struct(url: str, name: str, kind: Any) -> None:
    types = pyarrow.types
    accepted = {"bytes": (types.is_binary, types.is_large_binary), "path": (types.is_string, types.is_large_string)}
    for field in kind:
        value = field.type.value_type if types.is_dictionary(field.type) else field.type
        if field.name in accepted and not any(test(value) for test in (*accepted[field.name], types.is_null)):
            raise UnchangingError(
                f"{url}: in column '{name}', a struct, {field.name} is of type {field.type}; accepted are bytes (binary, large_binary) as bytes, and strings "
                "(string, large_string) as path. Write the column anew with these types, or name another one in data.sources as image."
            )


def _check_captions(url: str, name: str, kind: Any, *, inside: bool = False) -> None:
    types = pyarrow.types
    while types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        kind = kind.value_type
    if types.is_run_end_encoded(kind) or types.is_list_view(kind) or types.is_large_list_view(kind) or types.is_union(kind):
        raise UnchangingError(
            f"{url}: column '{name}' is of type {str(kind)[:80]}; accepted are strings, lists of strings, and structs. Write the column anew with such a "
            "type, or name another one in data.sources as captions."
        )
    for field in kind if types.is_struct(kind) else ():
        _check_captions(url, f"{name}.{field.name}", field.type, inside=True)
    if types.is_struct(kind) and not inside and not usual_captions(field.name for field in kind):
        raise UnchangingError(
            f"{url}: column '{name}' holds structs of {', '.join(field.name for field in kind)}, none of which is known to hold a caption; accepted are "
            "strings, lists of strings, and structs with a field of a usual name (caption, text, raw ...). Name another column in data.sources as captions."
        )


class Rows:
    """The records of one file."""

    def __init__(self, origin: Origin, name: str, columns: Columns, wanted: Callable[[str], bool]) -> None:
        self.origin, self.name, self.columns = origin, name, columns
        self.split = split_of_name(name)
        self.folder = origin.url(name).rpartition("/")[0]
        self._wanted, self._asked = wanted, dict[int, bool]()
        origin.took("column", columns.image, columns.captions)

    def found(self, batches: Iterable[Any], first: int, *, with_image: bool) -> Iterator[Draft | Pair | Unreadable]:
        """The wanted records in batches of rows, of which the first row has the number ``first`` in the file; without images when only groups are needed."""
        self._asked = {number: answer for number, answer in self._asked.items() if number >= first}
        for batch in batches:
            for number, row in enumerate(_rows(self._narrow(batch), self.columns.image), first):
                place = f"{self.name}/@{number}"
                try:
                    record = self._record(place, row, with_image)
                except BadRecord as bad:
                    yield Unreadable(self.origin.id(place), bad.reason, bad.why)
                    continue
                # A row that was looked at without its image is read again: do not call ``wanted`` twice for one record, because it counts records.
                if number not in self._asked:
                    self._asked[number] = self._wanted((record.pair if isinstance(record, Draft) else record).group)
                if self._asked[number]:
                    yield record
            first += batch.num_rows

    def _narrow(self, batch: Any) -> Any:
        """The batch without the fields of its images that are not read, which may be anything."""
        name = self.columns.image
        if not self.columns.is_struct or name not in batch.schema.names:
            return batch
        place, column = batch.schema.get_field_index(name), batch.column(name)
        fields = [field.name for field in column.type if field.name in ("bytes", "path")]
        found = pyarrow.StructArray.from_arrays([column.field(field) for field in fields], fields, mask=column.is_null())
        return batch.set_column(place, name, found)

    def _record(self, place: str, row: Row | str, with_image: bool) -> Draft | Pair:
        if isinstance(row, str):
            raise BadRecord(row)
        value, columns = row.get(self.columns.image), self.columns
        data = value if isinstance(value, bytes) else value.get("bytes") if isinstance(value, dict) else None
        path = value if isinstance(value, str) else value.get("path") if isinstance(value, dict) else None
        data = data or None  # no bytes are no image: the path may lead to one
        if with_image and data is None and not path:
            raise BadRecord(MISSING_IMAGE)
        key = text_in(row, "key")
        place = f"{self.name}/{key}" if key else place
        captions = distinct(self.origin.captions({name: row[name] for name in columns.captions}))
        pair = self.origin.pair(place, row, captions, self.split, f"image/{path}" if path and columns.is_path else "")
        if not with_image:
            return pair
        if data is None:
            return Draft(pair, self.origin.image_url(str(path), self.folder))
        if len(data) > MAX_IMAGE_BYTES:
            raise BadRecord(LARGE_IMAGE)
        return replace(pair, image=data)


def _rows(batch: Any, image: str) -> Iterator[Row | str]:
    """The rows of a batch; of a row that is too large or cannot be converted, the reason."""
    for piece, reason in pieces(batch, image):
        if reason:
            yield reason
        else:
            yield from _converted(piece)


def _converted(batch: Any) -> Iterator[Row | str]:
    """The rows of a batch; of a row that cannot be converted, the reason: strings that are not UTF-8, or a date that no calendar has."""
    try:
        yield from batch.to_pylist()
        return
    except (ValueError, OverflowError):  # UnicodeDecodeError and pyarrow.ArrowInvalid are ValueErrors
        pass  # raised before any row was yielded
    for number in range(batch.num_rows):
        try:
            yield batch.slice(number, 1).to_pylist()[0]
        except UnicodeDecodeError:
            yield BAD_TEXT
        except (ValueError, OverflowError):
            yield BAD_VALUE
