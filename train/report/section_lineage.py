"""Section: what was made from what, as a graph of the run's stages and the content hashes that they recorded."""

from __future__ import annotations

from collections.abc import Mapping

from train.report.markup import Child, Html, el, join, note
from train.report.view import RunView, Section
from train.run.stage_table import STAGES, Stage

MAKERS = {"images": "prepare", "codes": "encode"}
"""Kind of an input -> the stage that makes it; where it is not named here, the stage has its name."""
_WIDTH, _HEIGHT, _ACROSS, _DOWN = 148, 46, 62, 22
_SHORT = 10
_LEFT_OUT = "report"


def section(run: RunView) -> Section | None:
    """Boxes of stages, each with the beginning of the hash of what it made; arrows to those that used it. Dashed: made from something older than is there now."""
    done = [stage for stage in STAGES if stage != _LEFT_OUT and run.done(stage)]
    if not done:
        return Section("lineage", "Lineage", note("No stage has finished yet."))
    edges = recorded(run)
    words = "Arrows lead from what a stage made to what was made from it, as its marker says. Below each name: the beginning of the content hash."
    old = [note(f"Dashed: {stage} was {why}.") for stage, why in run.out_of_date.items()]
    return Section("lineage", "Lineage", join(note(words), el("div", _graph(run, edges), class_="lineage scroll"), old))


def recorded(run: RunView) -> list[tuple[str, str, str]]:
    """(maker, user, hash) for each input that a finished stage names."""
    found = []
    for stage in STAGES:
        parents = run.done(stage).get("parents")
        for kind, value in parents.items() if isinstance(parents, dict) else ():
            maker = MAKERS.get(kind, kind)
            if maker == "dalle" and value == run.done("align").get("weights"):
                maker = "align"  # "dalle" is the transformer, whichever stage made it
            if maker in STAGES and maker != stage and stage != _LEFT_OUT:
                found.append((maker, stage, str(value)))
    return found


def _graph(run: RunView, edges: list[tuple[str, str, str]]) -> Html:
    places = _places(run)
    width = max(x for x, _ in places.values()) + _WIDTH + 2
    height = max(y for _, y in places.values()) + _HEIGHT + 2
    made = {maker: value for maker, _, value in edges}
    arrows = [_arrow(places[maker], places[user], f"{maker} to {user}: {value[:_SHORT]}") for maker, user, value in edges]
    boxes = [_box(run, stage, *place, made.get(stage, "")) for stage, place in places.items()]
    return el("svg", arrows, boxes, viewBox=f"0 0 {width} {height}", width=width, role="img", aria_label="lineage of the run's stages")


def _depth(stage: str, table: Mapping[str, Stage]) -> int:
    return max((_depth(needed, table) + 1 for needed in table[stage].needs), default=0)


def _places(run: RunView) -> dict[str, tuple[int, int]]:
    """Left upper corner of each stage's box: a column for each depth of needs."""
    found: dict[str, tuple[int, int]] = {}
    columns = {stage: _depth(stage, run.stages) for stage in run.stages if stage != _LEFT_OUT}
    for stage, column in columns.items():
        row = sum(columns[other] == column for other in found)
        found[stage] = (1 + column * (_WIDTH + _ACROSS), 1 + row * (_HEIGHT + _DOWN))
    return found


def _arrow(begin: tuple[int, int], end: tuple[int, int], title: str) -> Html:
    x, y, x2, y2 = begin[0] + _WIDTH, begin[1] + _HEIGHT // 2, end[0] - 5, end[1] + _HEIGHT // 2
    bend = max(30, (x2 - x) // 2)
    path = f"M{x} {y}C{x + bend} {y} {x2 - bend} {y2} {x2} {y2}"
    head = f"M{x2 + 5} {y2}l-7 -4v8z"
    return el("g", el("title", title), el("path", d=path, class_="line"), el("path", d=head, class_="head"), class_="arrow")


def _box(run: RunView, stage: str, x: int, y: int, digest: str) -> Html:
    state = "open" if not run.done(stage) else "old" if stage in run.out_of_date else "done"
    below: Child = digest[:_SHORT] if digest else ("not finished" if state == "open" else "finished")
    frame = el("rect", x=x, y=y, width=_WIDTH, height=_HEIGHT, rx=9)
    name = el("text", stage, x=x + 12, y=y + 20, class_="name")
    return el("g", el("title", STAGES[stage].title), frame, name, el("text", below, x=x + 12, y=y + 37), class_=f"box {state}")
