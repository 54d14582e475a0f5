"""Comparison: what the runs drew for the same captions, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from infra.text import counted
from train.report.markup import Html, el, join, note
from train.report.section_pictures import image
from train.report.view import RunView, Section

_SHOWN = 3
_MOST = 24


def section(runs: Mapping[str, RunView]) -> Section | None:
    """A card for each caption that at least two runs have drawn: the best pictures of each, or the newest of those that were drawn while it trained."""
    drawn = {name: _by_caption(run) for name, run in runs.items()}
    captions = list(dict.fromkeys(caption for found in drawn.values() for caption in found))
    common = [caption for caption in captions if sum(caption in found for found in drawn.values()) > 1]
    if not common:
        return Section(
            "pictures", "Pictures", note("No caption was drawn by two of these runs. generate.captions, or samples.captions, gives them equal ones.")
        )
    cards = [_card(runs, drawn, caption) for caption in common[:_MOST]]
    left = f" {counted(len(common) - _MOST, 'more caption')} not shown." if len(common) > _MOST else ""
    words = f"Captions that at least two of the runs drew: the best {_SHOWN} of each by its own CLIP, or else the newest drawn while it trained (*).{left}"
    return Section("pictures", "Pictures", join(note(words), el("div", cards, class_="captions")))


def _by_caption(run: RunView) -> dict[str, tuple[list[dict[str, Any]], str]]:
    """Caption -> pictures, best first, and a mark."""
    found: dict[str, tuple[list[dict[str, Any]], str]] = {}
    for entry in run.samples:
        found |= {picture["caption"]: ([picture], f"* {entry['step']:,} updates") for picture in entry["pictures"]}
    for caption in run.generated.get("captions") or []:
        pictures = sorted(caption.get("pictures") or [], key=lambda picture: -float(picture.get("score") or 0))
        found[str(caption.get("caption", ""))] = (pictures[:_SHOWN], "")
    return found


def _card(runs: Mapping[str, RunView], drawn: Mapping[str, dict[str, tuple[list[dict[str, Any]], str]]], caption: str) -> Html:
    columns = []
    for name, run in runs.items():
        pictures, mark = drawn[name].get(caption, ([], "not drawn"))
        shown = [image(run, picture.get("file"), f"{name}: {caption}") for picture in pictures]
        columns.append(el("div", el("h4", f"{name} {mark}".strip()), el("div", shown, class_="row")))
    return el("article", el("h3", caption), el("div", columns, class_="beside"), class_="card")
