"""Pictures of a run folder come from strangers, too: they start no program, take no more memory than a picture may, and damage costs their section alone. About 3 s."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import EpsImagePlugin, Image, PngImagePlugin

from tests.support.fake_run import fake_run
from train.report import section_reconstructions
from train.report.images import data_uri, read_grid, read_png
from train.report.page import section_or_error
from train.report.view import RunView, Section


def bomb(side: int) -> bytes:
    """A PNG of side x side grey pixels, a thousandth of their size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(1)
    rows = b"".join([*(packer.compress(bytes(1 + side)) for _ in range(side)), packer.flush()])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def laid_out(layout: Any) -> bytes:
    """A small picture whose text chunk claims to lay out a grid."""
    info, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    info.add_text("dalle-grid", layout if isinstance(layout, str) else json.dumps(layout))
    Image.new("RGB", (64, 64)).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


GRID = {"tile_width": 8, "tile_height": 8, "pad": 0, "tops": [0], "columns": [2], "labels": ["x"]}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"columns": [1 << 40]}, r"columns\.0: input should be less than or equal to 4096"),
        ({"columns": [4096]}, "that do not lie in its 64 x 64 pixels"),
        ({"tops": [60]}, "that do not lie in its 64 x 64 pixels"),
        ({"tops": [0] * 5000, "columns": [1] * 5000}, "tops: list should have at most 4096 items"),
        ({"tile_width": 0}, "tile_width: input should be greater than or equal to 1"),
        ({"tile_width": "8"}, "tile_width: input should be a valid integer"),
        ({"labels": 5}, "labels: input should be a valid list"),
    ],
)
def test_a_layout_that_no_grid_has_is_refused_by_its_field(changed: dict[str, Any], message: str) -> None:
    found = read_grid(laid_out(GRID))
    assert found is not None and [tile.shape for tile in found.rows[0]] == [(8, 8, 3), (8, 8, 3)]
    with pytest.raises(Exception, match=message):
        read_grid(laid_out(GRID | changed))


def test_a_picture_in_a_format_for_which_pillow_starts_a_program_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *given: started.append(given))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n" + b"% \n" * 60_000 + b"%%EOF\n"
    assert len(eps) > 150_000, "large enough to be encoded anew for the page"
    for read in (read_png, data_uri, read_grid):
        with pytest.raises(ValueError, match="are not a picture"):
            read(eps)  # type: ignore[operator]
    assert not started


def test_a_picture_of_more_pixels_than_a_page_can_need_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(ValueError, match=r"9000 x 9000 pixels: at most 67,108,864 are accepted"):
        read_png(bomb(9000))


@pytest.mark.parametrize("data", [pytest.param(laid_out("[" * 100_000), id="deep JSON"), pytest.param(bomb(14_000), id="beyond Pillow's own limit")])
def test_what_a_picture_holds_costs_its_section_and_not_the_page(data: bytes, tmp_path: Path) -> None:
    run = fake_run(tmp_path / "run")
    for path in (run / "dvae").rglob("*.png"):
        path.write_bytes(data)
    found = section_or_error("report", "reconstructions", lambda: section_reconstructions.section(RunView(str(run))))
    assert found is not None and "This section cannot be shown" in found.body


@pytest.mark.parametrize(
    "error", [OverflowError("too large"), ElementTree.ParseError("no XML"), RecursionError("too deep"), ZeroDivisionError("by zero")]
)
def test_whatever_damage_raises_costs_its_section_and_not_the_page(error: Exception) -> None:
    def section() -> Section | None:
        raise error

    found = section_or_error("report", "curves", section)
    assert found is not None and f"This section cannot be shown: {error}" in found.body
