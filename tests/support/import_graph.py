"""The rooms of a package and the arrows of import between them, read from the code: ``python -m tests.support.import_graph [CHECKOUT]``.

A room is a file or folder at one level of a package. A floor is a place in the longest chain of imports. An arrow runs from a room to a room that it imports,
wherever in its files the import stands. ``make check`` prints the table; tests/repository/test_imports.py holds it to an order.
"""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.support.root import ROOT

PACKAGES = ("train", "data_pipeline", "infra", "model")
Arrows = set[tuple[str, str]]


@dataclass(frozen=True)
class Graph:
    """Rooms of one package and the arrows between them."""

    rooms: set[str]
    arrows: Arrows

    def cycles(self) -> list[list[str]]:
        """Groups of rooms that import each other, directly or through others."""
        reached = {room: self._from(room) for room in self.rooms}
        groups = {tuple(sorted(other for other in reached[room] if room in reached[other])) for room in self.rooms if room in reached[room]}
        return [list(group) for group in sorted(groups)]

    def floors(self) -> int:
        """Rooms in the longest chain of imports; a cycle counts as one room."""
        cycle_of = {room: group[0] for group in self.cycles() for room in group}
        below: dict[str, set[str]] = {}
        for user, used in self.arrows:
            a, b = cycle_of.get(user, user), cycle_of.get(used, used)
            if a != b:
                below.setdefault(a, set()).add(b)
        heights: dict[str, int] = {}

        def height(room: str) -> int:
            if room not in heights:
                heights[room] = 1 + max((height(each) for each in below.get(room, ())), default=0)
            return heights[room]

        return max(height(cycle_of.get(room, room)) for room in self.rooms)

    def upward(self, order: list[tuple[str, ...]]) -> list[tuple[str, str]]:
        """Arrows that do not run from a floor of ``order`` (top first) to a lower one."""
        floor = {room: number for number, rooms in enumerate(order) for room in rooms}
        return sorted((a, b) for a, b in self.arrows if floor[a] >= floor[b])

    def _from(self, room: str) -> set[str]:
        found: set[str] = set()
        waiting = [room]
        while waiting:
            user = waiting.pop()
            new = {used for by, used in self.arrows if by == user} - found
            found |= new
            waiting += new
        return found


@cache
def imported(path: Path, *, top_level_only: bool = False) -> frozenset[str]:
    """Modules that a file imports, as dotted names; names imported from our own packages count as modules of theirs."""
    tree = ast.parse(path.read_text())
    found: set[str] = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def read(package: str, root: Path = ROOT) -> Graph:
    """The graph of a package of ours."""
    folder = root / package
    files = [path for path in folder.rglob("*.py") if path != folder / "__init__.py"]
    room_of = {path: path.relative_to(folder).parts[0].removesuffix(".py") for path in files}
    arrows = {(room_of[path], name.split(".")[1]) for path in files for name in imported(path) if name.startswith(f"{package}.")}
    return Graph(set(room_of.values()), {(a, b) for a, b in arrows if a != b and b in room_of.values()})


def statements(package: str, root: Path = ROOT) -> int:
    """Statements of a package's code; docstrings and comments are none."""
    nodes = (node for path in (root / package).rglob("*.py") for node in ast.walk(ast.parse(path.read_text())))
    return sum(isinstance(node, ast.stmt) and not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)) for node in nodes)


def main(root: Path) -> None:
    """Print the table."""
    print(f"{'package':16}{'rooms':>8}{'floors':>8}{'arrows':>8}{'in cycles':>11}{'statements':>12}")
    for package in PACKAGES:
        graph = read(package, root)
        in_cycles = sum(map(len, graph.cycles()))
        print(f"{package:16}{len(graph.rooms):8}{graph.floors():8}{len(graph.arrows):8}{in_cycles:11}{statements(package, root):12,}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
