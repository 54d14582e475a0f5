"""Section: what was trained on what (counts, filters, passes over the data)."""

from __future__ import annotations

from typing import Any

from infra.text import counted
from train.loop.panels import TITLES
from train.report.judgement import draws_emoji
from train.report.markup import Child, Html, el, join, note, number, table
from train.report.view import RunView, Section
from train.run.stage_table import TRAINED

_READS = {"dvae": "images", "dalle": "captions and codes", "align": "captions and codes", "clip": "images and captions"}
_EXAMPLES = 5
_SHARDS = 20


def section(run: RunView) -> Section | None:
    """Splits, sources and dropped records of the prepare stage, and how often each training stage saw them."""
    summary = run.summary("prepare")
    if not summary:
        return Section("data", "What was trained on what", note("The prepare stage has not finished: nothing is known about the data."))
    parts: list[Child] = [_counts(run, summary), _passes(run, summary), _filters(summary), _takedown(summary), _files(summary), _other(run)]
    return Section("data", "What was trained on what", join(parts))


def _counts(run: RunView, summary: dict[str, Any]) -> Html:
    splits, sources = summary.get("splits") or {}, summary.get("sources") or {}
    rows: list[list[Child]] = [[el("b", "split "), name, number(count)] for name, count in splits.items()]
    rows += [[el("b", "source "), name, number(count)] for name, count in sources.items()]
    groups = summary.get("groups")
    if isinstance(groups, dict):
        rows += [[el("b", "concepts "), name, number(value)] for name, value in groups.items() if isinstance(value, int | float)]
    held_out = (
        "concepts: every style and variant of a name together" if draws_emoji(run) else "groups: records of one image or of one name go together"
    )
    words = f"Images with captions. Validation holds out whole {held_out}."
    return join(note(words), table(["", "", "count"], rows, numbers=(2,)))


def _passes(run: RunView, summary: dict[str, Any]) -> Html | None:
    train = (summary.get("splits") or {}).get("train")
    rows: list[list[Child]] = []
    for stage in (name for name in TRAINED if name in run.stages):
        fit = run.section(f"{stage}_fit")
        if stage == "align":
            fit = fit | {"batch": fit.get("batch") or run.section("dalle_fit").get("batch", 0)}
        if not train or not {"steps", "batch"} <= fit.keys():
            continue
        seen = int(fit["steps"]) * int(fit["batch"])
        finished = "" if run.done(stage) else " (planned)"
        size = run.summary(stage).get("parameters")
        row: list[Child] = [TITLES[stage] + finished, _READS[stage], number(size) if isinstance(size, int) else "", number(fit["steps"])]
        rows.append([*row, number(fit["batch"]), f"{seen / train:.1f}"])
    if not rows:
        return None
    header = ["model", "reads", "parameters", "updates", "batch", "passes over training data"]
    if not any(row[2] for row in rows):
        header, rows = [header[i] for i in (0, 1, 3, 4, 5)], [[row[i] for i in (0, 1, 3, 4, 5)] for row in rows]
    return join(el("h3", "Training"), table(header, rows, numbers=range(2, len(header))))


def _filters(summary: dict[str, Any]) -> Html:
    """What was left out: records by reason, with examples; captions by reason; and input shards that could not be read."""
    title, dropped = el("h3", "Filters"), summary.get("dropped") or {}
    captions, quarantined = _dropped_captions(summary), _quarantined(summary)
    if not dropped:
        return join(title, note("No record was dropped."), captions, quarantined)
    kept = sum((summary.get("splits") or {}).values())
    entries = sorted(dropped.items(), key=lambda item: (-int(item[1]["count"]), item[0]))
    lost = sum(int(what["count"]) for _, what in entries)
    words = f"{number(lost)} of {number(kept + lost)} records were not used."
    rows: list[list[Child]] = [[reason, number(what["count"]), _percent(what["count"], kept + lost)] for reason, what in entries]
    # Examples are listed below the counts; beside them, the table would be too wide for a phone.
    examples = [_examples(reason, what.get("examples") or []) for reason, what in entries]
    return join(title, note(words), table(["reason", "records", "share"], rows, numbers=(1, 2)), examples, captions, quarantined)


