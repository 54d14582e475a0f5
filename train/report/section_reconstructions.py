"""Section: originals and their reconstructions by the dVAE."""

from __future__ import annotations

from train.report.images import GridPng, data_uri, png_bytes, read_grid
from train.report.markup import Html, el, join, note
from train.report.view import RunView, Section

_MOST = 16


def section(run: RunView) -> Section | None:
    """Originals above their reconstructions, cut out of the grid that the dvae stage wrote; if that has no layout, the grid itself."""
    title = "Originals and reconstructions"
    data = run.picture("dvae/pictures/reconstructions.png")
    if data is None:
        return Section("reconstructions", title, note("The dvae stage has not drawn reconstructions yet."))
    dvae = run.section("dvae")
    words = "Validation images, and what is left of them after they have been turned into codes and back."
    if {"image_size", "downsample", "vocab"} <= dvae.keys():
        side = dvae["image_size"] // dvae["downsample"]
        words = (
            f"Validation images of {dvae['image_size']} × {dvae['image_size']} pixels, and what is left of them after {side} × {side} codes "
            f"out of {dvae['vocab']}: all that the transformer will ever see."
        )
    found = read_grid(data)
    body = (
        _pairs(found)
        if found
        else el("div", el("img", src=data_uri(data), alt="a row of originals above rows of reconstructions"), class_="scroll strip")
    )
    return Section("reconstructions", title, join(note(words), body))


def _pairs(found: GridPng) -> Html:
    names = found.labels or [f"row {i + 1}" for i in range(len(found.rows))]
    columns = list(zip(*found.rows, strict=False))[:_MOST]
    figures = []
    for number, pictures in enumerate(columns):
        images = [
            el("img", src=data_uri(png_bytes(picture)), alt=f"{name} {number + 1}", title=name) for name, picture in zip(names, pictures, strict=True)
        ]
        figures.append(el("figure", images, class_="stack"))
    legend = note("From top to bottom: ", ", ".join(found.labels), ".") if found.labels else None
    return join(el("div", figures, class_="stacks"), legend)
