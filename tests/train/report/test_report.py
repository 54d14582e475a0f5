"""The report of a made-up run folder: finished, unfinished and damaged. Seconds: about 6."""

import html
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from infra.errors import DataError
from train.config import RunConfig
from train.report.images import data_uri, grid, grid_png, png_bytes, read_grid, read_png
from train.report.markup import Html, el, table
from train.report.page import build, render
from train.report.plots import Line, lines, ranked, running_mean, thin
from train.report.section_codebook import perplexity
from train.report.section_curves import _minutes
from train.report.sections import SECTIONS, make
from train.report.view import RunView
from train.run.stage_table import STAGES

Draw = Callable[[int], np.ndarray]


def disc(number: int, side: int = 32) -> np.ndarray:
    """A coloured disc on white: uint8 [side, side, 3]."""
    y, x = np.mgrid[:side, :side] - side / 2
    colour = np.random.default_rng(number).integers(0, 200, 3)
    inside = (x**2 + y**2 < (side * (0.25 + 0.02 * (number % 7))) ** 2)[..., None]
    return np.where(inside, colour, 255).astype(np.uint8)


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_metrics(run: Path, stage: str, steps: int, every: int, values: Callable[[int], dict[str, float]]) -> None:
    path = run / stage / "metrics" / "attempt-0.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"step": s, "time": float(s), "values": values(s)}) + "\n" for s in range(every, steps + 1, every)))


def fake_run(
    run: Path, draw: Draw = disc, captions: tuple[str, ...] = ("a flat emoji of a red apple", "an outlined drawing of a <b>dog</b>")
) -> Path:
    """A finished run of the demo, with curves that look like curves."""
    config = RunConfig.model_validate({"run": {"name": "demo"}}).model_dump(mode="json")
    config["dvae"] |= {"image_size": 64, "downsample": 4, "vocab": 512}
    config["dvae_fit"] |= {"steps": 1500, "batch": 32}
    config["dalle_fit"] |= {"steps": 2000, "batch": 32}
    config["clip_fit"] |= {"steps": 500, "batch": 64}
    config["generate"] |= {"show": 3, "candidates": 8}
    write_json(run / "config.json", config)
    write_json(run / "provenance.json", {"commit": "4fe81a0c" * 5, "versions": {"torch": "2.15.0"}, "created": 1735689600.0})
    done: dict[str, Any] = {
        stage: {"stage": stage, "seconds": 11.0 * i + 5, "world_size": 2, "commit": "4fe81a0c", "summary": {}} for i, stage in enumerate(STAGES)
    }
    done["prepare"]["summary"] = {
        "splits": {"train": 7612, "validation": 401},
        "sources": {"emoji": 8013},
        "dropped": {
            "duplicate": {"count": 31, "examples": [{"id": f"u1f46{i}", "why": "same bytes as u1f400"} for i in range(7)]},
            "too <small>": {"count": 2, "examples": [{"id": "x", "why": "12 x <b>9</b> pixels"}]},
        },
        "dropped_captions": {"not English": 412, "too short": 5},
        "quarantined": [{"shard": "train-<0>.tar", "reason": "truncated after 3 members", "tries": 3}],
        "groups": {"train": 3500, "validation": 184},
        "credits": ["Twemoji, © Twitter, Inc. and contributors, CC-BY 4.0", "OpenMoji, CC-BY-SA 4.0 <script>alert(1)</script>"],
    }
    done["tokenizer"]["summary"] = {"captions": 40065, "content_hash": "67d5ece3", "settings": {"vocab": 400}}
    done["dvae"] |= {"seconds": 312.0, "throughput": {"value": 153.7, "unit": "images/s"}}
    done["dalle"] |= {"seconds": 401.0, "throughput": {"value": 41000.0, "unit": "tokens/s"}}
    for stage, what in done.items():
        write_json(run / stage / "done.json", what)
    _fake_metrics(run)
    _fake_pictures(run, draw, captions)
    return run


