"""A page as a person sees it: headless Chromium, driven by playwright. Debian's package; CI installs it where apt-get can."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from playwright.sync_api import sync_playwright

_NAMES = ("chromium", "chromium-browser", "google-chrome", "headless_shell")
_QUIET = ("background-networking", "component-update", "sync", "quic", "gpu")
PHONE, SCREEN = (390, 844), (1280, 900)
"""Width and height in pixels."""

BROWSER = next(filter(None, map(shutil.which, _NAMES)), None)
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason=f"no browser is installed ({', '.join(_NAMES)}); .ci/run installs chromium where apt-get can"
)


@contextmanager
def opened(url: str, size: tuple[int, int] = SCREEN) -> Iterator[Any]:
    """A playwright page on which ``url`` has been loaded; an uncaught error of its scripts fails the test at the end."""
    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in _QUIET)]
        browser = playwright.chromium.launch(executable_path=BROWSER, args=options)
        try:
            page = browser.new_page(viewport={"width": size[0], "height": size[1]})
            errors: list[str] = []
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.goto(url)
            yield page
            assert not errors, errors
        finally:
            browser.close()
