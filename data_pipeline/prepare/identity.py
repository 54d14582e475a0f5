"""The rule that gives records their ids and splits. A set has one rule; ids of two rules are never mixed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from data_pipeline.shards.schema import read_manifest
from data_pipeline.shards.shard_set import MANIFEST
from infra import storage
from infra.errors import DataError

if TYPE_CHECKING:
    from data_pipeline.prepare.plan import Plan

IDENTITY = "2: ids below their source; split by the group given, else by the bytes of the image"
"""The rule for records without an id and a group of their own. Manifests name it, unless the set holds drawings only, which have both."""


def check(plan: Plan, images_url: str) -> None:
    """Refuse to add to a set that was made by another rule.

    Raises:
        DataError: there is such a set, or its manifest is damaged.
    """
    place = storage.join(images_url, "train", MANIFEST)
    if not storage.exists(place):
        return
    settings = read_manifest(place)["settings"]
    made_by, sources = settings.get("identity", ""), settings.get("sources") or []
    if made_by == IDENTITY or all(source == "emoji" for source in sources):
        return
    raise DataError(
        f"{images_url}: this set was made by {f'rule {made_by!r}' if made_by else 'the rule by which ids are absolute paths'}, and this version makes sets by "
        f"{IDENTITY!r}. It can be read and trained on, but no records can be added: the same records would be in it twice, under two ids. Prepare it again in another "
        f"place: launcher.py prepare PRESET run.name=NEW data.images=PLACE 'data.sources={[entry.url for entry in plan.entries]}'."
    )
