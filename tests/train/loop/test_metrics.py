"""Metrics survive kills, resumed attempts, NaN and s3. Seconds: about 4, most of them torch's import for TensorBoard."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from infra import storage
from tests.support.events import next_second
from tests.train.loop.test_trainer import APPLIED, Nothing, fit_of
from train.loop.metrics import MetricsWriter, next_attempt, read_metrics, shown_as, throughput
from train.loop.panels import PANELS
from train.weights import checkpoint


def _write(run: Path, attempt: int, points: list[tuple[int, dict[str, float]]]) -> Path:
    path = run / "dvae" / "metrics" / f"attempt-{attempt}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"step": s, "time": 1000.0 + s, "values": v}) + "\n" for s, v in points))
    return path


def _events(run: Path, stage: str) -> "dict[str, list[tuple[int, float]]]":
    found = EventAccumulator(str(run / "tensorboard" / stage))
    found.Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_what_is_written_is_read_back_and_stands_in_tensorboard(tmp_path: Path) -> None:
    writer = MetricsWriter(str(tmp_path), "dvae", 0)
    writer.scalars(1, {"train/loss": 2.5})
    writer.scalars(2, {"train/loss": np.float32(1.5), "eval/psnr": 18.0})  # type: ignore[dict-item]
    writer.images(2, "reconstructions", np.zeros((8, 8, 3), np.uint8))
    writer.text(2, "caption", "a red apple")
    writer.close()
    series = read_metrics(str(tmp_path), "dvae")
    assert [(p.step, p.value) for p in series["train/loss"]] == [(1, 2.5), (2, 1.5)]
    assert [(p.step, p.value) for p in series["eval/psnr"]] == [(2, 18.0)]
    assert _events(tmp_path, "dvae") == {"1 loss/train loss": [(1, 2.5), (2, 1.5)], "2 validation/psnr": [(2, 18.0)]}


def test_values_that_are_not_finite_stay_valid_json_and_come_back(tmp_path: Path) -> None:
    writer = MetricsWriter(str(tmp_path), "dalle", 0)
    writer.scalars(1, {"a": math.nan, "b": math.inf, "c": -math.inf})
    writer.close()
    text = (tmp_path / "dalle/metrics/attempt-0.jsonl").read_text()

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    json.loads(text, parse_constant=refuse)
    series = read_metrics(str(tmp_path), "dalle")
    assert math.isnan(series["a"][0].value)
    assert (series["b"][0].value, series["c"][0].value) == (math.inf, -math.inf)


def test_a_line_can_be_read_before_the_writer_is_closed(tmp_path: Path) -> None:
    writer = MetricsWriter(str(tmp_path), "dvae", 0)
    writer.scalars(7, {"train/loss": 1.0})
    assert read_metrics(str(tmp_path), "dvae")["train/loss"][0].step == 7
    writer.close()


def test_the_incomplete_line_of_a_killed_writer_is_ignored(tmp_path: Path) -> None:
    path = _write(tmp_path, 0, [(1, {"loss": 1.0}), (2, {"loss": 2.0})])
    whole = path.read_text()
    last = whole.splitlines()[-1]
    for cut in range(1, len(last) + 1):
        path.write_text(whole[:-cut])
        assert [p.step for p in read_metrics(str(tmp_path), "dvae")["loss"]] in ([1], [1, 2])
    path.write_text(whole[:-2])
    assert [p.step for p in read_metrics(str(tmp_path), "dvae")["loss"]] == [1]


def test_what_an_attempt_did_beyond_the_start_of_the_next_is_dropped_in_every_series(tmp_path: Path) -> None:
    _write(tmp_path, 0, [(10, {"loss": 1.0}), (20, {"loss": 2.0, "psnr": 9.0}), (30, {"loss": 3.0, "late": 1.0})])
    _write(tmp_path, 1, [(20, {"loss": 2.5, "late": 2.0}), (40, {"loss": 4.5, "psnr": 11.0, "late": 3.0})])
    series = read_metrics(str(tmp_path), "dvae")
    assert [(p.step, p.value) for p in series["loss"]] == [(10, 1.0), (20, 2.5), (40, 4.5)]
    assert [(p.step, p.value) for p in series["psnr"]] == [(20, 9.0), (40, 11.0)], (
        "an attempt that starts at a step may have only the rest of it to do"
    )
    assert [p.step for p in read_metrics(str(tmp_path), "dvae")["late"]] == [20, 40]


def test_a_third_attempt_may_go_back_behind_the_second_and_an_empty_one_changes_nothing(tmp_path: Path) -> None:
    _write(tmp_path, 0, [(10, {"loss": 1.0}), (20, {"loss": 1.1}), (30, {"loss": 1.2})])
    _write(tmp_path, 1, [(30, {"loss": 2.0})])
    _write(tmp_path, 2, [(20, {"loss": 3.0})])
    _write(tmp_path, 10, [])
    assert [(p.step, p.value) for p in read_metrics(str(tmp_path), "dvae")["loss"]] == [(10, 1.0), (20, 3.0)]
    assert next_attempt(str(tmp_path), "dvae") == 11


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 10)), min_size=1, max_size=5))
def test_however_often_a_run_is_resumed_each_step_shows_the_last_attempt_that_reached_it(
    tmp_path_factory: pytest.TempPathFactory, spans: list
) -> None:
    run = tmp_path_factory.mktemp("run")
    truth: dict[int, float] = {}
    for attempt, (start, length) in enumerate(spans):
        steps = range(start, start + length)
        _write(run, attempt, [(s, {"loss": float(attempt)}) for s in steps])
        truth = {s: v for s, v in truth.items() if s < start} | {s: float(attempt) for s in steps}
    assert {p.step: p.value for p in read_metrics(str(run), "dvae")["loss"]} == truth


def test_tensorboard_hides_the_lost_steps_too(tmp_path: Path) -> None:
    for attempt, steps in ((0, (1, 2, 3)), (1, (2, 3))):
        writer = MetricsWriter(str(tmp_path), "dvae", attempt)
        for step in steps:
            writer.scalars(step, {"loss": 10.0 * attempt + step})
        writer.close()
        next_second()
    assert _events(tmp_path, "dvae")["loss"] == [(1, 1.0), (2, 12.0), (3, 13.0)]


def test_a_rank_that_is_not_main_touches_no_file(tmp_path: Path) -> None:
    writer = MetricsWriter(str(tmp_path), "dvae", 0, enabled=False)
    writer.scalars(1, {"loss": 1.0})
    writer.images(1, "x", np.zeros((2, 2, 3), np.uint8))
    writer.text(1, "x", "y")
    writer.flush()
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_a_closed_writer_does_nothing_and_a_stage_without_metrics_has_none(tmp_path: Path) -> None:
    writer = MetricsWriter(str(tmp_path), "dvae", 0)
    writer.close()
    writer.close()
    writer.scalars(1, {"loss": 1.0})
    assert read_metrics(str(tmp_path), "dvae") == {}
    assert read_metrics(str(tmp_path), "clip") == {}
    assert next_attempt(str(tmp_path), "clip") == 0


def test_throughput_needs_time_to_pass() -> None:
    assert throughput(10, 4.0) == 2.5
    assert throughput(10, 0.0) == 0.0


def test_a_run_folder_on_s3_receives_lines_and_events_at_every_flush(s3: str) -> None:
    run = storage.join(s3, "runs", "a")
    writer = MetricsWriter(run, "dvae", 0)
    writer.scalars(1, {"loss": 1.0})
    writer.flush()
    assert [p.value for p in read_metrics(run, "dvae")["loss"]] == [1.0]
    assert len(storage.list_files(storage.join(run, "tensorboard", "dvae"))) == 1
    writer.scalars(2, {"loss": 2.0})
    assert writer._temporary is not None
    folder = Path(writer._temporary.name)
    writer.close()
    assert [p.value for p in read_metrics(run, "dvae")["loss"]] == [1.0, 2.0]
    assert not folder.exists()
    assert next_attempt(run, "dvae") == 1


def test_groups_of_tensorboard_are_read_from_the_top() -> None:
    names = ["data/samples", "numerics/scale/005-mlp", "perf/mfu", "optim/lr", "eval/psnr", "train/loss_image", "eval/loss", "train/nll", "new/thing"]
    assert sorted(map(shown_as, names)) == [
        "1 loss/eval loss",
        "1 loss/train loss_image",
        "2 validation/psnr",
        "3 training/nll",
        "4 optimizer/lr",
        "5 speed/mfu",
        "7 new/thing",
        "8 numerics/scale/005-mlp",
        "9 debug/samples",
    ]


def test_tensorboard_has_the_configuration_the_lineage_and_hyperparameters(tmp_path: Path) -> None:
    config = {"run": {"seed": 7}, "dalle_fit": {"lr": 0.001, "halve_at": [3, 4], "schedule": "cosine"}, "clip_fit": {"lr": 9.0}}
    writer = MetricsWriter(str(tmp_path), "dalle", 0)
    writer.describe(1, config, {"codes": "abc", "dvae": "def"})
    writer.scalars(1, {"train/loss": 2.0, "eval/loss": 3.0})
    writer.close()
    found = EventAccumulator(str(tmp_path / "tensorboard" / "dalle"))
    found.Reload()
    tags = found.Tags()
    assert sorted(tags["scalars"]) == ["1 loss/eval loss", "1 loss/train loss"], "hyperparameters bring no series of their own"
    said = {
        tag: [event.tensor_proto.string_val[0].decode() for event in found.Tensors(f"{tag}/text_summary")] for tag in ("configuration", "lineage")
    }
    assert '"lr": 0.001' in said["configuration"][-1] and said["lineage"][-1].split() == ["codes:", "abc", "dvae:", "def"]
    start = HParamsPluginData.FromString(found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content).session_start_info
    values = {name: value.number_value or value.string_value for name, value in start.hparams.items()}
    assert values == {"run.seed": 7.0, "dalle_fit.lr": 0.001, "dalle_fit.halve_at": "[3, 4]", "dalle_fit.schedule": "cosine"}
    assert not [path for path in (tmp_path / "tensorboard" / "dalle").iterdir() if path.is_dir()], "no run beside the run"


def test_losses_of_rows_stand_behind_the_mean() -> None:
    tags = sorted(map(shown_as, ("eval/loss_image_row_00", "eval/loss_image", "eval/psnr", "train/loss")))
    assert tags == ["1 loss/eval loss_image", "1 loss/train loss", "2 validation rows/loss_image_row_00", "2 validation/psnr"]


def test_no_two_metrics_share_a_tag() -> None:
    names = {name for panels in PANELS.values() for panel in panels for name, _ in panel.curves}
    names |= {
        f"{group}/{name}"
        for group in ("train", "eval", "sched", "optim", "perf", "data", "numerics", "goodput", "mem")
        for name in ("loss", "loss_x", "x")
    }
    assert len({shown_as(name) for name in names}) == len(names)


def test_the_custom_layout_has_the_report_s_plots_with_tags_that_are_written(tmp_path: Path) -> None:
    writer = MetricsWriter(str(tmp_path), "dalle", 0)
    writer.scalars(1, {"train/loss_image": 2.0, "eval/loss_image": 3.0, "train/loss_image_other": 3.0})
    writer.close()
    found = EventAccumulator(str(tmp_path / "tensorboard" / "dalle"))
    found.Reload()
    layout = layout_pb2.Layout.FromString(found.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}
    assert [category.title for category in layout.category] == ["Transformer"] and set(charts) == {panel.title for panel in PANELS["dalle"]}
    matched = {tag for pattern in charts["image loss (nats per code)"] for tag in found.Tags()["scalars"] if re.match(pattern, tag)}
    assert matched == {"1 loss/train loss_image", "1 loss/eval loss_image"}, "and no longer name"


def test_a_histogram_keeps_its_bins_and_an_empty_one_is_not_written(tmp_path: Path) -> None:
    writer = MetricsWriter(str(tmp_path), "dvae", 0)
    writer.histogram(3, "eval/uses", [0.5, 1.5, 2.5, 3.5], [0, 5, 0, 1])
    writer.histogram(4, "eval/uses", [0.5, 1.5], [0, 0])
    writer.close()
    found = EventAccumulator(str(tmp_path / "tensorboard" / "dvae"))
    found.Reload()
    (event,) = found.Histograms("2 validation/uses")
    value = event.histogram_value
    assert (event.step, value.num, value.min, value.max) == (3, 6, 0.5, 3.5)
    assert dict(zip(value.bucket_limit, value.bucket, strict=True))[1.5] == 5


class Dies(Nothing):
    """A loader that fails in its eighth update."""

    left = 7

    def next(self) -> dict[str, Any]:
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("killed")
        return super().next()


def test_a_run_that_died_and_goes_on_has_each_step_once_in_tensorboard(tmp_path: Path) -> None:
    first = fit_of(tmp_path, [APPLIED] * 10, [1.0], keep=9)
    first.loader = Dies()
    with pytest.raises(RuntimeError, match="killed"):
        first.run_to_end()
    first._writer._events.flush()  # what had come to the disk of it
    first._saver.wait()  # of update 6, which a thread writes
    folder = checkpoint.folder(str(tmp_path / "toy"), 6)
    shutil.rmtree(folder)  # so that update 5 to 7 are made again
    next_second()
    fit_of(tmp_path, [APPLIED] * 10, [2.0]).run_to_end()
    found = EventAccumulator(str(tmp_path / "tensorboard" / "toy"))
    found.Reload()
    curve = [(event.step, event.value) for event in found.Scalars("1 loss/train loss")]
    assert curve == [(step, 1.0 if step < 5 else 2.0) for step in range(1, 11)]
    assert len(list((tmp_path / "tensorboard" / "toy").iterdir())) == 2, "a file of each attempt"
