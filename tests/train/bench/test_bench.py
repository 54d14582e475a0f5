"""The benchmark harness: measuring, the schema, the table and the generated page. Seconds: about 5."""

import ast
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model.config import StreamShape, TransformerConfig
from tests.support.root import ROOT
from train.bench import docs, floor, harness, model, peer_dalle, table
from train.bench.docs import check
from train.bench.harness import Result, to_json, write
from train.machine import rates
from train.machine.rates import Figure, Options, copy_rate, matmul_rate, measure, probe, threads
from train.verbs import bench as bench_verb

QUICK = Options(device="cpu", seconds=0.02, runs=2)


def result(**changes: Any) -> Result:
    found = harness.start("floor", "Floors", QUICK, threads=1)
    found.measured["a"] = Figure(3.0, 2.0, 4.0, "GB/s", 2)
    found.floor["b"] = Figure(6.0, 6.0, 6.0, "GB/s", 2)
    found.ratio("a over b", "a", "b", goal=0.8)
    return replace(found, **changes)


def test_a_rate_is_the_amount_over_the_time_and_the_median_lies_between_the_extremes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 10.0, 14.0, 20.0, 22.0])
    monkeypatch.setattr(rates, "now", lambda device: next(clock))
    calls = []
    found = measure(lambda: calls.append(1), 8.0, "GB/s", Options(device="cpu", seconds=0.3, runs=3))
    assert found == Figure(value=4.0, min=2.0, max=8.0, unit="GB/s", runs=3)
    assert len(calls) == 4, "one call warms up"


def test_a_run_lasts_as_long_as_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(1000))
    monkeypatch.setattr(rates, "now", lambda device: float(next(ticks)))
    calls = []
    found = measure(lambda: calls.append(1), 3.0, "x", Options(device="cpu", seconds=10.0, runs=1))
    assert len(calls) == 1 + 10
    assert found.value == 3.0 * 10 / 10.0


def test_probes_find_positive_rates_and_leave_the_number_of_threads_alone() -> None:
    before = torch.get_num_threads()
    with threads(before + 1):
        assert torch.get_num_threads() == before + 1
        assert matmul_rate(torch.float32, QUICK, size=(64, 64, 64)).value > 0
        assert copy_rate(QUICK).value > 0
    assert torch.get_num_threads() == before


def test_the_probe_of_precisions_is_quick_and_counts_floating_point_operations() -> None:
    began = rates.now("cpu")
    found = probe(0.2)
    assert rates.now("cpu") - began < 30
    assert set(found) == {"fp32", "bf16"}
    # A matrix product of this size in 0.1 GFLOP/s would take 10 s, in 100,000 GFLOP/s 10 us: no processor does either.
    assert all(0.1 < rate < 100_000 for rate in found.values())


def test_a_result_is_valid_reads_back_equal_and_goes_where_its_device_says(tmp_path: Path) -> None:
    found = result()
    path = write(found, tmp_path)
    value = json.loads(path.read_text())
    check(value)
    assert value["ratios"]["a over b"] == {"value": 0.5, "of": "a", "to": "b", "goal": 0.8}
    assert path.name.startswith("floor-") and path.name == path.name.lower() and " " not in path.name
    assert write(found, tmp_path) == path
    assert value["device"]["name"] and value["versions"]["torch"] == torch.__version__


def test_a_result_names_no_path_of_the_machine() -> None:
    assert str(Path.home()) not in to_json(result()) and str(ROOT) not in to_json(result())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "bench/0"}, r"\$\.schema: 'bench/1' was expected"),
        ({"commit": 3}, r"\$\.commit: 3 is not of type 'string'"),
        ({"extra": 1}, r"\$: Additional properties are not allowed \('extra' was unexpected\)"),
        ({"floor": {"b": {"value": 1.0}}}, r"\$\.floor\.b: '(min|max|unit|runs)' is a required property"),
        ({"notes": ["a", None]}, r"\$\.notes\[1\]: None is not of type 'string'"),
        ({"ratios": {"r": {"value": True, "of": "a", "to": "b", "goal": None}}}, r"\$\.ratios\.r\.value: True is not of type 'number'"),
        ({"ratios": {"r": {"value": 1, "of": "a", "to": "b", "goal": "x"}}}, r"goal: 'x' is not of type 'number', 'null'"),
    ],
)
def test_a_file_that_is_no_result_is_refused_with_the_place_and_what_is_expected(change: dict[str, Any], message: str) -> None:
    value = json.loads(to_json(result())) | change
    with pytest.raises(ValueError, match=message):
        check(value)


