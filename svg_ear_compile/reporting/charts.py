"""What do the pictures of the page look like? Heat maps of steps and layers, and bars, as inline SVG.

Cells of one colour are one path, so that 60 layers x 50 steps take a few kilobytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

DENSITIES = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.45, 0.7, 1.0)
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)
"""Bounds of the colours of errors, in shares of the target. What is beyond it has colours of its own."""
LEFT, TOP = 34, 16
WIDEST, MOST_WIDE, MOST_TALL = 560, 24, 14
"""Of a picture; of one cell."""


def density_map(errors: Sequence[Mapping[str, Any]]) -> str:
    """The density of each call; dense calls are grey."""
    bounds = list(pairwise(DENSITIES))
    cells: dict[tuple[Any, int], str] = {}
    for e in errors:
        density = e["density"]
        if e["dense"]:
            cells[_row(e), e["step"]] = "dense"
        elif density is not None:
            cells[_row(e), e["step"]] = (
                f"in{next(i for i, (_, high) in enumerate(bounds) if density <= high + 1e-9)}"
            )
    legend = [("dense", "dense")] + [(f"in{i}", f"to {high:g}") for i, (_, high) in enumerate(bounds)]
    return _map("density", errors, cells, legend)


def error_map(errors: Sequence[Mapping[str, Any]], limit: float, is_target: bool) -> str:
    """The measured error of each call, coloured by its share of the limit; blank ones were not measured."""
    names = [f"in{2 * i + 1}" for i in range(4)] + [f"over{i}" for i in range(4)]
    cells: dict[tuple[Any, int], str] = {}
    for e in errors:
        if e["dense"]:
            cells[_row(e), e["step"]] = "dense"
        elif e["error"] is not None:
            share = e["error"] / limit if limit else 0.0
            cells[_row(e), e["step"]] = names[sum(share > bound for bound in SHARES[1:])]
    highs = [f"to {bound * limit:.2g}" for bound in SHARES[1:]] + ["beyond"]
    legend = [("dense", "dense"), *zip(names, highs, strict=True)]
    title = f"measured error (target {limit:g})" if is_target else "measured error"
    return _map(title, errors, cells, legend)


def _row(e: Mapping[str, Any]) -> tuple[int, int, int]:
    return e["layer"], e["graph"], e["site"]


def _map(
    title: str,
    errors: Sequence[Mapping[str, Any]],
    cells: Mapping[tuple[Any, int], str],
    legend: Sequence[tuple[str, str]],
) -> str:
    rows = {key: i for i, key in enumerate(sorted({_row(e) for e in errors}))}
    steps = {step: i for i, step in enumerate(sorted({e["step"] for e in errors}))}
    cell = max(2.0, min(MOST_WIDE, (WIDEST - LEFT) / len(steps)))
    tall = min(cell, MOST_TALL)
    width, height = max(LEFT + cell * len(steps), 300), TOP + tall * len(rows) + 14
    paths: dict[str, list[str]] = {}
    for (row, step), kind in cells.items():
        x, y = LEFT + cell * steps[step], TOP + tall * rows[row]
        paths.setdefault(kind, []).append(
            f"M{x:g} {y:g}h{cell * 0.94:.3g}v{tall * 0.9:.3g}h-{cell * 0.94:.3g}z"
        )
    parts = [f'<path class="{kind}" d="{"".join(drawn)}"/>' for kind, drawn in paths.items()]
    parts += [
        f'<text x="{LEFT - 4}" y="{TOP + tall * i + tall * 0.8:g}" text-anchor="end">{key[0]}</text>'
        for key, i in rows.items()
        if i % max(1, round(14 / tall)) == 0 or tall >= 10
    ]
    parts += [
        f'<text x="{LEFT + cell * i:g}" y="{height - 3:g}">{step + 1}</text>'
        for step, i in steps.items()
        if i % max(1, round(22 / cell)) == 0
    ]
    below, x = height + 12, LEFT
    for kind, text in legend:
        wide = 18 + 5.6 * len(text)
        if x + wide > width:
            below, x = below + 14, LEFT
        parts.append(f'<rect class="{kind}" x="{x:g}" y="{below - 8:g}" width="9" height="9"/>')
        parts.append(f'<text x="{x + 12:g}" y="{below:g}">{text}</text>')
        x += wide
    picture = "".join(parts)
    return (
        f'<svg role="img" aria-label="{title}" width="{width:g}" height="{below + 6:g}" '
        f'viewBox="0 0 {width:g} {below + 6:g}">'
        f'<text x="{LEFT}" y="10">{title}</text>{picture}</svg>'
    )


def bars(values: Sequence[tuple[int, float, bool]]) -> str:
    """(number, seconds, whether it is sparse) of each step."""
    most, tall = max(seconds for _, seconds, _ in values) or 1.0, 90
    wide = max(4.0, min(MOST_WIDE, WIDEST / len(values)))
    width = LEFT + wide * len(values)
    parts = [f'<text x="{LEFT - 4}" y="{TOP}" text-anchor="end">{most:.2g}</text>']
    for i, (number, seconds, is_sparse) in enumerate(values):
        x, high = LEFT + wide * i, tall * seconds / most
        kind = "bar" if is_sparse else "dense"
        parts.append(
            f'<rect class="{kind}" x="{x:g}" y="{TOP + tall - high:.4g}" width="{wide * 0.85:g}" height="{high:.4g}">'
            f"<title>step {number}: {seconds:.3g} s</title></rect>"
        )
        if i % max(1, round(22 / wide)) == 0:
            parts.append(f'<text x="{x:g}" y="{TOP + tall + 11}">{number}</text>')
    size = f'width="{width:g}" height="{TOP + tall + 16}" viewBox="0 0 {width:g} {TOP + tall + 16}"'
    return f'<svg role="img" aria-label="seconds per step" {size}>{"".join(parts)}</svg>'
