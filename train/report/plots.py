"""Plots as SVG, to be embedded in a page. Only this module imports matplotlib.

Text stays text (searchable, in the page's font), colours are those of the page (``currentColor`` and CSS variables, so that they fit a dark page, too), and equal
data give equal bytes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from infra.shown import printable
from train.report.markup import Html

_SVG, _XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}href"
ElementTree.register_namespace("", _SVG[1:-1])
_INCHES = (4.4, 2.6)
_MAX_POINTS = 300
_FAINT_FROM = 40
_LONGEST_LABEL = 80
# Placeholder colours, which are replaced by the page's CSS colours in matplotlib's output.
_INK = "#010203"
_SERIES = ("#010a01", "#010a02", "#010a03", "#010a04")
_STYLE = {
    "font.size": 9.0,
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


@dataclass(frozen=True)
class Line:
    """One series of a plot."""

    label: str
    points: Sequence[tuple[float, float]]
    """(step, value); values that are not finite are left out."""


FEW = 2


def few(series: Sequence[Line]) -> str:
    """A remark for the title of a plot with curves of one or two points, which show no trend."""
    short = [(line.label, len(line.points)) for line in series if len(line.points) <= FEW]
    return "".join(f" – {label}: {count} point{'s' if count > 1 else ''}, no trend" for label, count in short)


def lines(
    key: str,
    title: str,
    series: Sequence[Line],
    *,
    log: bool = False,
    reference: tuple[float, str] | None = None,
    across: str = "updates",
    marks: Sequence[float] = (),
    keep_colours: bool = False,
) -> Html:
    """Curves over updates. A long, noisy curve is drawn faintly, with its running mean on top.

    Args:
        key: prefix that makes the identifiers of this plot unique on its page.
        title: what the vertical axis shows, with its unit; also for screen readers.
        series: up to four curves; those without a finite value are left out.
        log: logarithmic vertical axis, if all values are positive.
        reference: a value and its name, drawn as a dashed line.
        across: what the horizontal axis counts.
        marks: positions on the horizontal axis where something changed, drawn as dotted lines.
        keep_colours: a curve that is left out keeps its colour from the next one: the same colour is the same run in every plot.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _figure()
        finite = [Line(line.label, [(x, y) for x, y in line.points if math.isfinite(y)]) for line in series]
        shown = [line for line in finite if line.points]
        coloured = [pair for pair in zip(finite, _SERIES, strict=False) if pair[0].points] if keep_colours else zip(shown, _SERIES, strict=False)
        for line, colour in coloured:
            _draw(axes, line, colour)
        if log and shown and all(y > 0 for line in shown for _, y in line.points):
            axes.set_yscale("log")
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5))
        if reference:
            axes.axhline(reference[0], color=_INK, linewidth=0.8, linestyle=(0, (4, 3)), alpha=0.7)
            axes.text(1, reference[0], _literal(reference[1]), ha="right", va="bottom", fontsize=8, transform=axes.get_yaxis_transform())
        for mark in marks:
            axes.axvline(mark, color=_INK, linewidth=0.8, linestyle=(0, (1, 2)), alpha=0.8)
        if len(shown) > 1:
            axes.legend(loc="best", handlelength=1.2, fontsize=8)
        axes.set_xlabel(across)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(_short))
        return _svg(figure, key, title)


