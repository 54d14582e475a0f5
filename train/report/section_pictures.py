"""Section: drawn pictures. For each caption the real picture, and several drawn ones, best first, each above its nearest training image."""

from __future__ import annotations

from typing import Any

from train.report.images import data_uri
from train.report.judgement import draws_emoji
from train.report.markup import Child, Html, el, join, note, table
from train.report.view import RunView, Section

_MOST = 8
"""Columns of a strip."""
_ENOUGH = 3
"""Number of checkpoints from which one can see how something was learned."""


def section(run: RunView) -> Section | None:
    """The pictures of the generate stage."""
    index = run.generated
    captions = index.get("captions") or []
    if not captions:
        return Section("pictures", "Drawn pictures", join(note("The generate stage has not finished, so nothing is ranked yet."), _samples(run)))
    shown = int(run.section("generate").get("show") or 4)
    candidates = index.get("candidates") or run.section("generate").get("candidates")
    of = f" of {candidates}" if candidates else ""
    words = [
        f"The best {shown}{of} pictures for each caption by this run's own CLIP, best first (#1); its scores are similarities between -1 and 1, no ",
        "probabilities, and order the pictures of one caption only. Below each stands the training image nearest to it, ",
        "so that copying would be seen: a distance of 0 is a copy. ",
        f"Framed on the left: the real {'drawing' if draws_emoji(run) else 'picture'}, held out from training or a training image, as it says."
        if any(caption.get("truth") for caption in captions)
        else None,
    ]
    facts = [
        f"Temperature {index['temperature']:g}." if isinstance(index.get("temperature"), int | float) else None,
        f" Weights {str(index['checkpoint'])[:12]}." if index.get("checkpoint") else None,
    ]
    cards = el("div", [_card(run, caption, shown) for caption in captions], class_="captions")
    return Section("pictures", "Drawn pictures", join(note(words), cards, note(facts), _learned(run, index.get("learned") or []), _samples(run)))


def _learned(run: RunView, entries: list[dict[str, Any]]) -> Html | None:
    """Pictures of the same captions by every kept checkpoint."""
    if not entries:
        return None
    words = "One picture of each caption by the averaged weights of each checkpoint that is kept, always from the same seed."
    few = " dalle_fit.keep_every keeps more." if len(entries) < _ENOUGH else ""
    return join(el("h3", "What was learned when"), note(words, few), strip(run, entries))


def _samples(run: RunView) -> Html | None:
    """The same of the checkpoints that were drawn while training went on, which mostly are not kept. Of captions that were changed meanwhile, the newest."""
    if not run.samples:
        return None
    captions = [picture["caption"] for picture in run.samples[-1]["pictures"]]
    alike = [entry for entry in run.samples if [picture["caption"] for picture in entry["pictures"]] == captions]
    shown = [alike[round(place * (len(alike) - 1) / max(1, min(len(alike), _MOST) - 1))] for place in range(min(len(alike), _MOST))]
    of = f", {len(shown)} of {len(alike)} times" if len(shown) < len(alike) else ""
    words = f"Drawn while it trained{of}: one picture of each caption, always from the same seed, by the averaged weights of the newest checkpoint."
    return join(el("h3", "While it trained"), note(words), strip(run, shown))


def strip(run: RunView, entries: list[dict[str, Any]]) -> Html:
    """Pictures of the same captions: a row for each caption, a column for each checkpoint."""
    rows: list[list[Child]] = []
    for number, caption in enumerate([picture["caption"] for picture in entries[0]["pictures"]]):
        drawn = [entry["pictures"][number : number + 1] for entry in entries]
        cells = [
            image(run, some[0]["file"], f"{entry['step']} updates: {caption}") if some else None for some, entry in zip(drawn, entries, strict=True)
        ]
        rows.append([caption, *cells])
    return table(["", *(f"{entry['step']:,} updates" for entry in entries)], rows, class_="learned")


def _card(run: RunView, caption: dict[str, Any], shown: int) -> Html:
    text = str(caption.get("caption", ""))
    pictures = sorted(caption.get("pictures") or [], key=lambda picture: -float(picture.get("score") or 0))[:shown]
    columns = [_pair(run, picture, text, place) for place, picture in enumerate(pictures, 1)]
    if caption.get("truth"):
        kind = "trained on" if caption.get("split") == "train" else "held out"
        real = el("figure", image(run, caption["truth"], f"{kind}: {text}"), el("figcaption", kind), class_="truth")
        columns.insert(0, el("div", real, class_="pair"))
    return el("article", el("h3", text), el("div", columns, class_="pairs"), class_="card")


def _pair(run: RunView, picture: dict[str, Any], caption: str, place: int) -> Html:
    score, seed = picture.get("score"), picture.get("seed")
    words = "" if score is None else f"#{place}"
    similarity = "" if score is None else f"similarity to the caption by this run's CLIP: {float(score):.2f}"
    drawn = el(
        "figure",
        image(run, picture.get("file"), f"drawn for: {caption}"),
        el("figcaption", words, title="; ".join(filter(None, (similarity, "" if seed is None else f"seed {seed}")))),
    )
    nearest = picture.get("nearest") or {}
    if not nearest.get("file"):
        return el("div", drawn, class_="pair")
    distance = nearest.get("distance")
    below = el(
        "figure",
        image(run, nearest["file"], f"nearest training image: {nearest.get('id', '')}"),
        el("figcaption", "" if distance is None else f"Δ {float(distance):.3g}", title=str(nearest.get("id", ""))),
        class_="nearest",
    )
    return el("div", drawn, below, class_="pair")


def image(run: RunView, name: str | None, alt: str) -> Html:
    """A picture of the run folder, or a word in its place."""
    data = run.picture(name)
    if data is None:
        return el("span", "missing", class_="blank", title=str(name))
    return el("img", src=data_uri(data), alt=alt, title=alt)  # a browser that loads it later prints and saves blanks
