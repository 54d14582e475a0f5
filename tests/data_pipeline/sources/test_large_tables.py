"""A table of ten million rows in random order is sorted in bounded memory, and every image is one record. Soak: about 6 minutes and 3 GB of disk."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support.root import ROOT

_ROWS, _EACH = 10_000_000, 5
_READ = """
import resource, sys
from data_pipeline.config import DataConfig, SourceConfig
from data_pipeline.sources.open_source import open_source
source = open_source(SourceConfig(url=sys.argv[1]), DataConfig())
shards = list(source.shards())
table = source.table(shards[0].name.rpartition("@")[0], shards[0].version)
some = shards[:: max(1, len(shards) // 100)]
records = [len(draft.pair.captions) for shard in some for draft in table.drafts(*shard.span)]
print(len(records) * len(shards) / len(some), min(records), max(records), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_ten_million_rows_in_any_order_take_less_than_a_gigabyte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    order = np.random.default_rng(0).permutation(_ROWS)
    with (tmp_path / "all.tsv").open("w") as file:
        file.write("filepath\ttitle\n")
        for start in range(0, _ROWS, 100_000):
            rows = order[start : start + 100_000].tolist()
            file.write("".join(f"images/{row // _EACH:09d}.jpg\tcaption {row % _EACH} of picture {row // _EACH}\n" for row in rows))
    done = subprocess.run([sys.executable, "-c", _READ, str(tmp_path / "all.tsv")], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    records, fewest, most, peak_mb = map(float, done.stdout.split())
    assert abs(records / (_ROWS / _EACH) - 1) < 0.05, "one record for each image"
    assert (fewest, most) == (_EACH, _EACH) and peak_mb < 1000