def _examples(reason: str, examples: list[dict[str, Any]]) -> Html | None:
    if not examples:
        return None
    lines = [el("li", el("span", str(each["id"]), class_="mono"), [el("br"), each["why"]] if each["why"] else None) for each in examples[:_EXAMPLES]]
    return el("details", el("summary", f"Examples: {reason}"), el("ul", lines), class_="examples")


def _takedown(summary: dict[str, Any]) -> Html | None:
    """Lines of the take-down list that name no record, perhaps because they are misspelt."""
    facts = summary.get("takedown") or {}
    if not facts.get("without_match"):
        return None
    words = f"{number(facts['without_match'])} of {number(facts['lines'])} lines of the take-down list name no record, for example:"
    return join(el("h3", "Take-down list"), note(words), el("ul", [el("li", el("span", str(line), class_="mono")) for line in facts["examples"]]))


def _dropped_captions(summary: dict[str, Any]) -> Html | None:
    dropped = summary.get("dropped_captions") or {}
    if not dropped:
        return None
    rows: list[list[Child]] = [[reason, number(count)] for reason, count in sorted(dropped.items(), key=lambda item: (-int(item[1]), item[0]))]
    words = "Captions are judged one by one; a record goes when none of its captions is left."
    return join(el("h3", "Captions left out"), note(words), table(["reason", "captions"], rows, numbers=(1,)))


def _files(summary: dict[str, Any]) -> Html | None:
    """How many files of the sources were read, and which were not, so that nothing is ignored silently."""
    files: dict[str, Any] = summary.get("files") or {}
    if not files:
        return None
    rows: list[list[Child]] = []
    for url, census in files.items():
        rows.append([el("span", url, class_="mono"), "read", number(census["read"])])
        if census["pictures"]:
            rows.append(["", "images beside tables", number(census["pictures"])])
        rows += [["", f"not read: {suffix}", number(count)] for suffix, count in _by_count(census["not_read"])]
    rows += [["inside tars", f"not read: {suffix}", number(count)] for suffix, count in _by_count(summary.get("not_read") or {})]
    words = "Every file that lies in a source is read, an image that a table may name, or not read because of its suffix."
    return join(el("h3", "Files"), note(words), table(["source", "", "files"], rows, numbers=(2,)))


def _by_count(counts: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _quarantined(summary: dict[str, Any]) -> Html | None:
    shards = summary.get("quarantined") or []
    if not shards:
        return None
    words = f"{number(len(shards))} input shard{'s' if len(shards) > 1 else ''} could not be read; the rest went on without. Repair the input and run prepare again."
    lines = [
        el("li", el("span", str(each["shard"]), class_="mono"), el("br"), f"{each['reason']} ({counted(each['tries'], 'try', 'tries')})")
        for each in shards[:_SHARDS]
    ]
    if len(shards) > _SHARDS:
        lines.append(el("li", f"and {number(len(shards) - _SHARDS)} more"))
    return join(el("h3", "Quarantined input"), el("p", words, class_="error"), el("ul", lines))


def _percent(count: int, total: int) -> str:
    share = 100 * count / total
    return f"{share:.1f} %" if share >= 0.1 else "< 0.1 %"


def _other(run: RunView) -> Html | None:
    rows: list[list[Child]] = []
    for stage in ("tokenizer", "encode"):
        for name, value in run.summary(stage).items():
            # Only numbers: texts in these summaries are hashes and schemas, which are for programs.
            if isinstance(value, int | float) and not isinstance(value, bool):
                shown = number(value) if isinstance(value, int) else f"{value:.4g}"
                rows.append([stage, name.replace("_", " "), shown])
    return join(el("h3", "Tokenizer and codes"), table(["stage", "", ""], rows, numbers=(2,))) if rows else None
