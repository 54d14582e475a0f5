"""Pages that compare runs: curves, figures, pictures and keys side by side; lineage and cost of one run. About 5 s."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from infra import storage
from infra.errors import ConfigError, DataError, ExitCode, UsageError
from tests.support.browser import PHONE, SCREEN, needs_browser, opened
from tests.support.fake_run import disc, fake_run, write_json, write_metrics
from tests.train.report.test_report import Balance
from train.report import comparison, section_cost, section_lineage
from train.report.comparison import render
from train.report.images import png_bytes
from train.report.view import RunView
from train.run.stage_table import STAGES
from train.verbs import bench, compare, inspect

PARENTS = {
    "tokenizer": {"images": "aaaa" * 4},
    "dvae": {"images": "aaaa" * 4},
    "encode": {"dvae": "dddd" * 4},
    "dalle": {"codes": "cccc" * 4, "dvae": "dddd" * 4, "tokenizer": "eeee" * 4},
    "align": {"dalle": "1111" * 4},
    "generate": {"dalle": "ffff" * 4},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunView]:
    """Two finished runs that differ, and one that has only begun."""
    root = tmp_path_factory.mktemp("runs")
    first = fake_run(root / "demo")
    second = fake_run(root / "long", lambda number: disc(number + 3), ("an outlined drawing of a <b>dog</b>", "a house"))
    found = RunView(str(second))
    write_json(second / "config.json", found.config | {"dalle_fit": found.config["dalle_fit"] | {"steps": 3000, "lr": 0.01}})
    write_json(second / "evaluate/metrics.json", found.evaluation | {"psnr_db": 23.4})
    write_metrics(second, "dalle", 3000, 10, lambda step: {"train/loss_image": 6.0 - step / 1000})
    for run in (first, second):
        write_json(run / "align/done.json", RunView(str(run)).done("align") | {"weights": "ffff" * 4})
        for stage, parents in PARENTS.items():
            done = RunView(str(run)).done(stage)
            write_json(run / stage / "done.json", done | {"parents": parents})
    third = root / "begun"
    write_json(third / "config.json", found.config)
    write_metrics(third, "dalle", 100, 10, lambda step: {"train/loss_image": 6.2})
    write_metrics(third, "dvae", 100, 10, lambda step: {"eval/fid": 30.0})
    write_json(third / "dalle/samples/step-1/entry.json", {"step": 100, "pictures": [{"caption": "a house", "file": "dalle/samples/step-1/000.png"}]})
    (third / "dalle/samples/step-1/000.png").write_bytes(png_bytes(disc(4)))
    return {name: RunView(str(root / name)) for name in ("demo", "long", "begun")}


@pytest.fixture(scope="module")
def page(runs: dict[str, RunView]) -> str:
    return render(runs)


def _section(page: str, key: str) -> str:
    return page.partition(f'<section id="{key}">')[2].partition("</section>")[0]


def test_a_comparison_overlays_curves_marks_the_best_and_names_what_differs(page: str) -> None:
    found = Balance(page)
    assert not found.open and len(found.ids) == len(set(found.ids)) and all(link.startswith(("#", "data:")) for link in found.links)
    results = _section(page, "results")
    assert re.search(r"PSNR \(dB\)</td><td class=\"n\">20\.7</td><td class=\"n\"><b>23\.4</b></td><td class=\"n\"></td>", results)
    assert "3,000" in results and "100 so far" in results
    keys = _section(page, "configuration")
    rows = re.findall(r"<tr><td><code>([^<]+)</code></td><td>([^<]*)</td><td>([^<]*)</td><td>([^<]*)</td></tr>", keys)
    assert rows == [("dalle_fit.lr", "0.00045", "0.01", "0.00045"), ("dalle_fit.steps", "2000", "3000", "2000")]
    curve = next(each for each in _section(page, "curves").split("<figure") if "image loss (nats per code), training" in each)
    assert all(f"var(--s{number})" in curve for number in range(3)), "a colour for each run"
    alone = next(each for each in _section(page, "curves").split("<figure") if "text loss (nats per token), training" in each)
    assert ", training – demo alone<" in alone
    assert "var(--s0)" in alone and "var(--s1)" not in alone, "the first has it alone, and keeps its colour"
    last = next(each for each in _section(page, "curves").split("<figure") if "Fréchet distance of reconstructions, FID" in each)
    assert "var(--s2)" in last and "var(--s0)" not in last, "the last has it alone, and keeps its colour, too"
    pictures = _section(page, "pictures")
    assert pictures.count("<article") == 2 and "<h3>a house</h3>" in pictures and "a flat emoji of a red apple" not in pictures
    assert "begun * 100 updates" in pictures and "demo not drawn" in pictures and pictures.count("<img") == 3 + 3 + 3 + 1
    assert "<b>dog</b>" not in pictures


def test_figures_of_other_pictures_are_not_better_and_chance_stands_beside(tmp_path: Path) -> None:
    for name, images, codes, recall, chance, psnr in (("a", "i", "c", 0.5, 0.5, 12.0), ("b", "i", "d", 0.25, 0.02, 21.0)):
        run = fake_run(tmp_path / name)
        found = RunView(str(run)).evaluation | {"clip_recall_at_1": recall, "clip_chance": chance, "psnr_db": psnr, "image_ce_nats": psnr / 10}
        write_json(run / "evaluate/metrics.json", found | {"parents": {"images": images, "codes": codes}})
    results = _section(render({name: RunView(str(tmp_path / name)) for name in "ab"}), "results")
    assert 'share) ≠</td><td class="n">0.5 (chance 0.5)</td><td class="n">0.25 (chance 0.02)</td>' in results
    assert 'nats per code) ≠</td><td class="n">1.2</td><td class="n">2.1</td>' in results and "so no run is better" in results
    assert 'PSNR (dB)</td><td class="n">12</td><td class="n"><b>21</b></td>' in results, "dVAEs may be compared on the same pictures"


def test_figures_of_weights_that_a_run_no_longer_has_are_called_out_of_date(tmp_path: Path) -> None:
    """They stood beside the updates made since, as if they were theirs."""
    for name, old in (("a", "ffff"), ("b", "0000")):
        run = fake_run(tmp_path / name)
        for trained in ("dalle", "align"):
            write_json(run / trained / "export/config.json", {"content_hash": "ffff" * 4})
        write_json(run / "evaluate/done.json", RunView(str(run)).done("evaluate") | {"parents": {"dalle": old * 4}})
    results = _section(render({name: RunView(str(tmp_path / name)) for name in "ab"}), "results")
    assert re.findall(r"Out of date: [^<]*", results) == [
        "Out of date: b&#39;s evaluate was made from dalle 000000000000, the run has ffffffffffff; run it again."
    ]


def test_a_damaged_run_costs_its_section_and_runs_that_are_alike_say_so(runs: dict[str, RunView], tmp_path: Path) -> None:
    config = runs["demo"].config
    views = {name: _bare(tmp_path / name, config) for name in ("x", "y")}
    page = render(views)
    assert (
        "The runs have the same configuration." in page and "No caption was drawn by two" in page and "None of the runs has logged anything" in page
    )
    write_json(Path(views["y"].url) / "generate/index.json", [])
    page = render({name: RunView(view.url) for name, view in views.items()})
    assert "This section cannot be shown" in _section(page, "pictures") and "The runs have the same configuration." in page


def _bare(run: Path, config: object) -> RunView:
    write_json(run / "config.json", config)
    return RunView(str(run))


def test_report_with_several_runs_writes_a_comparison_here_and_refuses_what_is_none(
    runs: dict[str, RunView], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import launcher

    monkeypatch.chdir(tmp_path)
    url, other = (_bare(tmp_path / "runs" / name, runs["demo"].config).url for name in ("a", "b"))
    assert launcher.main(["report", url, other]) == ExitCode.DONE
    assert capsys.readouterr().out.strip() == "compare-a-b.html" and "a and b" in (tmp_path / "compare-a-b.html").read_text()
    long = [_bare(tmp_path / "runs" / (letter * 120), runs["demo"].config).url for letter in "cdé"]
    compare.main(long, [])
    assert re.fullmatch(r"compare-c{120}-d{79}-[0-9a-f]{8}\.html", capsys.readouterr().out.strip()), "no file's name is longer than 255 bytes"
    assert compare.others(["a.b=1", "runs/x", "s3://b/day=1/run", "dalle_fit.lr=3"]) == ["runs/x", "s3://b/day=1/run"]
    for urls in ([url, f"{url}/"], [f"{url}{number}" for number in range(comparison.MOST + 1)]):
        with pytest.raises(UsageError, match="a comparison takes two to 4 different run folders; given:"):
            compare.main(urls, [])
    with pytest.raises(UsageError, match=r"run\.seed=1: a comparison changes no run, so it takes run folders and no values of keys"):
        compare.main([url, other], ["run.seed=1"])
    with pytest.raises(DataError, match=r"config\.json is missing: nowhere is no run folder"):
        compare.main([url, "nowhere"], [])


def test_a_place_that_cannot_be_written_to_is_named_with_what_chooses_it(
    runs: dict[str, RunView], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The advice was run.root, which none of these commands writes to."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "compare-a-b.html").mkdir()  # no file can take its place, not even root's
    (tmp_path / "file").touch()
    url, other = (_bare(tmp_path / "runs" / name, runs["demo"].config).url for name in ("a", "b"))
    stands = (
        r"compare-a-b\.html: cannot be written \(Is a directory\); it is written to the folder where you stand: go to one that you may write to\.$"
    )
    with pytest.raises(ConfigError, match=stands):
        compare.main([url, other], [])
    for write in (lambda: bench.main("data", "file/x", 1.0), lambda: inspect._write_sheet("file/x.png", [None], [["a"]])):
        with pytest.raises(ConfigError, match=r"cannot be written \((Not a directory|File exists)\); choose a writable place with --out\.$"):
            write()
    with pytest.raises(ConfigError, match=r"choose a writable place, for example with run\.root\.$"):
        storage.write_text("file/x", "")


def test_the_graph_has_an_arrow_for_each_recorded_input_and_shows_what_is_open_or_old(runs: dict[str, RunView], tmp_path: Path) -> None:
    body = section_lineage.section(runs["demo"]).body  # type: ignore[union-attr]
    titles = re.findall(r"<g class=\"arrow\"><title>([^<]*)</title>", body)
    before = ["prepare to tokenizer: aaaaaaaaaa", "prepare to dvae: aaaaaaaaaa", "dvae to encode: dddddddddd", "encode to dalle: cccccccccc"]
    after = ["dvae to dalle: dddddddddd", "tokenizer to dalle: eeeeeeeeee", "dalle to align: 1111111111", "align to generate: ffffffffff"]
    assert sorted(titles) == sorted([*before, *after])
    assert body.count('class="box done"') == len(STAGES) - 1 and ">cccccccccc<" in body
    boxes = set(re.findall(r"<rect x=\"(\d+)\" y=\"(\d+)\"", body))
    assert len(boxes) == len(STAGES) - 1, "no two in one place"
    (Path(runs["demo"].url) / "clip/done.json").rename(tmp_path / "kept")
    try:
        assert section_lineage.section(RunView(runs["demo"].url)).body.count('class="box open"') == 1  # type: ignore[union-attr]
    finally:
        (tmp_path / "kept").rename(Path(runs["demo"].url) / "clip/done.json")
    assert "No stage has finished yet" in section_lineage.section(runs["begun"]).body  # type: ignore[union-attr]


def test_cost_and_energy_are_hours_times_processes_times_what_is_given(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "demo")
    config = RunView(str(run)).config
    for stage in STAGES:
        (run / stage / "done.json").unlink()
    write_json(run / "dvae/done.json", {"stage": "dvae", "seconds": 7200.0, "world_size": 4})

    def body(**given: object) -> str:
        write_json(run / "config.json", config | {"report": {"price": 0.0, "gpu": "", "watts": 0.0} | given})
        return section_cost.section(RunView(str(run))).body  # type: ignore[union-attr]

    write_json(run / "dvae/done.json", {"stage": "dvae", "seconds": 90.0, "world_size": 2})
    assert "minutes x processes" in body() and '<td class="n">3.00</td>' in body(), "a short run is not told in ten-thousandths of an hour"
    write_json(run / "dvae/done.json", {"stage": "dvae", "seconds": 7200.0, "world_size": 4})
    assert '<td class="n">8</td>' in body() and "kWh" not in body() and "report.price=2.5" in body()
    priced = body(price=2.5, gpu="H100")
    assert '<td class="n">20.00</td>' in priced and '<td class="n">8.96</td>' in priced and "H100-80GB: NVIDIA H100 SXM5 datasheet" in priced
    assert '<td class="n">0.832</td>' in body(watts=65), "8 hours of 65 W, 1.6 times"
    with pytest.raises(ValueError, match="accepted are"):
        body(gpu="GTX1")
    write_metrics(run, "dvae", 10, 10, lambda step: {"goodput/lost_s": 900.0})
    assert "not in the table: 1.00 hours x processes" in body()


@needs_browser
@pytest.mark.parametrize("size", [SCREEN, PHONE], ids=["screen", "phone"])
def test_the_page_fits_its_window(page: str, tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "page.html"
    path.write_text(page)
    with opened(f"file://{path}", size) as shown:
        assert shown.evaluate("document.documentElement.scrollWidth") <= size[0]
        assert shown.locator(".plot svg").first.bounding_box()["width"] > 200