def _fake_metrics(run: Path) -> None:
    rng = np.random.default_rng(0)

    def falling(step: int, top: float, low: float, scale: float, noise: float = 0.02) -> float:
        return low + (top - low) * math.exp(-step / scale) + noise * float(rng.standard_normal())

    def dvae(step: int) -> dict[str, float]:
        values = {"train/loss": falling(step, 0.2, -1.4, 300), "train/nll": falling(step, 0.1, -1.6, 300), "train/kl": falling(step, 5, 2, 300)}
        values |= {"optim/lr": 1e-3 * (1 - step / 1600), "optim/grad_norm": math.exp(falling(step, 1, -1, 200, 0.2)), "perf/images_per_s": 150.0}
        values |= {"sched/tau": 1 - 0.9 * step / 1500, "sched/beta": 3.0, "data/wait_s": 0.001}
        if step % 300 == 0:
            values |= {"eval/psnr": 21 - 8 * math.exp(-step / 500), "eval/psnr_relaxed": 22 - 8 * math.exp(-step / 500), "eval/code_use": 0.62}
            values |= {"eval/perplexity": 150.0, "eval/nll_true": falling(step, 0.1, -1.5, 300), "eval/nll_relaxed": falling(step, 0.1, -1.6, 300)}
        return values

    def dalle(step: int) -> dict[str, float]:
        image = falling(step, 6.2, 2.6, 350, 0.05)
        values = {"train/loss": image, "train/loss_text": falling(step, 7, 1, 200, 0.05), "train/loss_image": image, "perf/tokens_per_s": 41e3}
        if step % 400 == 0:
            values |= {"eval/loss_image": image + 0.1, "eval/loss_image_shuffled": image + 0.18, "eval/caption_gain": 0.08, "eval/loss_text": 1.3}
        return values

    write_metrics(run, "dvae", 1500, 10, dvae)
    write_metrics(run, "dalle", 2000, 10, dalle)
    write_metrics(run, "clip", 500, 10, lambda s: {"train/loss": falling(s, 4, 1, 100), "eval/loss": 2.0, "eval/recall_at_1": 0.2})
    metrics = {
        "psnr_db": 20.7,
        "psnr_relaxed_db": 21.2,
        "code_use": 0.62,
        "code_perplexity": 151.0,
        "unigram_entropy_nats": 3.61,
        "image_ce_nats": 2.7,
    }
    metrics |= {"image_ce_shuffled_nats": 2.78, "caption_gain_nats": 0.081, "ce_below_unigram_percent": 25.2, "text_ce_nats": 1.3, "samples": 401}
    write_json(run / "evaluate/metrics.json", metrics | {"clip_recall_at_1": 0.21, "clip_chance": 0.0025})


