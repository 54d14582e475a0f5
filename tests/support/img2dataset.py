"""What img2dataset writes, reproduced from its writers (version 1.47): names, members, columns and their order, with failed downloads."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from PIL import Image


@dataclass(frozen=True)
class Row:
    """One line of the list that was downloaded."""

    key: str
    caption: str
    colour: str
    """Empty: the download failed."""

    @cached_property
    def image(self) -> bytes | None:
        if not self.colour:
            return None
        out = io.BytesIO()
        Image.new("RGB", (32, 32), self.colour).save(out, "JPEG")
        return out.getvalue()

    @property
    def sha256(self) -> str | None:
        return hashlib.sha256(self.image).hexdigest() if self.image else None

    @property
    def meta(self) -> dict[str, Any]:
        size = 32 if self.image else None
        return {
            "caption": self.caption,
            "url": f"https://example.org/{self.key}.jpg",
            "key": self.key,
            "status": "success" if self.image else "failed_to_download",
            "error_message": None if self.image else "HTTP Error 404: Not Found",
            "width": size,
            "height": size,
            "original_width": size,
            "original_height": size,
            "exif": "{}" if self.image else None,
            "sha256": self.sha256,
        }


ROWS = (
    Row("000000000", "a red square", "red"),
    Row("000000001", "gone", ""),
    Row("000000002", "two lines,\nbut one caption", "green"),
    Row("000000003", "[not a list]", "blue"),
)
_STATS = {
    "count": 4,
    "successes": 3,
    "failed_to_download": 1,
    "failed_to_resize": 0,
    "duration": 1.0,
    "start_time": 0.0,
    "end_time": 1.0,
    "status_dict": {},
}


def webdataset(folder: Path) -> None:
    """``--output_format webdataset``."""
    with tarfile.open(folder / "00000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for row in ROWS:
            if row.image:  # the order in which webdataset's TarWriter sorts the keys of a sample
                for suffix, data in (("jpg", row.image), ("json", json.dumps(row.meta, indent=4).encode()), ("txt", row.caption.encode())):
                    info = tarfile.TarInfo(f"{row.key}.{suffix}")
                    info.size, info.mode, info.uname, info.gname = len(data), 0o444, "bigdata", "bigdata"
                    tar.addfile(info, io.BytesIO(data))
    _companions(folder)


def files(folder: Path) -> None:
    """``--output_format files``."""
    (folder / "00000").mkdir()
    for row in ROWS:
        if row.image:
            (folder / "00000" / f"{row.key}.jpg").write_bytes(row.image)
            (folder / "00000" / f"{row.key}.txt").write_text(row.caption)
            (folder / "00000" / f"{row.key}.json").write_text(json.dumps(row.meta, indent=4))
    _companions(folder)


def parquet(folder: Path) -> None:
    """``--output_format parquet``: the image is the last column, and failed rows have none."""
    rows = [{"key": row.key, "jpg": row.image, "txt": row.caption if row.image else None} | row.meta for row in ROWS]
    _write(folder, rows, [("jpg", pyarrow.binary())])
    (folder / "00000_stats.json").write_text(json.dumps(_STATS, indent=4))


def _companions(folder: Path) -> None:
    _write(folder, [row.meta for row in ROWS], [])
    (folder / "00000_stats.json").write_text(json.dumps(_STATS, indent=4))


def _write(folder: Path, rows: list[dict[str, Any]], more: list[Any]) -> None:
    numbers, strings = (
        ("width", "height", "original_width", "original_height"),
        ("caption", "url", "key", "status", "error_message", "exif", "sha256"),
    )
    fields = [(name, pyarrow.int32() if name in numbers else pyarrow.string()) for name in ROWS[0].meta if name in (*numbers, *strings)]
    with pyarrow.parquet.ParquetWriter(folder / "00000.parquet", pyarrow.schema([*fields, *more])) as writer:
        for start in range(0, len(rows), 2):  # img2dataset writes row groups of 100
            table = pyarrow.Table.from_pylist(rows[start : start + 2], pyarrow.schema([*fields, *more]))
            writer.write_table(table)
