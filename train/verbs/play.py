"""``launcher.py play RUN``: a page to type captions into, served from this machine."""

from __future__ import annotations

import threading
import time

from werkzeug.serving import make_server

from infra.errors import ConfigError
from infra.signals import StopFlag
from train.drawing.page import Page
from train.drawing.source import open_models

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_LOOK_S = 0.2
"""Between looks at the stop flag: a signal ends the page within it."""


def main(url: str, host: str, port: int, rerank: str, device: str, precision: str, stop: StopFlag) -> None:
    """Serve the page until a signal comes, which is its ordinary end.

    Raises:
        ConfigError: nothing to draw with, or no such address.
        DataError: the run has no weights yet, or they do not belong together.
    """
    models = open_models(url, device, precision, rerank)
    guidance = models.cfg.generate.guidance if models.cfg.dalle_fit.caption_dropout else 1.0
    try:
        server = make_server(host, port, Page(models, guidance, only_local=host in _LOOPBACK), threaded=True)
    except (OSError, SystemExit) as error:  # werkzeug ends the process where a port is taken
        raise ConfigError(f"--host {host} --port {port}: this address cannot be served ({error}); --port 0 takes a free one.") from error
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    shown = f"[{host}]" if ":" in host else host
    print(f"{models.url}: {models.description}; open http://{shown}:{server.server_port}/ (Ctrl-C ends it)", flush=True)
    while not stop:
        time.sleep(_LOOK_S)
    server.shutdown()
    thread.join()
