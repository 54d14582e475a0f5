"""A storage or a network that breaks every file stops ``validate`` after some of them, and condemns none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.audit.alike import LIMIT, Alike
from infra import storage
from infra.errors import DataError
from infra.signals import StopFlag
from tests.support.validated_sets import images, problems_of
from train.verbs import validate
from train.verbs.validate import Options

PARTS = 8


def corrupted(url: str, local: Path) -> None:
    """As a network does that breaks every answer: the checksums of its storage say so, each in other words."""
    raise DataError(f"{url}: failed after 6 attempts (Expected checksum {hash(url)}); the object is damaged, or the network is.") from ValueError()


def changed(url: str, local: Path) -> None:
    """As one does whose storage keeps no checksums."""
    local.write_bytes(bytes(byte ^ 1 for byte in storage.read_bytes(url)))


@pytest.mark.parametrize("fault", [corrupted, changed])
def test_files_that_fail_alike_in_a_row_end_the_validation_and_are_not_to_be_deleted(
    s3: str, fault: Callable[[str, Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    images(f"{s3}/images", *[1] * PARTS)
    fetched = list[str]()

    def fetch(url: str, local: Path) -> None:
        fetched.append(url)
        fault(url, local)

    monkeypatch.setattr(storage, "download_file", fetch)
    with pytest.raises(DataError, match=r"/images/part-.*; so it was with \d+ files in a row.*Nothing needs to be deleted") as caught:
        validate.main(f"{s3}/images", Options(workers=1), StopFlag())
    assert LIMIT <= len(fetched) < LIMIT + 8 and "run the stage" not in str(caught.value), "to the end of a part at most"


def test_files_that_are_missing_or_damaged_among_sound_ones_are_all_named(s3: str, capsys: pytest.CaptureFixture[str]) -> None:
    made = images(f"{s3}/images", *[1] * PARTS)
    for part in made.parts[:4]:
        storage.delete_prefix(f"{s3}/images/{part['name']}")
    for part in made.parts[4:]:
        for name in ("ids.u64", "prints.u64"):
            place = f"{s3}/images/{part['name']}/{name}"
            storage.write_bytes(place, bytes(byte ^ 1 for byte in storage.read_bytes(place)))
    found = problems_of(f"{s3}/images", capsys)
    assert all(part["name"] in found for part in made.parts) and found.count("ids.u64 does not exist") == found.count("ids.u64 damaged") == 4


def test_what_processes_found_is_added_up_until_one_file_is_right() -> None:
    alike = Alike()
    for _ in range(2):
        alike.include(Alike("one", LIMIT // 2 - 1, "x: broken"))
    alike.include(Alike("", 0, "", sound=3))
    alike.include(Alike("one", LIMIT - 1, "x: broken"))
    alike.include(Alike("another", LIMIT - 1, "y: broken"))
    with pytest.raises(DataError, match=rf"y: broken; so it was with {LIMIT} files in a row"):
        alike.wrong("another", "y: broken")
