"""The page to type captions into, asked as a browser asks it. Seconds: about 8."""

from __future__ import annotations

import base64
import io
import json
import re
import socket
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from werkzeug.serving import make_server
from werkzeug.test import Client

from infra.errors import ConfigError
from infra.signals import StopFlag
from tests.support import drawable_run
from tests.support.browser import PHONE, needs_browser, opened
from tests.support.patience import PATIENCE_S
from tests.support.root import ROOT
from train.drawing.page import MOST, Page
from train.drawing.pictures import load
from train.drawing.source import Models, open_models
from train.verbs import play


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return drawable_run.make(str(tmp_path_factory.mktemp("runs") / "mine"), "dalle_fit.caption_dropout=0.1").url


@pytest.fixture(scope="module")
def models(url: str) -> Models:
    return open_models(url, rerank="clip")


def asked(models: Models, **fields: Any) -> list[dict[str, Any]]:
    response = Client(Page(models)).post("/draw", data={"caption": "a red fox", "n": "3"} | fields)
    assert response.status_code == 200
    return [json.loads(line) for line in response.text.splitlines()]


def pixels(message: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(message["url"].split(",", 1)[1]))))


def test_candidates_appear_row_by_row_and_end_ranked_as_draw_ranks_them(url: str, models: Models) -> None:
    *partial, last = asked(models, seed="5")
    assert [message["rows"] for message in partial] == sorted({message["rows"] for message in partial}) and len(partial) >= 3
    for message in partial:
        top = message["rows"] * 4  # pixels
        for picture in message["pictures"]:
            assert (pixels(picture)[top:] == 255).all(), "what is not drawn yet is white"
    assert any((pixels(picture)[:4] != 255).any() for picture in partial[1]["pictures"])
    wanted = load(url, rerank="clip").draw("a red fox", n=3, seed=5)
    assert [(picture["seed"], picture["score"]) for picture in last["pictures"]] == [(str(w.info["seed"]), w.info["score"]) for w in wanted]
    for picture, image in zip(last["pictures"], wanted, strict=True):
        assert (pixels(picture) == np.asarray(image)).all()
    assert last["said"].startswith("drew 3 pictures in ") and last["notes"] == []


def test_an_image_is_gone_on_from_and_captions_are_noted(tmp_path: Path, url: str, models: Models) -> None:
    file = drawable_run.picture_file(tmp_path / "given.png", (40, 30))
    with Path(file).open("rb") as image:
        *_, last = asked(models, caption="", n="1", keep_rows="2", image=(image, "given.png"))
    assert "is empty" in last["notes"][0]
    (wanted,) = load(url).draw("", n=1, image=file, keep_rows=2)
    assert (pixels(last["pictures"][0]) == np.asarray(wanted)).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n": "many"}, "a field that takes a number holds something else"),
        ({"n": str(MOST + 1)}, f"the page draws up to {MOST}; 'launcher.py draw' draws any number"),
        ({"temperature": "-1"}, "temperature = -1.0: must be above 0"),
        ({"keep_rows": "2"}, "rows to keep were given without an image"),
        ({"image": (io.BytesIO(b"\x89PNG\r\n\x1a\n" + bytes(50)), "broken.png")}, "image cannot be decoded"),
        ({"image": (io.BytesIO(bytes(65 << 20)), "huge.png")}, "the image is larger than 64 MB"),
    ],
)
def test_what_cannot_be_drawn_is_said_on_the_page(models: Models, fields: dict[str, Any], message: str) -> None:
    (found,) = asked(models, **fields)
    assert message in found["error"]


def test_the_page_shows_the_lineage_and_asks_for_nothing_outside(models: Models) -> None:
    response = Client(Page(models, 2.0)).get("/")
    assert models.lineage["dalle"][:12] in response.text and 'value="2"' in response.text and "ABOUT" not in response.text
    assert not re.search(r"(src|href)=\"(?!data:)", response.text) and "http" not in response.text
    assert response.headers["Content-Security-Policy"].startswith("default-src 'none'")


def test_other_names_other_sites_and_other_places_are_turned_away(models: Models) -> None:
    client = Client(Page(models))
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 403
    assert client.post("/draw", data={"caption": "x"}, headers={"Origin": "http://evil.example"}).status_code == 403
    assert client.get("/etc/passwd").status_code == 404 and client.get("/draw").status_code == 404
    assert Client(Page(models, only_local=False)).get("/", headers={"Host": "studio.example"}).status_code == 200


def test_a_drawing_that_its_reader_has_left_ends_and_the_next_one_begins(models: Models) -> None:
    response = Client(Page(models)).post("/draw", data={"caption": "a red fox", "n": "2"}, buffered=False)
    page = Page(models)
    messages = page._draw({"caption": "a red fox", "n": "2"}, b"")
    assert "rows" in next(messages)
    messages.close()  # type: ignore[attr-defined]
    assert response.status_code == 200
    assert list(page._draw({"caption": "a blue house", "n": "1"}, b""))[-1]["done"]


def test_play_serves_the_page_until_a_signal_comes(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    stop = StopFlag()
    thread = threading.Thread(target=play.main, args=(url, "127.0.0.1", 0, "none", "cpu", "auto", stop))
    thread.start()
    said = ""
    while "open http" not in said and thread.is_alive():
        said += capsys.readouterr().out
    address = re.search(r"http://\S+/", said)
    assert address is not None
    with urllib.request.urlopen(address[0]) as answer:
        assert b"what to draw" in answer.read()
    stop.handle(2, None)
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


def test_a_taken_port_is_refused(url: str) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(ConfigError, match=r"--host 127.0.0.1 --port \d+: this address cannot be served .*--port 0 takes a free one"):
            play.main(url, "127.0.0.1", other.getsockname()[1], "none", "cpu", "auto", StopFlag())


@needs_browser
def test_a_phone_s_browser_draws_goes_on_from_a_photo_and_shows_what_went_wrong(models: Models, tmp_path: Path) -> None:
    server = make_server("127.0.0.1", 0, Page(models), threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Image.new("RGB", (40, 30), (200, 30, 30)).save(tmp_path / "photo.png")
    try:
        with opened(f"http://127.0.0.1:{server.server_port}/", PHONE) as page:
            page.fill("#caption", "a red fox")
            page.click("text=Draw")
            page.wait_for_selector("#said:has-text('drew 4 pictures')")
            assert page.locator("figure img").count() == 4
            assert all(page.eval_on_selector_all("figure img", "found => found.map(img => img.naturalWidth > 0)"))
            assert page.evaluate("document.documentElement.scrollWidth") <= PHONE[0], "nothing lies beyond the right edge"
            page.set_input_files("#image", tmp_path / "photo.png")
            page.fill("[name=n]", "2")
            page.click("text=Draw")
            page.wait_for_selector("#said:has-text('drew 2 pictures')")
            assert page.locator("figure").count() == 2
            page.fill("[name=keep_rows]", "99")
            page.click("text=Draw")
            page.wait_for_selector("#said.error")
            assert "rows" in page.inner_text("#said")
    finally:
        server.shutdown()


def test_the_command_line_names_a_run_that_is_none(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(ROOT / "launcher.py"), "play", str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 78 and done.stderr.splitlines()[-1].startswith("config error:") and "neither a run folder nor a package" in done.stderr
