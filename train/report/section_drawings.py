"""Section: what was measured of drawn validation captions (evaluate.drawings): distances and retrieval against the number of candidates, copies, colours."""

from __future__ import annotations

from typing import Any

from train.report.markup import Child, Html, el, join, note, table
from train.report.plots import Line, lines
from train.report.view import RunView, Section

_TITLE = "Drawings, measured"
_DISTANCES = (
    ("frechet", "Fréchet distance"),
    ("frechet_unbiased", "Fréchet distance, extrapolated to infinitely many"),
    ("mmd2", "squared MMD, unbiased"),
    ("sliced_wasserstein", "sliced Wasserstein distance"),
)
_OWN = "own clip"


def section(run: RunView) -> Section | None:
    """Plots and tables."""
    found = run.json("evaluate", "drawings.json")
    if not found:
        asked = run.section("evaluate").get("drawings")
        why = "the evaluate stage has not finished." if asked else "evaluate.drawings says of how many captions (docs/evaluation.md)."
        missing = f"Not measured yet: {why}"
        return Section("drawings", _TITLE, note(missing))
    most = found["best_of"][-1]
    words = [
        f"{found['drawings']} validation captions, each of another concept, and up to {most} drawings of each. The best of N is chosen by this run's own CLIP, ",
        "which therefore judges N = 1 only: what ranks never judges. No distance here is an FID unless the network is Inception. A distance between two halves ",
        "of the real pictures is what a perfect model would get with half as many.",
    ]
    body = [note(*words), *_distances(found), *_classes(found), *_retrieval(found), _colours(found), _nearest(found)]
    return Section("drawings", _TITLE, join(*body))


def _distances(found: dict[str, Any]) -> list[Html]:
    out = []
    for number, (name, judged) in enumerate(found["distances"].items()):
        by_n, real = judged["by_n"], judged.get("halves_of_real", {})
        if len(by_n) > 1:
            line = Line(name, [(float(count), values["mmd2"]) for count, values in by_n.items()])
            reference = (real["mmd2"], "halves of the real ones") if "mmd2" in real else None
            title = f"squared MMD by {name}"
            out.append(el("figure", lines(f"drawings-mmd-{number}", title, [line], reference=reference, across="best of N"), el("figcaption", title)))
        columns = [(f"N = {count}", values) for count, values in by_n.items()]
        columns += [
            (f"N = {judged['by_blur']['best_of']}, blur {radius}", values)
            for radius, values in judged.get("by_blur", {}).items()
            if radius != "best_of"
        ]
        columns += [("halves of the real ones", real)] if real else []
        rows: list[list[Child]] = [[label, *(_number(values.get(key)) for _, values in columns)] for key, label in _DISTANCES]
        out.append(join(el("h3", f"Distance to the real pictures by {name}"), table(["", *(label for label, _ in columns)], rows, range(1, 20))))
        if judged["trained_on_the_images_of_what_ranks"] and name != _OWN:
            out.append(note(f"{name} was trained on the images that the ranking model was trained on: it is not independent."))
    return out


def _classes(found: dict[str, Any]) -> list[Html]:
    """Scores by a network's classes; Inception Scores by Inception alone."""
    out: list[Html] = []
    for name, judged in found.get("classes", {}).items():
        label = "Inception Score" if judged["name"] == "inception_score" else f"Class score by {name} (no Inception Score)"
        rows: list[list[Child]] = [[f"N = {count}", _number(value), ""] for count, value in list(judged["by_n"].items())[:-1]]
        most = list(judged["by_n"])[-1]
        rows += [
            [f"N = {most}" + ("" if radius == "0" else f", blur {radius}"), _number(part["drawn"]), _number(part["real"])]
            for radius, part in judged["by_blur"].items()
        ]
        words = "Higher is surer and more various. It grows with the number of pictures: compare it with that of the real ones here, not with published values."
        out.append(join(el("h3", label), note(words), table(["", "drawings", "real pictures"], rows, [1, 2])))
    return out


def _retrieval(found: dict[str, Any]) -> list[Html]:
    rows: list[list[Child]] = []
    for name, judged in found["retrieval"].items():
        for label, values in (*((f"N = {count}", values) for count, values in judged["by_n"].items()), ("real pictures", judged["real"])):
            percent = [f"{100 * values[f'recall_at_{k}']:.1f} %" for k in (1, 5, 10)]
            if "recall_at_1_interval" in values:
                percent[0] += " ({:.1f} to {:.1f})".format(*(100 * bound for bound in values["recall_at_1_interval"]))
            rows.append([name, label, *percent, f"{values['clip_score']:.3f}", f"{values['clip_score_of_another_caption']:.3f}"])
    header = ["judge", "pictures", "R@1", "R@5", "R@10", "cosine with the caption", "with another caption"]
    chance = 100 / max(1, found["drawings"])
    words = note(
        f"How often a caption's picture is among the first k of all {found['drawings']}; chance is {chance:.2g} % at 1. In parentheses: 95 % by other captions."
    )
    return [el("h3", "Do drawings fit their captions?"), words, table(header, rows, range(2, 7))]


def _colours(found: dict[str, Any]) -> Html:
    colours = found["colours"]
    named = int(colours["real"]["captions"])
    if not named or "agreement" not in colours["real"]:
        return note("Colours: no caption names one colour alone, so nothing could be compared.")
    values = [*((f"N = {count}", part) for count, part in colours["by_n"].items()), ("real pictures", colours["real"])]
    rows: list[list[Child]] = [[label, f"{100 * part['agreement']:.0f} %"] for label, part in values]
    words = f"How often a picture whose caption names one colour ({named} captions) has more of it than one whose caption does not; 50 % is chance."
    return join(el("h3", "Colours that captions name"), note(words), table(["", "has more of it"], rows, [1]))


def _nearest(found: dict[str, Any]) -> Html:
    near = found["nearest"]
    rows: list[list[Child]] = [
        [label, *(f"{near[key][name]:.3f}" for name in ("least", "p01", "p10", "median"))]
        for key, label in (("drawn", "drawings"), ("real", "held out"))
    ]
    words = (
        f"Distance to the nearest of {near['among']:,} training images in coarse colours; 0 is a copy. {100 * near['drawn_nearer_than_p01_of_real']:.1f} % of the "
        "drawings are nearer than all but 1 % of the held-out pictures, where 1 % is expected of a model that copies no more than chance does."
    )
    return join(el("h3", "Copies"), note(words), table(["", "least", "1 %", "10 %", "median"], rows, range(1, 5)))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
