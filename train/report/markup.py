"""HTML in which escaping cannot be forgotten: elements are built by ``el``, and only ``Html`` (markupsafe's) is inserted without escaping."""

from __future__ import annotations

from collections.abc import Iterable

from markupsafe import Markup as Html
from markupsafe import escape

Child = Html | str | int | float | None | Iterable["Child"]

_VOID = frozenset({"img", "meta", "br", "hr", "wbr"})


def el(tag: str, *children: Child, **attributes: str | int | bool | None) -> Html:
    """An element. Children are escaped unless they are Html; lists are flattened, and None is left out.

    Names of attributes: a trailing underscore is dropped (``class_``), other underscores become hyphens. The value True gives an attribute without a value;
    None and False leave it out.
    """
    words = [tag]
    for name, value in attributes.items():
        name = name.rstrip("_").replace("_", "-")
        if value is True:
            words.append(name)
        elif value is not None and value is not False:
            words.append(f'{name}="{escape(value)}"')
    start = f"<{' '.join(words)}>"
    return Html(start if tag in _VOID else f"{start}{join(*children)}</{tag}>")


def join(*children: Child) -> Html:
    """The concatenation of children, escaped as in ``el``."""
    return Html("".join(_one(child) for child in children))


def table(header: list[str], rows: list[list[Child]], numbers: Iterable[int] = (), class_: str = "") -> Html:
    """A table that scrolls sideways on a narrow screen; the columns in ``numbers`` are aligned to the right."""
    right = set(numbers)

    def cells(tag: str, row: Iterable[Child]) -> list[Child]:
        return [el(tag, cell, class_="n" if column in right else None) for column, cell in enumerate(row)]

    head = el("thead", el("tr", cells("th", header)))
    return el("div", el("table", head, el("tbody", [el("tr", cells("td", row)) for row in rows])), class_=f"scroll {class_}".strip())


def note(*children: Child) -> Html:
    """A paragraph in small grey type, for explanations and for what does not exist yet."""
    return el("p", *children, class_="note")


def number(value: float, digits: int = 0) -> str:
    """A number with thin spaces between thousands: 7 612, 18.42."""
    return f"{value:,.{digits}f}".replace(",", "\u2009")


def _one(child: Child) -> str:
    if child is None:
        return ""
    if isinstance(child, str | int | float):
        return escape(child)
    return "".join(_one(inner) for inner in child)
