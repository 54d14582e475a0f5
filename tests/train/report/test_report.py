"""The report of a made-up run folder: finished, unfinished and damaged. Seconds: about 6."""

from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from infra.errors import DataError
from tests.support.fake_run import disc, fake_run, write_json, write_metrics
from train.report.images import data_uri, png_bytes
from train.report.page import build, render
from train.report.section_curves import _minutes
from train.report.sections import SECTIONS, make
from train.report.view import RunView


def body_of(name: str, run: Path) -> str:
    """One section of the report alone."""
    section = make(name)(RunView(str(run)))
    assert section is not None
    return section.body


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    run = fake_run(tmp_path_factory.mktemp("runs") / "demo")
    return run, Path(build(str(run))).read_text()


class Balance(HTMLParser):
    """Checks that elements close in the order in which they were opened, and collects identifiers and addresses."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.tags.add(tag)
        self.ids += [found["id"] or ""] if "id" in found else []
        self.links += [found[name] or "" for name in ("src", "href") if name in found]
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag


def test_the_page_is_well_formed_has_every_section_and_no_identifier_twice(finished: tuple[Path, str]) -> None:
    found = Balance(finished[1])
    assert found.open == []
    assert len(found.ids) == len(set(found.ids))
    assert set(SECTIONS) <= set(found.ids)
    assert {link for link in found.links if link.startswith("#")} <= {f"#{name}" for name in found.ids}


def test_the_page_needs_nothing_from_outside_and_no_script(finished: tuple[Path, str]) -> None:
    found = Balance(finished[1])
    assert all(link.startswith(("data:image/", "#")) for link in found.links)
    assert found.tags.isdisjoint({"script", "link", "iframe"})
    assert not re.search(r"(?:src|href)=\"https?:|@import|url\((?!#)", finished[1])


def test_a_phone_is_told_the_width_and_a_dark_screen_gets_dark_colours(finished: tuple[Path, str]) -> None:
    assert 'name="viewport" content="width=device-width' in finished[1]
    assert "prefers-color-scheme: dark" in finished[1]


def test_what_comes_from_data_is_escaped_everywhere(finished: tuple[Path, str]) -> None:
    page = finished[1]
    assert "<b>dog</b>" not in page and "&lt;b&gt;dog&lt;/b&gt;" in page
    assert "<script>" not in page and "too &lt;small&gt;" in page


@pytest.mark.parametrize("words", ["20.7", "62", "25", "0.081", "✓ reached", "2.70 against 3.61 nats", "chance is 0.25 %"])
def test_the_tiles_show_the_goals_of_the_evaluation(finished: tuple[Path, str], words: str) -> None:
    page = finished[1]
    assert words in page[page.index('id="summary"') : page.index('id="pictures"')]


_WEAK = {"psnr_db": 19.9, "code_use": 0.24, "ce_below_unigram_percent": 19, "caption_gain_nats": 0.022, "clip_recall_at_1": 0.02, "clip_chance": 0.01}


def test_a_figure_below_its_goal_says_so(tmp_path: Path) -> None:
    fake_run(tmp_path)
    write_json(tmp_path / "evaluate/metrics.json", _WEAK | {"caption_gain_nats": -0.01})
    assert render(RunView(str(tmp_path))).count("not reached") == 4


@pytest.mark.parametrize("change", [("data", "sources", [{"url": "photos"}]), ("dvae", "image_size", 128)], ids=["other data", "other resolution"])
def test_a_run_that_the_goals_were_not_made_for_gets_meanings_and_what_to_do_next(tmp_path: Path, change: tuple[str, str, Any]) -> None:
    run = fake_run(tmp_path)
    section, key, value = change
    config = json.loads((run / "config.json").read_text())
    config[section][key] = value
    write_json(run / "config.json", config)
    write_json(run / "evaluate/metrics.json", _WEAK)
    body = body_of("summary", run)
    assert "reached</span>" not in body and "goal" not in body
    nats = 0.022 * (config["dvae"]["image_size"] // 4) ** 2
    assert f"{nats:.1f} nats for a picture; 0 is a model that ignores its captions, and this is near it" in body
    assert "chance is 1 %" in body and body.count("Next: ") == 5
    good = {"psnr_db": 30.0, "code_use": 0.9, "ce_below_unigram_percent": 60, "caption_gain_nats": 0.2, "clip_recall_at_1": 0.5, "clip_chance": 0.01}
    write_json(run / "evaluate/metrics.json", good)
    assert "Next: " not in body_of("summary", run)


def test_photographs_are_not_called_drawings(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    assert "the real drawing" in body_of("pictures", run) and "every style and variant" in body_of("data", run)
    config = json.loads((run / "config.json").read_text())
    config["data"]["sources"] = [{"url": "photos"}]
    write_json(run / "config.json", config)
    assert "the real picture" in body_of("pictures", run) and "every style and variant" not in body_of("data", run)


def test_a_curve_of_one_or_two_points_says_so(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    assert "no trend" not in body_of("curves", run).replace("validation: 1 point, no trend", "")
    write_metrics(run, "clip", 500, 250, lambda step: {"train/loss": 1.0 / step, "eval/recall_at_1": 0.1 * step})
    assert "training: 2 points, no trend" in body_of("curves", run)


def test_few_pictures_short_times_and_later_loading_do_not_mislead(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    page = Path(build(str(run))).read_text()
    assert 'loading="lazy"' not in page, "what a browser loads later is blank in print"
    found = json.loads((run / "evaluate/metrics.json").read_text())
    for count, few in ((4, True), (328, False)):
        write_json(run / "evaluate/metrics.json", found | {"samples": count})
        said = body_of("summary", run)
        assert f"Measured on {count} pictures of the validation split" in said and ("Of so few, figures say little." in said) == few
    assert "minutes of training" in body_of("curves", run)
    write_metrics(run, "clip", 50, 10, lambda step: {"train/loss": 1.0 / step})
    assert "seconds of training" in body_of("curves", run)


def test_losses_stand_against_minutes_of_training_without_the_pause_between_attempts(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    assert body_of("curves", run).count("against time") == 2 * 3, "one plot for each training, by caption and for screen readers"
    walked = _minutes([(0, 1000.0), (10, 1060.0), (20, 1120.0), (30, 90_000.0), (40, 90_060.0)])
    assert walked == {0: 0.0, 10: 1.0, 20: 2.0, 30: 3.0, 40: 4.0}


@pytest.mark.parametrize(
    ("command", "changes", "line"),
    [
        (
            "python launcher.py prepare demo 'data.sources=[\"my pictures\"]' run.name=mine",
            [],
            "'data.sources=[\"my pictures\"]' run.name=demo-again",
        ),
        ("python launcher.py demo demo", [], "python launcher.py demo demo run.name=demo-again"),
        ("python launcher.py demo mine.toml", [], "python launcher.py demo demo.json"),
        ("python launcher.py dalle runs/demo", [], "python launcher.py demo demo.json"),
        ("python launcher.py demo demo", [{"changed": ["dalle_fit.keep: 2 -> 3"]}], "python launcher.py demo demo.json"),
    ],
)
def test_the_command_to_reproduce_runs_every_stage(tmp_path: Path, command: str, changes: list[Any], line: str) -> None:
    run = fake_run(tmp_path / "demo")
    write_json(run / "provenance.json", {"commit": "4fe81a0c" * 5, "command": command, "changes": changes})
    shown = html.unescape(body_of("reproduce", run))
    assert line in shown and "launcher.py prepare" not in shown and "launcher.py dalle" not in shown


def test_pictures_stand_best_first_beside_the_nearest_training_image_and_the_held_out_one(finished: tuple[Path, str]) -> None:
    run, page = finished
    card = page[page.index("a flat emoji of a red apple</h3>") : page.index("&lt;b&gt;dog&lt;/b&gt;</h3>")]
    found = re.findall(r"CLIP: (0\.2\d); seed \d\"[^>]*>#(\d)</figcaption>", card)
    assert found == [("0.23", "1"), ("0.22", "2"), ("0.21", "3")], "places in sight; similarities, which are no probabilities, when asked for"
    truth = data_uri((run / "generate/pictures/0-truth.png").read_bytes())
    best, near = (data_uri((run / f"generate/pictures/0-3{end}.png").read_bytes()) for end in ("", "-nearest"))
    assert 0 < card.index(truth) < card.index(best) < card.index(near)
    assert "Δ 0.334" in card and "near-0-3" in card


def test_a_drawing_that_was_trained_on_is_not_called_held_out(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "demo")
    index = json.loads((run / "generate/index.json").read_text())
    before = body_of("pictures", run)
    assert "<figcaption>held out</figcaption>" in before and "<figcaption>trained on</figcaption>" not in before
    for entry in index["captions"]:
        entry["split"] = "train"
    write_json(run / "generate/index.json", index)
    after = body_of("pictures", run)
    assert "<figcaption>held out</figcaption>" not in after and "<figcaption>trained on</figcaption>" in after


def test_a_picture_that_is_missing_leaves_a_blank_and_not_an_error(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "demo")
    (run / "generate/pictures/0-3.png").unlink()
    assert body_of("pictures", run).count('class="blank"') == 1


def test_reconstructions_are_shown_one_by_one_and_a_plain_picture_as_it_is(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "demo")
    body = body_of("reconstructions", run)
    assert body.count('class="stack"') == 12
    assert "From top to bottom: original, from its codes, relaxed." in body
    (run / "dvae/pictures/reconstructions.png").write_bytes(png_bytes(disc(1)))
    assert 'class="scroll strip"' in body_of("reconstructions", run)


def test_data_timings_and_commands_are_told(finished: tuple[Path, str]) -> None:
    page = finished[1]
    for words in (
        "7\u2009612",
        "duplicate",
        "6.3",
        "41000 tokens/s",
        "5:12",
        "git checkout " + "4fe81a0c" * 5,
        "317 of 512 codes",
        "40\u2009065",
    ):
        assert words in page, words
    assert "67d5ece3" not in page
    assert "python launcher.py demo demo.json" in page
    assert "Twemoji, © Twitter, Inc. and contributors, CC-BY 4.0" in page


def test_filters_are_told_with_counts_shares_and_five_examples_each(finished: tuple[Path, str]) -> None:
    body = body_of("data", finished[0])
    assert "33 of 8\u2009046 records were not used" in body  # 31 + 2 beside 7612 + 401
    counts = [re.sub(r"<[^>]+>", " ", row).split() for row in re.findall(r"<tr>(.*?)</tr>", body)]
    assert ["duplicate", "31", "0.4", "%"] in counts and ["too", "&lt;small&gt;", "2", "&lt;", "0.1", "%"] in counts
    assert counts.index(["duplicate", "31", "0.4", "%"]) < counts.index(["too", "&lt;small&gt;", "2", "&lt;", "0.1", "%"]), "the most frequent first"
    assert body.count("same bytes as u1f400") == 5 and "u1f464" in body and "u1f465" not in body
    assert "12 x &lt;b&gt;9&lt;/b&gt; pixels" in body
    assert ["not", "English", "412"] in counts
    assert "1 input shard could not be read" in body and "train-&lt;0&gt;.tar" in body and "truncated after 3 members (3 tries)" in body


def test_a_run_without_drops_says_so_and_many_quarantined_shards_are_cut_short(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "demo")
    done = json.loads((run / "prepare/done.json").read_text())
    done["summary"] |= {"dropped": {}, "dropped_captions": {}}
    done["summary"]["quarantined"] = [{"shard": f"part-{i:03}.tar", "reason": "not a tar", "tries": 1} for i in range(23)]
    write_json(run / "prepare/done.json", done)
    body = body_of("data", run)
    assert "No record was dropped." in body and "Captions left out" not in body
    assert "23 input shards could not be read" in body and "part-019.tar" in body and "part-020.tar" not in body and "and 3 more" in body
    assert "not a tar (1 try)" in body


def test_the_configuration_in_the_page_is_the_configuration(finished: tuple[Path, str]) -> None:
    run, page = finished
    from html import unescape

    text = page[page.index("the whole configuration") :]
    found = json.loads(unescape(text[text.index("<code>") + 6 : text.index("</code>")]))
    assert found == json.loads((run / "config.json").read_text())


def test_the_report_of_an_empty_run_folder_says_in_each_section_what_is_not_there(tmp_path: Path) -> None:
    page = render(RunView(str(tmp_path / "new")))
    assert Balance(page).open == []
    for name in SECTIONS:
        body = page[page.index(f'id="{name}"') :]
        assert re.search(r"yet|not finished|no configuration|no credits|No metrics", body[: body.index("</section>")]), name
    assert "cannot be shown" not in page


def test_the_report_of_an_unfinished_run_takes_the_newest_values_of_the_logs(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "demo")
    names = ("evaluate/metrics.json", "evaluate/done.json", "generate/index.json", "generate/done.json", "dalle/metrics/attempt-0.jsonl")
    for name in names:
        (run / name).unlink()
    page = render(RunView(str(run)))
    assert "The evaluate stage has not finished" in page
    assert "still to come: generate, evaluate" in page
    assert "20.6" in page[page.index('id="summary"') : page.index('id="pictures"')]


@pytest.mark.parametrize("name", ["config.json", "prepare/done.json", "evaluate/metrics.json", "generate/index.json", "dvae/pictures/codebook.json"])
@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_file_is_named_in_its_section_and_the_other_sections_stand(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(content)
    page = render(RunView(str(tmp_path)))
    assert name in page[page.index('class="error"') :]
    assert Balance(page).open == []
    assert set(SECTIONS) <= set(Balance(page).ids)
    assert 0 < page.count('class="error"') < len(SECTIONS)


def test_a_file_that_is_no_object_is_refused_by_name(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", [1])
    with pytest.raises(DataError, match=r"config\.json: expected a JSON object, found list"):
        _ = RunView(str(tmp_path)).config


def test_losses_that_are_not_finite_are_counted_and_do_not_break_a_plot(tmp_path: Path) -> None:
    write_metrics(tmp_path, "dvae", 100, 10, lambda s: {"train/loss": 1.0 / s})
    path = tmp_path / "dvae/metrics/attempt-0.jsonl"
    path.write_text(path.read_text() + '{"step": 110, "time": 1.0, "values": {"train/loss": "nan"}}\n')
    page = render(RunView(str(tmp_path)))
    assert "1 logged values are not finite" in page
    assert "<svg" in page


def test_equal_runs_give_equal_pages(tmp_path: Path, finished: tuple[Path, str]) -> None:
    assert Path(build(str(finished[0]))).read_text() == finished[1]


def test_a_report_can_be_built_in_a_run_folder_on_s3(s3: str, finished: tuple[Path, str]) -> None:
    from infra import storage

    run = storage.join(s3, finished[0].name)  # a run is called as its folder is
    storage.upload_folder(finished[0], run)
    storage.delete(storage.join(run, "report.html"))
    assert storage.read_bytes(build(run)).decode() == finished[1]


def test_every_listed_section_has_a_module() -> None:
    for name in SECTIONS:
        assert make(name).__module__ == f"train.report.section_{name}"


# --- Markup, plots, pictures --------------------------------------------------------------------------------------------------------------