def ranked(key: str, title: str, counts: Sequence[int]) -> Html:
    """Shares of codes, most frequent first, on a logarithmic axis; the dashed line shows an even use of all codes.

    Args:
        key: as in lines.
        title: as in lines.
        counts: how often each code was used.
    """
    with mpl.rc_context(_STYLE):
        figure, axes = _figure()
        total = sum(counts)
        shares = [100 * count / total for count in sorted(counts, reverse=True) if count]
        floor = min(shares) / 2
        axes.stairs(shares, range(len(shares) + 1), baseline=floor, fill=True, color=_SERIES[0], alpha=0.35, linewidth=0)
        axes.stairs(shares, range(len(shares) + 1), baseline=None, color=_SERIES[0], linewidth=1.2)
        axes.axhline(100 / len(counts), color=_INK, linewidth=0.8, linestyle=(0, (4, 3)), alpha=0.7)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
        axes.set_xlim(0, len(counts))
        axes.set_ylim(floor, None)
        axes.set_xlabel("codes, most frequent first")
        return _svg(figure, key, title)


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=_INCHES, layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.grid(axis="y", color=_INK, alpha=0.12, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _draw(axes: Axes, line: Line, colour: str) -> None:
    xs, ys = zip(*thin(line.points, _MAX_POINTS), strict=True)
    if len(xs) < _FAINT_FROM:
        axes.plot(xs, ys, color=colour, linewidth=1.4, marker="o", markersize=2.6, label=_literal(line.label))
        return
    axes.plot(xs, ys, color=colour, linewidth=0.7, alpha=0.3)
    axes.plot(xs, running_mean(ys), color=colour, linewidth=1.5, label=_literal(line.label))


def _literal(label: str) -> str:
    """A label as matplotlib shows it unchanged: it would set what stands between dollars as a formula, leave out labels that begin with an underscore, and write
    control characters, which no XML may hold."""
    plain = printable(label, _LONGEST_LABEL).replace("$", r"\$")
    return f"\u200a{plain}" if plain.startswith("_") else plain


def thin(points: Sequence[tuple[float, float]], most: int) -> list[tuple[float, float]]:
    """At most ``most`` points, which are means of equally many neighbours, so that a single spike does not dominate the curve."""
    run = math.ceil(len(points) / most)
    groups = [points[i : i + run] for i in range(0, len(points), run)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def running_mean(values: Sequence[float]) -> list[float]:
    """Centred means over about a twentieth of the curve, and over fewer values near its ends, so that the first and the last value do not change."""
    half = max(1, len(values) // 40)
    means = []
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)
        window = values[i - reach : i + reach + 1]
        means.append(sum(window) / len(window))
    return means


def _short(value: float, _: int | None = None) -> str:
    return f"{value / 1e6:g}M" if abs(value) >= 1e6 else f"{value / 1e3:g}k" if abs(value) >= 1e3 else f"{value:g}"


def _svg(figure: Figure, key: str, title: str) -> Html:
    """The figure as an SVG element for a page with several plots: without a style of its own, and with identifiers that begin with ``key``."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            # matplotlib's style would apply to the whole page; style.css has the same rules for plots only.
            if child.tag in (f"{_SVG}metadata", f"{_SVG}style"):
                parent.remove(child)
    for element in root.iter():
        element.attrib.update({name: _of_page(name, value, key) for name, value in element.attrib.items()})
        if _XLINK in element.attrib:
            element.attrib["href"] = element.attrib.pop(_XLINK)
        element.text, element.tail = (text if text and text.strip() else None for text in (element.text, element.tail))
    view = root.attrib["viewBox"]
    root.attrib.clear()
    root.attrib.update({"viewBox": view, "role": "img", "aria-label": title})
    return Html(ElementTree.tostring(root, encoding="unicode"))


def _of_page(name: str, value: str, key: str) -> str:
    """An attribute of the figure, adapted to the page: unique identifiers, the page's font and colours, and paths rounded to a hundredth of a point."""
    if name == "id":
        return f"{key}-{value}"
    if name == _XLINK:
        return value.replace("#", f"#{key}-", 1)
    if name == "d":
        return " ".join(word if word.isalpha() else f"{float(word):.2f}".rstrip("0").rstrip(".") for word in value.split())
    if name == "style":
        value = "; ".join(words for words in value.split("; ") if not words.startswith("font-family"))
    value = value.replace("url(#", f"url(#{key}-").replace(_INK, "currentColor")
    for index, colour in enumerate(_SERIES):
        value = value.replace(colour, f"var(--s{index})")
    return value
