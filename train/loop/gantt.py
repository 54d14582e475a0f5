"""A page that shows what each rank did in some updates, part by part: one file of HTML and SVG, which opens offline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

COLOURS = {"data": "#4e79a7", "forward": "#59a14f", "backward": "#f28e2b", "reduce": "#e15759", "step": "#b07aa1", "save": "#9c755f"}
_WIDTH, _ROW, _LEFT = 1100, 22, 90
_MORE = 0.5  # px below which a part is drawn no thinner

Part = tuple[str, float, float]
"""Name, begin and end in seconds since the ranks' common moment."""


def page(stage: str, updates: Mapping[int, Sequence[Sequence[Part]]]) -> str:
    """The whole page.

    Args:
        updates: update -> the parts of each rank.
    """
    legend = " ".join(f'<span style="background:{colour}">{escape(name)}</span>' for name, colour in COLOURS.items())
    body = "\n".join(_update(update, ranks) for update, ranks in sorted(updates.items()))
    style = (
        "body{font:14px sans-serif;margin:2em}span{color:#fff;padding:2px 8px}table{border-collapse:collapse}td,th{padding:1px 10px;text-align:right}"
    )
    head = f'<meta charset="utf-8"><title>{escape(stage)}: phases of updates</title><style>{style}</style>'
    words = (
        "A row for each rank, from the beginning of its update; clocks are set by the end of the step's message, which comes to all at once. 'reduce' is the "
        "wait for others, of those who have nothing more to do: the rank with the shortest one keeps the others waiting."
    )
    return f"<!doctype html><html><head>{head}</head><body><h1>{escape(stage)}: phases of updates</h1><p>{words}</p><p>{legend}</p>\n{body}\n</body></html>\n"


def _update(update: int, ranks: Sequence[Sequence[Part]]) -> str:
    begin = min((part[1] for parts in ranks for part in parts), default=0.0)
    end = max((part[2] for parts in ranks for part in parts), default=1.0)
    scale = (_WIDTH - _LEFT) / max(end - begin, 1e-9)
    rows = "".join(_rank(number, parts, begin, scale) for number, parts in enumerate(ranks))
    svg = f'<svg width="{_WIDTH}" height="{_ROW * len(ranks)}" xmlns="http://www.w3.org/2000/svg">{rows}</svg>'
    return f"<h2>Update {update}: {1000 * (end - begin):.1f} ms</h2>\n{svg}\n{_table(ranks)}"


def _rank(number: int, parts: Sequence[Part], begin: float, scale: float) -> str:
    y = _ROW * number
    boxes = [f'<text x="0" y="{y + 15}">rank {number}</text>']
    for name, start, end in parts:
        x, width = _LEFT + (start - begin) * scale, max(_MORE, (end - start) * scale)
        title = f"<title>{escape(name)}: {1000 * (end - start):.2f} ms</title>"
        boxes.append(f'<rect x="{x:.2f}" y="{y + 2}" width="{width:.2f}" height="{_ROW - 4}" fill="{COLOURS.get(name, "#888")}">{title}</rect>')
    return "".join(boxes)


def _table(ranks: Sequence[Sequence[Part]]) -> str:
    head = "".join(f"<th>{escape(name)}, ms</th>" for name in COLOURS)
    rows = "".join(
        f"<tr><td>rank {number}</td>" + "".join(f"<td>{1000 * seconds:.2f}</td>" for seconds in sums(parts).values()) + "</tr>"
        for number, parts in enumerate(ranks)
    )
    return f"<table><tr><th></th>{head}</tr>{rows}</table>"


def sums(parts: Sequence[Part]) -> dict[str, float]:
    """Seconds of each kind of part."""
    return {name: sum((end - begin for each, begin, end in parts if each == name), 0.0) for name in COLOURS}


def read(stored: Any) -> dict[int, list[list[Part]]]:
    """What ``phases.json`` holds."""
    return {int(update): [[(str(n), float(a), float(b)) for n, a, b in parts] for parts in ranks] for update, ranks in stored.items()}
