"""A function over many inputs, some at once, with results in the order of the inputs: what is on its way and in memory is bounded."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Given = TypeVar("Given")
Made = TypeVar("Made")


def overlapped(function: Callable[[Given], Made], inputs: Iterable[Given], most: int) -> Iterator[tuple[Given, Made]]:
    """Every input with its result; up to ``most`` are under way or wait. What the function raises comes out here, and nothing new is begun."""
    waiting: deque[tuple[Given, Future[Made]]] = deque()
    with ThreadPoolExecutor(most, "overlapped") as pool:
        for given in inputs:
            waiting.append((given, pool.submit(function, given)))
            if len(waiting) == most:
                first, job = waiting.popleft()
                yield first, job.result()
        for first, job in waiting:
            yield first, job.result()