def _fake_pictures(run: Path, draw: Draw, captions: tuple[str, ...]) -> None:
    pictures = run / "dvae" / "pictures"
    pictures.mkdir(parents=True)
    originals = [draw(i) for i in range(12)]
    rows = [originals, originals, [picture // 2 + 64 for picture in originals]]
    (pictures / "reconstructions.png").write_bytes(grid_png(rows, labels=("original", "from its codes", "relaxed")))
    counts = [int(40_000 / (rank + 3) ** 1.1) for rank in range(317)] + [0] * 195
    write_json(pictures / "codebook.json", {"counts": counts, "samples": 401})
    index: dict[str, Any] = {"captions": [], "temperature": 1.0, "checkpoint": "step-00002000"}
    (run / "generate" / "pictures").mkdir(parents=True)
    for number, caption in enumerate(captions):
        entry: dict[str, Any] = {"caption": caption, "id": f"id-{number}", "truth": f"generate/pictures/{number}-truth.png", "pictures": []}
        (run / entry["truth"]).write_bytes(png_bytes(draw(10 * number)))
        for k in range(4):
            names = [f"generate/pictures/{number}-{k}.png", f"generate/pictures/{number}-{k}-nearest.png"]
            for j, name in enumerate(names):
                (run / name).write_bytes(png_bytes(draw(10 * number + k + j)))
            nearest = {"id": f"near-{number}-{k}", "file": names[1], "distance": 0.1 * k + 0.034}
            entry["pictures"].append({"file": names[0], "score": 0.2 + 0.01 * k, "seed": k, "nearest": nearest})
        index["captions"].append(entry)
    write_json(run / "generate" / "index.json", index)


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
    run = fake_run(tmp_path)
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

    storage.upload_folder(finished[0], s3)
    storage.delete(storage.join(s3, "report.html"))
    assert storage.read_bytes(build(s3)).decode() == finished[1]


def test_every_listed_section_has_a_module() -> None:
    for name in SECTIONS:
        assert make(name).__module__ == f"train.report.section_{name}"


# --- Markup, plots, pictures --------------------------------------------------------------------------------------------------------------


def test_markup_escapes_strings_and_attributes_and_keeps_html() -> None:
    assert el("a", "<&>", Html("<b>x</b>"), 3, None, class_='q"', hidden=True, title=None) == '<a class="q&quot;" hidden>&lt;&amp;&gt;<b>x</b>3</a>'
    assert el("img", src="x") == '<img src="x">'
    assert '<td class="n">1</td>' in table(["a", "b"], [["x", 1]], numbers=(1,))


def test_plots_take_their_colours_and_font_from_the_page_and_keep_words_as_text() -> None:
    noisy = Line("training", [(i, 1 + (i % 7)) for i in range(2000)])
    text = lines("k", 'loss "a" <b>', [noisy, Line("validation", [(0, 2.0), (1000, float("nan")), (1999, 1.0)])], reference=(1.5, "unigram"))
    assert ">validation</text>" in text and ">unigram</text>" in text and ">updates</text>" in text
    assert "currentColor" in text and "var(--s0)" in text and "var(--s1)" in text
    assert not re.search(r"#[0-9a-f]{6}\b|font-family|<style|<metadata|nan", text)
    assert 'aria-label="loss &quot;a&quot; &lt;b>"' in text
    assert len(text) < 60_000


def test_the_numbers_of_an_axis_are_not_cut() -> None:
    assert ">0.1005</text>" in lines("k", "x", [Line("a", [(0, 0.1), (1, 0.105)])])


def test_a_plot_is_the_same_bytes_every_time_and_its_identifiers_carry_its_key() -> None:
    a, b = (ranked("one", "x", [5, 3, 0, 1]) for _ in range(2))
    assert a == b
    assert all(name.startswith("one-") for name in re.findall(r'\bid="([^"]*)', a))


def test_a_logarithmic_axis_is_used_only_where_all_values_are_positive() -> None:
    positive = lines("k", "x", [Line("a", [(0, 1e-3), (1, 1e3)])], log=True)
    zero = lines("k", "x", [Line("a", [(0, 0.0), (1, 1e3)])], log=True)
    assert "mathdefault" in positive or "10" in positive
    assert positive != zero and zero == lines("k", "x", [Line("a", [(0, 0.0), (1, 1e3)])])


def test_thinning_keeps_the_mean_and_smoothing_the_ends() -> None:
    points = [(float(i), float(i * i)) for i in range(1000)]
    few = thin(points, 100)
    assert len(few) == 100
    assert abs(sum(y for _, y in few) / 100 - sum(y for _, y in points) / 1000) < 1e-6
    smooth = running_mean([5.0, *[1.0] * 98, 7.0])
    assert (smooth[0], smooth[50], smooth[-1]) == (5.0, 1.0, 7.0)
    assert running_mean([2.0] * 10) == [2.0] * 10


def test_perplexity_is_the_number_of_codes_when_all_are_used_equally() -> None:
    assert abs(perplexity([7] * 64 + [0] * 10) - 64) < 1e-9
    assert perplexity([3, 0]) == 1.0


def test_a_grid_can_be_taken_apart_again() -> None:
    rows = [[disc(i) for i in range(3)], [disc(i) for i in range(5, 7)]]
    found = read_grid(grid_png(rows, pad=3, labels=["first", "a label far too long to fit into this narrow grid of pictures"]))
    assert found is not None and found.labels[0] == "first"
    assert [len(row) for row in found.rows] == [3, 2]
    assert all(np.array_equal(a, b) for got, row in zip(found.rows, rows, strict=True) for a, b in zip(got, row, strict=True))
    assert read_grid(png_bytes(disc(0))) is None


def test_a_grid_without_labels_has_only_white_between_its_pictures() -> None:
    black = np.zeros((4, 6, 3), np.uint8)
    canvas = grid([[black, black], [black, black]], pad=2)
    assert canvas.shape == (14, 18, 3)
    assert int((canvas == 0).all(-1).sum()) == 4 * 24
    assert (canvas[:2] == 255).all() and (canvas[:, 8:10] == 255).all()


def test_pictures_survive_png_and_large_ones_travel_as_webp() -> None:
    assert np.array_equal(read_png(png_bytes(disc(3))), disc(3))
    assert data_uri(png_bytes(disc(3))).startswith("data:image/png;base64,")
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    assert data_uri(png_bytes(noise)).startswith("data:image/webp;base64,")


def test_wrong_pictures_are_refused_with_what_was_given() -> None:
    with pytest.raises(ValueError, match=r"float64, shape \[4, 4\]: expected uint8 of shape \[H, W, 3\]"):
        png_bytes(np.zeros((4, 4)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="4 bytes are no picture"):
        read_png(b"junk")
    with pytest.raises(ValueError, match=r"pictures of one size, given: \[\(4, 4, 3\), \(5, 5, 3\)\]"):
        grid([[np.zeros((4, 4, 3), np.uint8), np.zeros((5, 5, 3), np.uint8)]])
    with pytest.raises(ValueError, match="given: no pictures"):
        grid([])
    with pytest.raises(ValueError, match="1 labels for 2 rows"):
        grid([[disc(0)], [disc(1)]], labels=["a"])
