"""Reads a pickle as a tree, without executing anything.

Unpickling imports and calls whatever the file names. This reader represents names and calls as nodes of a tree instead, so that a file is only data.
Names that are not on the caller's list are refused as soon as they are read.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import IO, Any

from infra import shown
from infra.errors import DataError


@dataclass(frozen=True)
class Name:
    """A name that unpickling would import."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Call:
    """An object that unpickling would create: the function that it would call, with which arguments, and the state that it would then set."""

    function: Name
    arguments: Any
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)
    """Entries that the pickle adds to it, if it is a dictionary."""


_KEYS = (str, bytes, int, float, type(None), Name, Call)
"""What keys of dictionaries may be. A pickle of a few bytes can hold a tuple that holds another one twice, and so on: its hash and its repr take for ever."""


def described(value: Any) -> str:
    """A value in a message: of anything that may hold others, its kind alone (see ``_KEYS``)."""
    plain = isinstance(value, str | bytes | int | float | None)
    return shown.value(value, 80) if plain else str(value) if isinstance(value, Name) else f"a {type(value).__name__}"


def _quoted(value: Any) -> str:
    return f"'{value}'" if isinstance(value, Name) else described(value)


_MARK = object()
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "MARK": lambda: _MARK,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_TUPLE": tuple,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": list,
}
_ARGUMENTS = (
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "BINFLOAT",
    "BINUNICODE",
    "SHORT_BINUNICODE",
    "BINUNICODE8",
    "BINBYTES",
    "SHORT_BINBYTES",
    "BINBYTES8",
)
_IGNORED = ("PROTO", "FRAME")


def read_tree(file: IO[bytes], allowed: Collection[str], persistent: Callable[[Any], Any], where: str) -> Any:
    """Read the pickle at the file's position, and leave the position behind its end.

    Args:
        file: opened for reading.
        allowed: names that may occur in the pickle, as ``module.name``.
        persistent: returns the value for a persistent identifier.
        where: the file's name, for messages.

    Returns:
        Plain values, lists, tuples, dictionaries, ``Name`` and ``Call``. Sets become lists.

    Raises:
        DataError: the file is not a pickle, or contains a name that is not allowed or an operation that files of weights do not need.
    """
    machine = _Machine(allowed, persistent, where)
    try:
        for operation, argument, _ in pickletools.genops(file):
            if operation.name != "STOP":
                machine.step(operation.name, argument)
        return machine.stack.pop()
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise DataError(f"{where}: damaged, or not a pickle ({type(error).__name__}: {error}).") from error


class _Machine:
    def __init__(self, allowed: Collection[str], persistent: Callable[[Any], Any], where: str) -> None:
        self.allowed, self.persistent, self.where = allowed, persistent, where
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Interpret one operation."""
        if name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name in _ARGUMENTS:
            self.stack.append(argument)
        elif name not in _IGNORED:
            method = getattr(self, f"_{name.lower()}", None)
            if method is None:
                raise DataError(f"{self.where}: the pickle operation {name} has no place in a file of weights; it was not loaded.")
            method(argument)

    def _name(self, module: str, name: str) -> None:
        found = Name(module, name)
        if str(found) not in self.allowed:
            raise DataError(
                f"{self.where}: names '{found}', which has no place in a file of weights; nothing of it was executed. "
                f"Take the file from its publisher again."
            )
        self.stack.append(found)

    def _global(self, argument: str) -> None:
        self._name(*argument.split(" ", 1))

    def _stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError(f"{described(module)} and {described(name)} where a name belongs")
        self._name(module, name)

    def _reduce(self, _: Any) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Name):
            raise ValueError(f"a call of {described(function)}")
        self.stack.append(Call(function, arguments))

    _newobj = _reduce

    def _build(self, _: Any) -> None:
        state = self.stack.pop()
        if not isinstance(self.stack[-1], Call):
            raise DataError(f"{self.where}: sets attributes of {_quoted(self.stack[-1])}, which is no object of its own; it was not loaded.")
        self.stack[-1].state = state

    def _put(self, argument: int) -> None:
        self.memo[argument] = self.stack[-1]

    _binput = _long_binput = _put

    def _memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _binget(self, argument: int) -> None:
        self.stack.append(self.memo[argument])

    _long_binget = _binget

    def _binpersid(self, _: Any) -> None:
        self.stack.append(self.persistent(self.stack.pop()))

    def _since_mark(self) -> list[Any]:
        start = len(self.stack) - 1
        while self.stack[start] is not _MARK:
            start -= 1
            if start < 0:
                raise ValueError("no mark")
        found = self.stack[start + 1 :]
        del self.stack[start:]
        return found

    def _tuple(self, _: Any) -> None:
        self.stack.append(tuple(self._since_mark()))

    def _tuple1(self, _: Any) -> None:
        self._last(1)

    def _tuple2(self, _: Any) -> None:
        self._last(2)

    def _tuple3(self, _: Any) -> None:
        self._last(3)

    def _last(self, count: int) -> None:
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def _append(self, _: Any) -> None:
        value = self.stack.pop()
        self.stack[-1].append(value)

    def _appends(self, _: Any) -> None:
        values = self._since_mark()
        self.stack[-1].extend(values)

    _additems = _appends

    def _setitem(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._pairs([key, value])

    def _setitems(self, _: Any) -> None:
        self._pairs(self._since_mark())

    def _pairs(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if odd := next((key for key in values[::2] if not isinstance(key, _KEYS)), None):
            raise ValueError(f"{described(odd)} as the key of a dictionary")
        pairs = target.items if isinstance(target, Call) else target
        pairs.update(zip(values[::2], values[1::2], strict=True))