def test_a_ratio_of_a_figure_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="ratio 'x': no figure 'c'; there are a, b"):
        result().ratio("x", "a", "c")


def test_an_unknown_benchmark_is_refused_and_every_listed_one_can_run() -> None:
    with pytest.raises(ValueError, match=r"benchmark .flor. is not known; accepted: .*floor.*memory, model, open-set, optimizer"):
        table.run("flor")
    for name in table.BENCHES:
        source = (ROOT / (table.BENCHES[name].replace(".", "/") + ".py")).read_text()
        assert "def run(options: Options) -> Result:" in source and "main(run)" in source


def test_the_floor_has_a_rate_for_each_dtype_and_thread_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floor, "matmul_rate", lambda dtype, options, size: matmul_rate(dtype, options, size=(64, 64, 64)))
    monkeypatch.setattr(floor.os, "cpu_count", lambda: 2)
    found = floor.run(QUICK)
    check(json.loads(to_json(found)))
    assert {f"matmul {name}, {count}" for name in ("fp32", "bf16", "fp16") for count in ("1 thread", "2 threads")} <= set(found.measured)
    assert {"copy, 1 thread", "copy, 2 threads"} <= set(found.measured)


def test_the_stall_of_a_save_is_measured_on_the_real_engine_and_saver(monkeypatch: pytest.MonkeyPatch) -> None:
    from train.bench import checkpoint  # DeepSpeed takes seconds to import

    monkeypatch.setattr(checkpoint, "PRESETS", {"cpu": ("tiny", "fp32")})
    monkeypatch.setattr(checkpoint, "BETWEEN", 2)
    monkeypatch.setattr(checkpoint, "LARGE", 1 << 12)
    plain, wait = checkpoint.Checkpointer.settle, checkpoint.Checkpointer.wait

    def slow(saver: Any) -> float:
        time.sleep(0.02)
        return plain(saver) + 0.02

    def slow_wait(saver: Any) -> None:
        time.sleep(0.1)
        wait(saver)

    monkeypatch.setattr(checkpoint.Checkpointer, "settle", slow)
    monkeypatch.setattr(checkpoint.Checkpointer, "wait", slow_wait)
    found = checkpoint.run(QUICK)
    check(json.loads(to_json(found)))
    assert found.measured["update"].min > 20 and found.measured["stall of a save"].min >= 20
    assert found.ratios["an update over a save's stall"].goal == 50 and found.settings["checkpoint_megabytes"] > 0
    assert found.measured["cost of a save"].runs == found.settings["saves"] == 4 * QUICK.runs
    assert found.measured["cost of a save"].value > 150, "what the writing takes beyond the updates counts"
    assert found.measured["cost of a save at most"].value >= found.measured["stall of a save"].value
    assert {"plain reading, from storage", "plain reading, from memory"} <= set(found.floor)
    assert (
        found.ratios["plain reading of 1 MB over a restore, from storage"].goal == 0.5
        and found.measured["restore, from storage"].runs == checkpoint.READINGS
    )


CFG = TransformerConfig(layers=2, width=32, heads=2, conv_kernel=3)
SHAPES = tuple(StreamShape(text_tokens=8, text_vocab=64, grid=grid, image_vocab=16) for grid in (4, 8))


