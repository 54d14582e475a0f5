"""The report: one HTML file with everything in it and without scripts, readable offline, on a phone, in light and dark mode."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from infra import storage
from infra.errors import DataError
from train.report.markup import Html, el, join, note
from train.report.sections import SECTIONS, make
from train.report.view import RunView, Section
from train.run.stage_table import STAGES

_STYLE = Path(__file__).with_name("style.css")
_log = logging.getLogger(__name__)
_DAMAGE = (DataError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, SyntaxError, RecursionError)
"""What reading a damaged file raises; numbers that are too large for a plot are ArithmeticErrors, and what no XML may hold is a SyntaxError."""


def render(run: RunView) -> str:
    """The HTML page of a run folder, finished or not.

    A section whose inputs are missing says so. A section whose inputs are damaged shows the error in its place; the others are not affected.
    """
    sections = [section for name in SECTIONS if (section := section_or_error("report", name, partial(_made, run, name)))]
    return document(f"{run_name(run)} – report", _header(run), sections)


def document(title: str, header: Html, sections: list[Section]) -> str:
    """The HTML file of some sections below a header, with everything in it."""
    links = el("nav", [el("a", section.title, href=f"#{section.key}") for section in sections], aria_label="sections")
    parts = [el("section", el("h2", section.title), section.body, id=section.key) for section in sections]
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", title),
        el("style", Html(_STYLE.read_text(encoding="utf-8"))),
    )
    page = el("html", head, el("body", header, links, el("main", parts)), lang="en")
    return f"<!doctype html>\n{page}\n"  # not with '+', because Html would escape the doctype


def run_name(run: RunView) -> str:
    """Name of the run; that of its folder if the configuration cannot be read."""
    try:
        return run.name
    except DataError:
        return run.url.rstrip("/").rsplit("/", 1)[-1]


def _made(run: RunView, name: str) -> Section | None:
    return make(name)(run)


def section_or_error(page: str, name: str, make_it: Callable[[], Section | None]) -> Section | None:
    """A section of a page; where its inputs are damaged, the error in its place."""
    try:
        return make_it()
    except _DAMAGE as error:
        _log.warning("%s: section '%s' cannot be shown: %s", page, name, error)
        return Section(name, name.capitalize(), el("p", f"This section cannot be shown: {error}", class_="error"))


def _header(run: RunView) -> Html:
    try:
        facts = _facts(run)
    except _DAMAGE as error:
        facts = note(str(error))
    return el("header", el("p", "Text to image, from data to pictures", class_="kicker"), el("h1", run_name(run)), facts)


def _facts(run: RunView) -> Html:
    done = [stage for stage in STAGES if run.done(stage)]
    words = []
    when = run.provenance.get("created")
    if isinstance(when, int | float):
        words.append(time.strftime("%-d %B %Y", time.gmtime(when)))
    commit = str(run.provenance.get("commit", ""))
    if commit:
        words.append(f"commit {commit.removesuffix('+dirty')[:10]}{' with changes' if commit.endswith('+dirty') else ''}")
    processes = {int(run.done(stage)["world_size"]) for stage in done if run.done(stage).get("world_size")}
    if processes:
        words.append(f"{max(processes)} process{'es' if max(processes) > 1 else ''}")
    pending = [stage for stage in run.stages if stage not in done and stage != "report"]
    state = "all stages finished" if not pending else f"still to come: {', '.join(pending)}"
    return join(el("p", " · ".join([*words, state]), class_="facts"))


def build(run_url: str) -> str:
    """Write ``report.html`` into a run folder, finished or not; see ``render``.

    Args:
        run_url: the run folder, local or s3://.

    Returns:
        URL of the page.
    """
    url = storage.join(run_url, "report.html")
    storage.write_bytes(url, render(RunView(run_url)).encode())
    return url
