"""The web page on which captions can be entered (``launcher.py play``): candidates appear row by row while they are drawn, and are then ranked.

Only one drawing runs at a time, because it uses the whole machine; it ends if its browser disconnects. The page loads nothing from outside this process.
"""

from __future__ import annotations

import base64
import html
import json
import queue
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge
from werkzeug.wrappers import Request, Response

from data_pipeline.images.crops import decode as decode_image
from infra.errors import ReportedError, StopRequested, UsageError
from infra.text import counted
from train.drawing import prompt_image
from train.drawing.captions import notes
from train.drawing.draw import Batch, Picture, decode, draw, score
from train.drawing.settings import Settings
from train.drawing.source import Models
from train.report.images import Pixels, png_bytes

MOST = 64
"""The largest number of pictures that the page draws for one caption."""
_LARGEST_FORM = 64 << 20
_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:; connect-src 'self'; form-action 'self'"

Message = dict[str, Any]


class Page:
    """A WSGI application around a model."""

    def __init__(self, models: Models, guidance: float = 1.0, *, only_local: bool = True) -> None:
        """
        Args:
            models: the models to draw with; if they include a contrastive model, it ranks the candidates.
            guidance: the guidance scale that the page shows at first.
            only_local: answer only requests that name this machine as localhost or by its loopback address. This refuses pages of other sites whose name
                was made to resolve to this machine.
        """
        self.models, self.guidance, self.only_local = models, guidance, only_local
        self._drawing = threading.Lock()

    def __call__(self, environ: Any, start_response: Any) -> Any:
        request = Request(environ)
        request.max_content_length = _LARGEST_FORM
        try:
            response = self._answer(request)
        except RequestEntityTooLarge:
            response = _stream(iter([{"error": f"the image is larger than {_LARGEST_FORM >> 20} MB."}]))
        except HTTPException as error:
            response = Response(error.description, status=error.code)
        finally:
            request.close()  # an uploaded image was read, and a large one lies in a file
        response.headers["Content-Security-Policy"] = _POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Cache-Control"] = "no-store"
        return response(environ, start_response)

    def _answer(self, request: Request) -> Response:
        if self.only_local and request.host.rsplit(":", 1)[0] not in _NAMES:
            return Response("This page answers to localhost alone (launcher.py play --host).", status=403)
        if request.path == "/" and request.method == "GET":
            return Response(self._html(), mimetype="text/html")
        if request.path == "/draw" and request.method == "POST":
            if request.headers.get("Origin", request.host_url.rstrip("/")) != request.host_url.rstrip("/"):
                return Response("Only the page itself may ask for drawings.", status=403)
            return _stream(self._draw(request.form.to_dict(), request.files["image"].read() if "image" in request.files else b""))
        return Response("There is / and /draw.", status=404)

    def _html(self) -> str:
        models = self.models
        about = f"{models.url}: {models.description}, {models.device.type}, {models.precision}; " + ", ".join(
            f"{kind} {identity[:12]}" for kind, identity in sorted(models.lineage.items())
        )
        text = Path(__file__).with_suffix(".html").read_text()
        return text.replace("MOST", str(MOST)).replace("GUIDANCE", f"{self.guidance:g}").replace("ABOUT", html.escape(about))

    def _draw(self, form: dict[str, str], image: bytes) -> Iterator[Message]:
        """The messages of one drawing: after each row the candidates so far, and at the end all of them."""
        try:
            caption, settings = form.get("caption", ""), _settings(form)
            settings.check(self.models.cfg)
            prefix = self._prefix(image, settings)
        except ReportedError as error:
            yield {"error": str(error)}
            return
        messages: queue.Queue[Message | None] = queue.Queue()
        left = threading.Event()
        thread = threading.Thread(target=self._work, args=(caption, settings, prefix, messages, left), daemon=True)
        thread.start()
        try:
            while (message := messages.get()) is not None:
                yield message
        finally:
            left.set()

    def _prefix(self, image: bytes, settings: Settings) -> list[int]:
        if not image:
            if settings.keep_rows is not None:
                raise UsageError("rows to keep were given without an image; drop an image on the page.")
            return []
        whole = prompt_image.square(Image.fromarray(decode_image(image)), self.models.cfg.dvae.image_size, settings.fit)
        return prompt_image.codes(self.models, whole, settings.keep_rows)

    def _work(self, caption: str, settings: Settings, prefix: list[int], messages: queue.Queue[Message | None], left: threading.Event) -> None:
        grid, done, seen = self.models.weights.shape.grid, list[Picture](), -1

        def listen(batch: Batch, codes_BI: Tensor, known_B: Tensor) -> None:
            nonlocal seen
            if left.is_set():
                raise StopRequested("its reader has left")
            rows = int(known_B.min()) // grid
            if rows != seen and rows < grid:
                seen = rows
                so_far = [_message(caption, pixels) for pixels in self._so_far(codes_BI, rows)]
                messages.put({"rows": rows, "of": grid, "pictures": [_finished(picture) for picture in done] + so_far})

        try:
            with self._drawing:
                began = time.monotonic()
                for pictures in draw(self.models, [caption], settings, prefix, listen=listen):
                    done += pictures
                messages.put(self._ended(caption, done, time.monotonic() - began))
        except StopRequested:
            pass
        except ReportedError as error:
            messages.put({"error": str(error)})
        except Exception as error:  # shown on the page: otherwise it would just stop
            messages.put({"error": f"{type(error).__name__}: {error}"})
            raise
        finally:
            messages.put(None)

    def _so_far(self, codes_BI: Tensor, rows: int) -> Iterator[Pixels]:
        """The pictures so far: below the rows that are drawn they are white."""
        grid = self.models.weights.shape.grid
        is_known_I = torch.arange(codes_BI.shape[1], device=codes_BI.device) < rows * grid
        for pixels_YXC in decode(self.models, codes_BI.where(is_known_I, codes_BI[:, :1])):
            pixels_YXC[rows * len(pixels_YXC) // grid :] = 255
            yield pixels_YXC

    def _ended(self, caption: str, pictures: list[Picture], seconds: float) -> Message:
        scores: list[float | None] = list(score(self.models, pictures)) if self.models.clip is not None else [None] * len(pictures)
        order = sorted(range(len(pictures)), key=lambda place: (-(scores[place] or 0.0), place))
        said = f"drew {counted(len(pictures), 'picture')} in {seconds:.1f} s."
        found = [_finished(pictures[place], scores[place]) for place in order]
        return {"done": True, "said": said, "notes": notes(self.models.tokenizer, caption), "pictures": found}


def _settings(form: dict[str, str]) -> Settings:
    """
    Raises:
        UsageError: a field is not a number.
    """
    try:
        given = Settings(
            n=int(form.get("n") or 4),
            seed=int(form.get("seed") or 0),
            temperature=float(form.get("temperature") or 1),
            guidance=float(form.get("guidance") or 1),
            keep_rows=int(form["keep_rows"]) if form.get("keep_rows") else None,
        )
    except ValueError as error:
        raise UsageError(f"a field that takes a number holds something else ({error}).") from error
    if given.n > MOST:
        raise UsageError(f"{given.n} pictures: the page draws up to {MOST}; 'launcher.py draw' draws any number.")
    return given


def _message(caption: str, pixels_YXC: Pixels) -> Message:
    return {"caption": caption, "url": "data:image/png;base64," + base64.b64encode(png_bytes(pixels_YXC)).decode()}


def _finished(picture: Picture, worth: float | None = None) -> Message:
    """The message with a finished picture. Its seed is a string, because numbers in a browser's scripts are exact only up to 53 bits."""
    return _message(picture.caption, picture.pixels_YXC) | {"candidate": picture.candidate, "seed": str(picture.seed), "score": worth}


def _stream(messages: Iterator[Message]) -> Response:
    return Response((json.dumps(message) + "\n" for message in messages), mimetype="application/x-ndjson")
