"""What was learned when: kept checkpoints draw the same captions, once; the report and TensorBoard show them. Seconds: about 6."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support import drawable_run
from tests.support.drawable_run import CAPTIONS
from tests.support.fake_run import fake_run, write_json
from train.config import load_run
from train.drawing.draw import draw
from train.drawing.settings import Settings
from train.drawing.source import open_models
from train.report.images import png_bytes, read_png
from train.report.section_pictures import section
from train.report.view import RunView
from train.stages import generate_learned
from train.stages.generate_learned import _spread


def test_each_kept_checkpoint_draws_the_first_captions_with_its_own_weights_once(tmp_path: Path) -> None:
    run = drawable_run.make(str(tmp_path / "run"), live=True)
    models = open_models(run.url)  # the newest checkpoint's
    learned = generate_learned.plan(run, CAPTIONS, Settings(n=3, seed=5), models.lineage, 4)
    assert learned.steps == [5, 10]
    for step in learned.steps:
        learned.draw(models, step)
    older, newer = learned.entries()
    assert [entry["step"] for entry in (older, newer)] == [5, 10]
    assert [picture["caption"] for picture in older["pictures"]] == list(CAPTIONS), "each caption once"
    truth = [picture.pixels_YXC for some in draw(models, CAPTIONS, Settings(n=1, seed=5)) for picture in some]
    drawn = [[read_png((tmp_path / "run" / picture["file"]).read_bytes()) for picture in entry["pictures"]] for entry in (older, newer)]
    assert all(np.array_equal(a, b) for a, b in zip(truth, drawn[1], strict=True)), "the newest are those of draw"
    assert any(not np.array_equal(a, b) for a, b in zip(*drawn, strict=True)), "the older weights draw others"
    files = {path: os.stat(path).st_mtime_ns for path in (tmp_path / "run" / "generate").rglob("*.png")}
    learned.draw(models, 5)
    assert {path: os.stat(path).st_mtime_ns for path in (tmp_path / "run" / "generate").rglob("*.png")} == files
    generate_learned.to_tensorboard(run, [newer | {"caption": CAPTIONS[0]}], [older, newer], 2, 10)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard" / "generate"))
    events.Reload()
    assert sorted(events.Tags()["images"]) == sorted([f"1 drawn/{CAPTIONS[0]}", *(f"2 learned/{caption}" for caption in CAPTIONS)])
    assert [image.step for image in events.Images(f"2 learned/{CAPTIONS[1]}")] == [5, 10]
    assert min(image.width for image in events.Images(f"2 learned/{CAPTIONS[1]}")) >= 128, "a picture of 16 pixels can be looked at"
    assert not (tmp_path / "run" / "generate" / "metrics").exists()


def test_a_checkpoint_that_its_run_drops_meanwhile_is_passed_over(tmp_path: Path) -> None:
    run = drawable_run.make(str(tmp_path / "run"), live=True)
    models = open_models(run.url)
    learned = generate_learned.plan(run, CAPTIONS, Settings(), models.lineage, 4)
    for path in (tmp_path / "run" / "dalle" / "checkpoints" / "step-00000005").iterdir():
        path.unlink()
    for step in learned.steps:
        learned.draw(models, step)
    assert [entry["step"] for entry in learned.entries()] == [10]


def test_of_many_checkpoints_the_first_the_newest_and_some_between_are_drawn() -> None:
    steps = list(range(1000, 11_000, 1000))
    assert list(_spread(steps, 4)) == [1000, 4000, 7000, 10_000]
    assert list(_spread(steps, 1)) == [10_000] and list(_spread(steps, 0)) == [] and list(_spread(steps, 50)) == steps


def test_the_report_shows_a_row_for_each_caption_and_a_column_for_each_checkpoint(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "demo")
    index = RunView(str(run)).generated
    picture = png_bytes(np.zeros((8, 8, 3), np.uint8))
    learned = []
    for step in (1000, 2000):
        names = [f"generate/learned-{step}/{number:03d}.png" for number in range(2)]
        for name in names:
            (run / name).parent.mkdir(parents=True, exist_ok=True)
            (run / name).write_bytes(picture)
        learned.append(
            {"step": step, "pictures": [{"caption": caption, "file": name} for caption, name in zip(("a <i>fox</i>", "a sun"), names, strict=True)]}
        )
    write_json(run / "generate" / "index.json", index | {"learned": learned})
    found = section(RunView(str(run)))
    assert found is not None
    strip = found.body.partition("What was learned when")[2]
    assert "1,000 updates" in strip and "2,000 updates" in strip and "dalle_fit.keep_every keeps more" in strip
    assert strip.count("<img") == 4 and "a &lt;i&gt;fox&lt;/i&gt;" in strip
    write_json(run / "generate" / "index.json", index)
    assert "What was learned when" not in section(RunView(str(run))).body  # type: ignore[union-attr]


def test_a_stored_run_without_the_key_draws_none(tmp_path: Path) -> None:
    run = drawable_run.make(str(tmp_path / "run"), live=True)
    config = run.config_url
    text = Path(config).read_text().replace('"checkpoints": 4', '"checkpoints_": 4').replace('"checkpoints_": 4,', "")
    Path(config).write_text(text)
    assert load_run(run.url, []).generate.checkpoints == 0
    assert generate_learned.plan(run, CAPTIONS, Settings(), {}, 0).steps == []
