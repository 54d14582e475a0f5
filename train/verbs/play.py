"""``launcher.py play RUN``: serves a web page on this machine on which captions can be entered and drawn."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from werkzeug.serving import BaseWSGIServer, make_server

from infra.errors import ConfigError
from infra.signals import StopFlag
from train.drawing.page import Page
from train.drawing.place import locate
from train.drawing.source import Asked, Models, open_place
from train.drawing.told import say_compiling

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_LOOK_S = 0.2
"""Seconds between two looks at the stop flag; a signal ends the server within this time."""


def main(url: str, host: str, port: int, rerank: str, device: str, precision: str, stop: StopFlag) -> None:
    """Serve the page until a stop signal comes, which is the normal way to end it.

    Raises:
        ConfigError: there are no models to draw with, or the address cannot be used.
        DataError: the run has no weights yet, or they do not belong together.
    """
    place, asked = locate(url), Asked(device, precision, rerank)
    asked.check(place)
    page: list[Page] = []

    def answer(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        return page[0](environ, start_response)

    # The address is taken first, because weights take long to read; whoever asks already then waits.
    try:
        server = make_server(host, port, answer, threaded=True)
    except (OSError, SystemExit) as error:  # werkzeug raises SystemExit if the port is in use
        raise ConfigError(f"--host {host} --port {port}: this address cannot be served ({error}); --port 0 takes a free one.") from error
    try:
        models = open_place(place, asked)
        say_compiling(models.device, lambda words: print(words, flush=True))
        guidance = models.cfg.generate.guidance if models.cfg.dalle_fit.caption_dropout else 1.0
        page.append(Page(models, guidance, only_local=host in _LOOPBACK))
        _serve(server, models, host, stop)
    finally:
        server.server_close()


def _serve(server: BaseWSGIServer, models: Models, host: str, stop: StopFlag) -> None:
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    shown = f"[{host}]" if ":" in host else host
    print(f"{models.url}: {models.description}; open http://{shown}:{server.server_port}/ (Ctrl-C ends it)", flush=True)
    while not stop:
        time.sleep(_LOOK_S)
    server.shutdown()
    thread.join()
