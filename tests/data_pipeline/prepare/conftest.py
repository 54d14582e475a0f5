"""What tests of the stage prepare share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from data_pipeline.config import DataConfig, FilterConfig
from data_pipeline.prepare import plan as planning
from data_pipeline.prepare.plan import Plan, make_plan
from tests.support.shelf import Shelf


@pytest.fixture
def plan_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Plan]:
    """Plans over shelves."""

    def make(*shelves: Shelf, filters: dict[str, Any] | None = None, seed: int = 0, **fields: Any) -> Plan:
        by_url = {f"shelf-{number}": shelf for number, shelf in enumerate(shelves)}
        monkeypatch.setattr(planning, "open_source", lambda entry, data: by_url[entry.url])
        data = DataConfig.model_validate({"sources": list(by_url), "validation_share": 0.25} | fields, strict=False)
        return make_plan(data, FilterConfig.model_validate(filters or {}), 16, seed)

    return make
