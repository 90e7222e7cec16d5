"""Which rooms does one attention call pass through, and how often does it climb back up?

    python docs/walk.py            this checkout
    python docs/walk.py FOLDER     another one, such as a git worktree of an earlier commit

Traces the toy model of tests/toy.py on a CPU: the compilation of its one block, then the second call. A room is a file.
An entry is a call from one file of ours into another. A return visit is an entry into a file that was entered before. A
climb is an entry into a file that, directly or not, imports the caller's: a callback, up against the arrows.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

from architecture import PACKAGE, ROOT, Graph, between_files, modules, reachable

OP = f"{PACKAGE}.kernels.ops"
WRAPPER = f"{PACKAGE}.runtime.wrapper"


class Entry(NamedTuple):
    """From one file into another. in_op: whether the op is running."""

    caller: str
    room: str
    in_op: bool


class Walk:
    """What sys.setprofile calls: notes entries. names: of the modules to follow, by file."""

    def __init__(self, names: dict[str, str]) -> None:
        self.names = names
        self.stack: list[str] = []
        self.entries: list[Entry] = []

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        name = self.names.get(frame.f_code.co_filename)
        if name is None:
            return
        if event == "call":
            if self.stack and self.stack[-1] != name:
                self.entries.append(Entry(self.stack[-1], name, OP in (*self.stack, name)))
            self.stack.append(name)
        elif event == "return" and self.stack:
            self.stack.pop()

    def of(self, call: Callable[[], Any]) -> list[Entry]:
        """The entries that `call` makes."""
        self.entries = []
        sys.setprofile(self)
        try:
            call()
        finally:
            sys.setprofile(None)
        return self.entries


def figures(entries: list[Entry], graph: Graph) -> str:
    rooms = len({entry.room for entry in entries})
    climbs = sum(entry.caller in reachable(graph, graph[entry.room]) for entry in entries)
    return f"{rooms} rooms, {len(entries)} entries, {len(entries) - rooms} return visits, {climbs} climbs"


def package_of(root: Path, folder: Path) -> Path:
    """The package as it is installed, of links in `folder`; goes first on the path."""
    package = folder / PACKAGE
    package.mkdir()
    for path in (*(root / PACKAGE).iterdir(), root / "passes", root / "kernels"):
        if not path.is_symlink():
            (package / path.name).symlink_to(path.resolve())
    sys.path[:0] = [str(folder), str(root / "tests")]
    return package


def walk(root: Path, folder: Path) -> dict[str, list[Entry]]:
    """The entries of each phase."""
    package = package_of(root, folder)
    import torch
    import toy

    names = {str(package.joinpath(*name.split(".")[1:])) + ".py": name for name in modules(root)}
    trace, inputs = Walk(names), toy.ToyInputs()()
    model = toy.compiled(toy.ToyVideo(layers=1).eval(), toy.EAGER)
    with torch.no_grad():
        first, second = (trace.of(lambda: model(*inputs)) for _ in range(2))
    compiled = next(i for i, entry in enumerate(first) if entry.caller == WRAPPER)
    return {
        "compiling": first[:compiled],
        "around a call": [entry for entry in second if not entry.in_op],
        "in the op": [entry for entry in second if entry.in_op],
    }


def main(root: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        phases, graph = walk(root, Path(folder)), between_files(root)
        for phase, entries in phases.items():
            print(f"{phase}: {figures(entries, graph)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
