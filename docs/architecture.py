"""Draws docs/architecture.svg, the rooms of this code base and which room imports which, and lists all files with
their questions in docs/ARCHITECTURE.md.

    python docs/architecture.py

A room is a folder. A folder has floors where its upper files import another room, and that room its lower files.
Everything is read off the import statements; a test keeps the picture current. Arrows that follow from other arrows
are left out.
"""

from __future__ import annotations

import ast
import re
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "architecture.svg"
PAGE = ROOT / "docs" / "ARCHITECTURE.md"
MARK = "<!-- files -->"
PACKAGE = "svg_ear_compile"
COLUMNS = (PACKAGE, "passes", "kernels")

Graph = dict[str, set[str]]
Box = tuple[float, float, float, list[str]]
"""x, y, height, lines of text."""


def modules(root: Path = ROOT) -> dict[str, Path]:
    """The full name of every module of ours, as it is imported, and its file."""
    found = {}
    for top in COLUMNS:
        for path in sorted((root / top).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            if parts[1] not in COLUMNS:  # a link in the package
                found[".".join(parts if top == PACKAGE else (PACKAGE, *parts))] = path
    return found


def imports(name: str, path: Path) -> set[str]:
    """Full names of all modules (and of names that may be modules) that a file imports, wherever in it."""
    package = name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def between_files(root: Path = ROOT) -> Graph:
    """Which module of ours imports which others of ours. A package of which no module is named is its __init__."""
    files, found = modules(root), {}
    for name, path in files.items():
        names = imports(name, path)
        named = {other.rpartition(".")[0] for other in names & files.keys()}
        packages = {f"{other}.__init__" for other in names - named if not name.startswith(f"{other}.")}
        found[name] = ((names | packages) & files.keys()) - {name}
    return found


def reachable(graph: Graph, start: set[str]) -> set[str]:
    """`start` and all that it leads to."""
    seen, todo = set(start), list(start)
    while todo:
        new = graph[todo.pop()] - seen
        seen |= new
        todo += new
    return seen


def folder(name: str) -> str:
    """svg_ear_compile.kernels.ops -> kernels;  svg_ear_compile.settings -> svg_ear_compile"""
    parts = name.split(".")[:-1]
    return "/".join(parts[1:] if len(parts) > 1 and parts[1] in COLUMNS else parts)


def rooms(graph: Graph) -> dict[str, str]:
    """The room of every module: its folder and floor. A file is one floor further down for each time that a chain of
    imports leaves its folder and comes back to it."""
    height, floor = levels(graph), dict.fromkeys(graph, 0)
    least: dict[str, dict[str, int]] = {
        name: {} for name in graph
    }  # of a folder's files that a module leads to
    for name in sorted(graph, key=lambda name: -height[name]):
        home = folder(name)
        floor[name] = least[name].get(home, 0)
        for other in graph[name]:
            left = folder(other) != home
            for place, number in (least[name] | {home: floor[name] + left}).items():
                least[other][place] = max(number, least[other].get(place, 0))
    deepest = {folder(name): 0 for name in graph}
    for name in graph:
        deepest[folder(name)] = max(floor[name], deepest[folder(name)])
    number = {name: f", floor {deepest[folder(name)] - floor[name]}" for name in graph}
    return {name: folder(name) + (number[name] if deepest[folder(name)] else "") for name in graph}


def between_rooms(graph: Graph) -> Graph:
    """Which room imports which."""
    home = rooms(graph)
    found: Graph = {home[name]: set() for name in graph}
    for name, others in graph.items():
        found[home[name]] |= {home[other] for other in others} - {home[name]}
    return found


def circle(graph: Graph) -> list[str]:
    """Rooms or files that import each other in a circle; none, if all is well."""
    return sorted(name for name, others in graph.items() if name in reachable(graph, set(others)))


def levels(graph: Graph) -> dict[str, int]:
    """0 for what imports nothing, else one more than the highest that it imports."""
    assert not circle(graph), f"imports in a circle: {circle(graph)}"
    found: dict[str, int] = {}
    while len(found) < len(graph):
        for name in graph.keys() - found.keys():
            if graph[name] <= found.keys():
                found[name] = 1 + max((found[other] for other in graph[name]), default=-1)
    return found


def thinned(graph: Graph) -> Graph:
    """Without arrows that follow from others."""
    return {
        name: {x for x in others if x not in reachable(graph, set().union(*(graph[y] for y in others - {x})))}
        for name, others in graph.items()
    }


STYLE = """
text { font: 13px sans-serif; fill: #1f2328 } .room { font-weight: bold } .files { font-size: 11px }
rect { fill: #f6f8fa; stroke: #8c959f } path { fill: none; stroke: #0969da; stroke-width: 1.3 } #tip { fill: #0969da }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } rect { fill: #161b22; stroke: #6e7681 } path { stroke: #58a6ff } #tip { fill: #58a6ff } }
"""
WIDTH, ACROSS, LINE, GAP = 260, 60, 15, 26


def draw(graph: Graph) -> str:
    """The picture: a column for each top folder, rooms above what they import."""
    home, between = rooms(graph), between_rooms(graph)
    height = levels(between)
    boxes: dict[str, Box] = {}
    bottom = 0.0
    for level in sorted(set(height.values()), reverse=True):
        top, bottom = bottom + GAP, bottom + GAP
        below = dict.fromkeys(COLUMNS, top)
        for room in sorted(name for name in between if height[name] == level):
            column = room.split("/")[0].split(",")[0]
            lines = _wrapped(sorted(name.rpartition(".")[2] for name in graph if home[name] == room))
            tall = LINE * (len(lines) + 1) + 12
            x = 10 + COLUMNS.index(column) * (WIDTH + ACROSS)
            boxes[room] = (x, below[column], tall, lines)
            below[column] += tall + GAP / 2
            bottom = max(bottom, below[column] - GAP / 2)
    parts = [_arrow(boxes[a], boxes[b]) for a, others in thinned(between).items() for b in sorted(others)]
    parts += [_box(room, *box) for room, box in boxes.items()]  # over the arrows that pass by
    size = f"{len(COLUMNS) * (WIDTH + ACROSS)} {bottom + 20:g}"
    marker = '<marker id="m" markerWidth="8" markerHeight="8" refX="6" refY="3" orient="auto">'
    marker += '<path id="tip" style="stroke:none" d="M0 0 6 3 0 6z"/></marker>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}"><style>{STYLE}</style>{marker}'
    return "\n".join([head, *parts, "</svg>\n"])


def _wrapped(names: list[str]) -> list[str]:
    lines = [""]
    for name in [name for name in names if name != "__init__"] or names:
        if len(lines[-1]) + len(name) > 40:
            lines.append("")
        lines[-1] += (", " if lines[-1] else "") + name
    return lines


def _box(room: str, x: float, y: float, tall: float, lines: list[str]) -> str:
    text = f'<rect x="{x:g}" y="{y:g}" width="{WIDTH}" height="{tall:g}" rx="6"/>'
    text += f'<text class="room" x="{x + 9:g}" y="{y + 17:g}">{escape(room)}</text>'
    for i, line in enumerate(lines):
        text += f'<text class="files" x="{x + 9:g}" y="{y + 34 + LINE * i:g}">{escape(line)}</text>'
    return text


def _arrow(start: Box, end: Box) -> str:
    """Straight down to the next room, around the rooms between, or over to another column."""
    (x, y, tall, _), (u, v, _, _) = start, end
    if x == u and v - y - tall <= GAP:
        middle = x + WIDTH / 2
        return f'<path marker-end="url(#m)" d="M{middle:g} {y + tall:g}L{middle:g} {v - 2:g}"/>'
    a, b, c, d = x + WIDTH, y + tall / 2, u + WIDTH + 2, v + 14
    bend = back = ACROSS * 0.8
    if u > x:
        c, back = u - 2, -back
    elif u < x:
        a, bend = x, -bend
    return f'<path marker-end="url(#m)" d="M{a:g} {b:g}C{a + bend:g} {b:g} {c + back:g} {d:g} {c:g} {d:g}"/>'


def table() -> str:
    """A row for each file: the first sentence of its docstring."""
    rows = ["| file | question, or answer |", "|---|---|"]
    for path in modules().values():
        text = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0].split())
        name = str(path.relative_to(ROOT)).replace("__init__.py", "")
        if sentence := re.match(r".+?(?:[.?](?= )|$)", text):
            rows.append(f"| `{name}` | {sentence[0].rstrip(':')} |")
    return "\n".join(rows)


def with_table(page: str) -> str:
    before, _, after = page.split(MARK)
    return f"{before}{MARK}\n{table()}\n{MARK}{after}"


def main() -> None:
    PICTURE.write_text(draw(between_files()))
    PAGE.write_text(with_table(PAGE.read_text()))


if __name__ == "__main__":
    main()