def test_the_model_benchmark_compares_with_the_floor_and_the_peer_of_its_own_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer is a stand-in, so that its place in the result is tested where it is not installed."""
    asked = []

    def step(cfg: object, shape: StreamShape, batch: int, dtype: torch.dtype, device: str, attention: tuple[str, ...]) -> Any:
        asked.append((shape.grid, dtype, attention))
        a = torch.randn(64, 64)
        return lambda: a @ a

    monkeypatch.setattr(peer_dalle, "find", lambda package: Path("somewhere"))
    monkeypatch.setattr(peer_dalle, "training_step", step)
    found = model.compare(CFG, SHAPES, 2, QUICK, ((CFG, SHAPES[0], 2),))
    check(json.loads(to_json(found)))
    for name in ("fp32", "bf16"):
        ratio = found.ratios[f"share of the matrix rate, {name}, 8+16 states"]
        assert ratio.value == found.measured[f"useful arithmetic {name}, 8+16 states"].value / found.floor[f"matmul {name}"].value
        assert 0 < ratio.value < 1.5
    assert [(grid, dtype) for grid, dtype, _ in asked[:4]] == [(4, torch.float32), (4, torch.bfloat16)] * 2
    assert len(asked) == 4 + 2 and len({dtype for _, dtype, _ in asked[4:]}) == 1, "the slower dtype is not tried again"
    versus = found.ratios["ours over dalle-pytorch at its best, 8+64 states"]
    assert versus.goal == 3.0 and found.peers[versus.to].value == max(f.value for n, f in found.peers.items() if n.endswith("8+64 states"))
    assert "attention structured fp32, 8+4x4 states, heads of 16, layers 1 row 1 conv" in found.measured


def test_without_the_peer_the_model_benchmark_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_dalle, "folders", lambda: [])
    found = model.compare(CFG, SHAPES[:1], 2, QUICK)
    assert not found.peers and not any("dalle-pytorch" in name for name in found.ratios)
    with pytest.raises(ValueError, match="dalle_pytorch is not installed: run 'make bench-peers', or set PEERS"):
        peer_dalle.load()


def test_the_peers_pattern_is_ours_in_its_words() -> None:
    assert peer_dalle.attention_pattern(6) == ("axial_row", "axial_col", "axial_row", "axial_row", "axial_row", "conv_like")


@pytest.mark.skipif(peer_dalle.find("dalle_pytorch") is None, reason="dalle_pytorch is not installed (make bench-peers)")
@pytest.mark.parametrize("attention", [("full",), peer_dalle.attention_pattern(2)])
def test_the_peer_trains(attention: tuple[str, ...]) -> None:
    shape = StreamShape(text_tokens=8, text_vocab=64, grid=4, image_vocab=16)
    peer_dalle.training_step(TransformerConfig(layers=2, width=64, heads=2), shape, 2, torch.bfloat16, "cpu", attention)()


def test_peers_are_looked_for_where_the_environment_says_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PEERS", str(tmp_path))
    assert peer_dalle.find("dalle_pytorch") is None
    (tmp_path / "dalle_pytorch").mkdir()
    (tmp_path / "dalle_pytorch" / "__init__.py").touch()
    assert peer_dalle.find("dalle_pytorch") == tmp_path


def test_the_page_shows_medians_ranges_ratios_and_goals_of_every_file_and_nothing_else(tmp_path: Path) -> None:
    write(result(), tmp_path)
    write(result(device={"kind": "cuda", "name": "GPU X", "cores": 132}, notes=["A note."]), tmp_path)
    page = docs.render(tmp_path)
    assert page.count("| a | measured | 3 | 2 – 4 | GB/s |") == 2
    assert page.count("| a over b | a | b | 0.50 | 0.80 |") == 2
    assert "### GPU X" in page and "132 multiprocessors" in page and "A note." in page
    assert page.count("## Floors\n") == 1
    assert page.count("| a over b | 0.50 | 0.80 |") == 2 and page.index("## Open goals") < page.index("## Floors"), "below its goal on both"
    assert "Not measured on a GPU yet, so that their goals are open: checkpoint," in page
    assert "###" not in docs.render(tmp_path / "empty")


def test_the_best_that_is_known_stands_beside_recorded_ratios_and_a_ratio_that_nobody_recorded_is_refused(tmp_path: Path) -> None:
    write(result(device={"kind": "cpu", "name": "CPU X", "cores": 2}), tmp_path)
    row = '[[row]]\nwhat = "speed"\nbest = "0.78"\nsource = "a paper"\nours = [["floor", "{}"]]\n'
    (tmp_path / "best_known.toml").write_text(row.format("a over b"))
    page = docs.render(tmp_path)
    assert "| speed | 0.78 | a paper | a over b: 0.50 (CPU X, 2" in page and page.index("## Best known") < page.index("## Floors"), page
    for broken in (row.format("b over a"), "row = 3", "[[row]]\nwhat = 'x'\n", "[[row", "row = [3]"):
        (tmp_path / "best_known.toml").write_text(broken)
        with pytest.raises(ValueError, match=r"best_known\.toml: (no result of the benchmark 'floor' has a ratio 'b over a'|not a table)"):
            docs.render(tmp_path)


def test_a_damaged_file_of_results_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match=r"x\.json: no result of a benchmark \(.*run the benchmark again"):
        docs.render(tmp_path)


def test_the_committed_page_and_schema_are_those_that_the_committed_files_give() -> None:
    assert (ROOT / "docs/benchmarks.md").read_text() == docs.render(ROOT / "docs/benchmarks"), "run: python -m train.bench.docs"
    assert (ROOT / "docs/benchmarks.schema.json").read_text() == docs.schema_text(), "run: python -m train.bench.docs"


def test_benchmarks_of_models_import_nothing_but_torch_the_standard_library_and_model() -> None:
    others = (
        "train.machine.rates",
        "train.machine.attention_times",
        "train.planning.flops",
        "train.planning.hardware",
        "train.machine.live_bytes",
        "infra.repository",
    )
    for path in [*sorted((ROOT / "train" / "bench").glob("*.py")), *(ROOT / f"{name.replace('.', '/')}.py" for name in others)]:
        if path.name.startswith("data_") or path.name in (
            "photographs.py",
            "checkpoint.py",
            "docs.py",
            "best_known.py",
            "kernels.py",
            "watching.py",
            "open_set.py",
            "compression.py",
            "samples.py",
            "plan.py",
            "generated.py",
            "flex_kernels.py",
            "dvae_kernels.py",
        ):
            continue  # what they measure needs NumPy and the data pipeline, or DeepSpeed; docs.py and best_known.py render pages, those of kernels ask Triton, watching.py runs the trainer, open_set.py opens a set, compression.py, samples.py and plan.py run the engine's
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                known = (
                    name.split(".")[0] in sys.stdlib_module_names
                    or name.split(".")[0] in ("torch", "model")
                    or name.startswith("train.bench")
                    or name.startswith(others)
                    or name
                    in (
                        "train.machine",
                        "train.planning",
                        "train.optimizer.adamw",
                        "train.optimizer.number_formats",
                    )  # packages of docstrings, and what imports torch alone
                )
                assert known, f"{path.name} imports {name}; benchmarks run where only torch is installed"


def test_the_command_line_of_a_benchmark_passes_its_options_and_prints_and_writes_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[Options] = []

    def run(options: Options) -> Result:
        given.append(options)
        return result()

    monkeypatch.setattr(sys, "argv", ["bench", "--device", "cpu", "--seconds", "0.5", "--runs", "3", "--out", str(tmp_path)])
    harness.main(run)
    (path,) = tmp_path.glob("*.json")
    assert given == [Options("cpu", 0.5, 3, tmp_path)]
    assert capsys.readouterr().out.startswith(path.read_text())


def test_a_benchmark_that_is_cut_leaves_the_figures_that_it_has_and_one_that_ends_its_result_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = replace(QUICK, folder=tmp_path)
    found = harness.start("floor", "Floors", options, threads=1)
    assert not list(tmp_path.iterdir()), "nothing is measured yet"
    found.floor["b"] = Figure(6.0, 6.0, 6.0, "GB/s", 2)
    found.measured |= {"a": Figure(3.0, 2.0, 4.0, "GB/s", 2)}
    found.peers["c"] = Figure(1.0, 1.0, 1.0, "GB/s", 2)
    (path,) = tmp_path.iterdir()
    kept = json.loads(path.read_text())
    assert path.name.endswith(harness.UNFINISHED) and kept["notes"] == ["Unfinished: the figures so far."] and not found.notes
    assert set(kept["floor"]) | set(kept["measured"]) | set(kept["peers"]) == {"a", "b", "c"}
    assert "a: 3 GB/s (2 to 4)" in capsys.readouterr().err
    found.ratio("a over b", "a", "b")
    path = write(found, tmp_path)
    assert list(tmp_path.iterdir()) == [path] and path.read_text() == to_json(found)


def test_a_word_that_names_begin_with_runs_them_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def run(name: str, options: Options) -> Result:
        ran.append(name)
        return result()

    monkeypatch.setattr(table, "run", run)
    bench_verb.main("data", str(tmp_path), 0.1)
    bench_verb.main("floor", str(tmp_path), 0.1)
    assert ran == ["data-codes", "data-images", "floor"]
    ran.clear()
    bench_verb.main("all", str(tmp_path), 0.1)
    assert ran == list(table.BENCHES)
