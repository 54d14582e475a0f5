"""A page that compares runs: one HTML file, like the report of one run, with a module ``compare_<section>.py`` for each section."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module

from train.report import page
from train.report.markup import Child, el, join
from train.report.view import RunView, Section

SECTIONS = ("results", "curves", "pictures", "configuration")
MOST = 4
"""Runs on a page: each has a colour of its own."""
Runs = Mapping[str, RunView]
"""Name on the page -> run, in the order of their colours."""


def render(runs: Runs) -> str:
    """The HTML page. A section whose inputs are damaged shows the error in its place."""
    sections = [section for name in SECTIONS if (section := page.section_or_error("comparison", name, partial(_made, runs, name)))]
    marks = [el("span", _swatch(number), name, class_="facts") for number, name in enumerate(runs)]
    title = " and ".join(runs)
    header = el("header", el("p", "Text to image, runs side by side", class_="kicker"), el("h1", title), el("p", join(*marks), class_="facts legend"))
    return page.document(f"{title} – comparison", header, sections)


def _swatch(number: int) -> Child:
    return el("span", class_="swatch", style=f"background:var(--s{number})")


def _made(runs: Runs, name: str) -> Section | None:
    make: Callable[[Runs], Section | None] = import_module(f"train.report.compare_{name}").section
    return make(runs)
