"""Draws Figure 11 for docs/masks.md from the rules that the model uses. Needs no torch."""

from __future__ import annotations

from model.offsets import Kind, MaskRules, is_allowed, transposed

TEXT, GRID, KERNEL = 6, 4, 3
RULES = MaskRules(GRID, KERNEL)
"""The sizes of the paper's Figure 11: 6 text positions, a 4 x 4 picture, a 3 x 3 kernel."""
_CELL, _GAP, _TOP = 9, 34, 24
_PANELS: tuple[tuple[str, Kind, bool], ...] = (
    ("(a) row", "row", False),
    ("(b) column", "column", False),
    ("(c) column, transposed", "column", True),
    ("(d) convolution 3 x 3", "conv", False),
)
"""Title, kind, and whether the picture is read column by column."""
_COLOURS = {"text": "#9db8d9", "image": "#2f6db3", "none": "#f1f1f1"}


def may_see(kind: Kind, query: int, key: int, *, column_by_column: bool) -> str:
    """What a cell of the figure shows: 'text' or 'image' if the query may attend to the key, by what the key is; otherwise 'none'."""
    if key < TEXT:
        return "text" if query >= key else "none"
    if query < TEXT:
        return "none"
    places = [state - TEXT for state in (query, key)]
    if column_by_column:
        places = [transposed(place, GRID) for place in places]
    return "image" if is_allowed(kind, places[0] - places[1], RULES) else "none"


def svg() -> str:
    """The four panels of Figure 11 as an SVG document. Rows are queries, columns are keys."""
    states = TEXT + GRID**2
    side = states * _CELL
    width, height = len(_PANELS) * (side + _GAP) + _GAP, side + _TOP + _GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for number, (title, kind, column_by_column) in enumerate(_PANELS):
        left = _GAP + number * (side + _GAP)
        parts.append(f'<text x="{left}" y="16">{title}</text>')
        for query in range(states):
            for key in range(states):
                colour = _COLOURS[may_see(kind, query, key, column_by_column=column_by_column)]
                parts.append(f'<rect x="{left + key * _CELL}" y="{_TOP + query * _CELL}" width="{_CELL - 1}" height="{_CELL - 1}" fill="{colour}"/>')
    return "\n".join([*parts, "</svg>"]) + "\n"
