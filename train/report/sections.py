"""The sections of the report, in their order on the page. To add one: a module ``section_<name>.py``, and a line here."""

from collections.abc import Callable
from importlib import import_module

from train.report.view import RunView, Section

SECTIONS = (
    "summary",
    "pictures",
    "drawings",
    "reconstructions",
    "codebook",
    "curves",
    "data",
    "timings",
    "cost",
    "lineage",
    "reproduce",
    "credits",
)


def make(name: str) -> Callable[[RunView], Section | None]:
    """The function that makes a section for a run."""
    function: Callable[[RunView], Section | None] = import_module(f"train.report.section_{name}").section
    return function
