"""Section: who made the images."""

from __future__ import annotations

from train.report.markup import el, join, note
from train.report.view import RunView, Section


def section(run: RunView) -> Section | None:
    """The credit lines that the prepare stage collected from the records' licences."""
    lines = run.summary("prepare").get("credits") or []
    if not lines:
        return Section("credits", "Credits", note("The prepare stage has recorded no credits."))
    words = "The training images, and every picture in this page that shows or derives from them:"
    return Section("credits", "Credits", join(note(words), el("ul", [el("li", str(line)) for line in lines])))
