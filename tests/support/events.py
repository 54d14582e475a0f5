"""Event files that one test writes as several attempts."""

from __future__ import annotations

import time


def next_second() -> None:
    """Wait until an event file gets another time in its name: TensorBoard reads files in the order of their names, and within one second and one process those
    end in a counter that is not padded (9, 10). No two attempts of a real run begin in the same second."""
    time.sleep(1.01 - time.time() % 1)
