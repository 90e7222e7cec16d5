"""How do runs compare at equal attention time, and at equal quality?

Tiny models give the quality of a run (quality.py), one attention call of Wan 14B at 720p its time
(attention.py, for the same preset and density): linear between the measured densities, nothing beyond them.
Time that clusters take is counted, or left out ("free"): the comparison should not hang on how fast one's
k-means is. What choosing the forms of heads takes (measuring.py) is counted, spread over the sparse calls.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from quality import Row

from svg_ear_compile.runtime.head_variants import RESPLIT

SHAPE = "Wan 14B 720p"
PRESET_OF = {
    "default": "cubes",
    "default, centroids only": "cubes",
    "default, centroids and cubes only": "cubes",
    "default, skipped blocks dropped": "dropped",
    "svg_ear": "svg_ear",
    "svg2": "svg2",
    "svg_ear, released budget": "svg_ear",
    "svg2, released budget": "svg2",
}
"""The preset of attention.py that takes a run's time, but for the forms of its heads: see Times.extra."""
CHOOSING = ("default", "default, centroids only")
"""Runs whose heads choose between forms."""
NEAR = 0.005
"""A density so little beyond the measured ones counts as the last of them: blocks do not hit it exactly."""
LOW, HIGH = 0.1, 0.3
"""Densities of the papers that are compared: with ours at the same time, whatever its density."""


class Times:
    """Milliseconds of one attention call at Wan 14B 720p, from the records of attention.py.

    Records whose outputs failed their check have no time.
    """

    def __init__(
        self,
        records: Sequence[dict[str, Any]],
        measuring: Sequence[dict[str, Any]] = (),
        sparse_calls: int = 1,
    ) -> None:
        """measuring: records of measuring.py; sparse_calls: of a layer in one generation, in all branches.

        choosing: milliseconds in which a layer chooses the forms of its heads, once in a generation.
        """
        self.choosing: float = sum(r["choosing ms"] for r in measuring if r["shape"] == SHAPE)
        self._sparse_calls = sparse_calls
        of_shape = [r for r in records if r["shape"] == SHAPE]
        if not of_shape:
            raise ValueError(f"no record of {SHAPE}: run attention.py --shapes wan")
        self.dense: float = of_shape[0]["dense ms"]
        self._points: dict[str, list[tuple[float, float, float]]] = {}
        for r in of_shape:
            if not isinstance(r["speed-up"], str):
                point = (r["exact"], r["total ms"], r.get("without clustering ms", r["total ms"]))
                self._points.setdefault(r["preset"], []).append(point)
        for points in self._points.values():
            points.sort()

    def call(self, preset: str, density: float, free: bool = False) -> float | None:
        """Of a preset of attention.py at a measured density; None beyond what was measured."""
        points = self._points.get(preset, [])
        densities = [p[0] for p in points]
        if not points or not densities[0] - NEAR <= density <= densities[-1] + NEAR:
            return None
        return float(np.interp(density, densities, [p[2 if free else 1] for p in points]))

    def of(self, row: Row, free: bool = False) -> float | None:
        """Of a run."""
        time = self.call(PRESET_OF[row.name], row.density, free)
        if time is None:
            return None
        chosen = self.choosing / self._sparse_calls if row.name in CHOOSING else 0.0
        return time + chosen + self.extra(row.density, row.splits, row.first_order, free)

    def extra(self, density: float, splits: float, first_order: float, free: bool = False) -> float:
        """What the shares of heads in splits and with first-order terms add to the time of cubes, from
        calls in which all heads are so; with splits that are made in one call of RESPLIT, as they are.
        Beyond the densities of these calls it is what it is at the nearest."""
        found = 0.0
        if splits:
            found += splits * self._beyond_cubes(
                "splits",
                density,
                lambda whole, without: without + (0 if free else whole - without) / RESPLIT,
                free,
            )
        if first_order:
            found += first_order * self._beyond_cubes("first_order", density, lambda whole, _: whole, False)
        return found

    def _beyond_cubes(
        self, preset: str, density: float, taken: Callable[[float, float], float], free: bool
    ) -> float:
        """taken: from the times with and without clustering."""
        differences = []
        for at, whole, without in self._points[preset]:
            cubes = self.call("cubes", at, free)
            if cubes is not None:
                differences.append((at, taken(whole, without) - cubes))
        return float(np.interp(density, *zip(*differences, strict=True)))


class Spread(NamedTuple):
    """Over the range that two curves share."""

    least: float
    mean: float
    most: float


Curve = Sequence[tuple[float, float]]
"""(milliseconds, dB)"""


def curve(rows: Sequence[Row], times: Times, free: bool = False) -> Curve:
    """One run's points whose time is known, by time."""
    points = [(times.of(r, free), statistics.mean(r.psnr)) for r in rows]
    return sorted((time, psnr) for time, psnr in points if time is not None)


def compared(rows: Sequence[Row]) -> list[Row]:
    """Those of densities LOW to HIGH, and those that found theirs."""
    return [r for r in rows if r.asked is None or LOW - NEAR <= r.asked <= HIGH + NEAR]


def gain_at_equal_time(ours: Curve, theirs: Curve) -> Spread | None:
    """dB that ours is above theirs, where both have points; None if they share no time."""
    return _over_common(0, ours, theirs, lambda a, b: a - b)


def time_at_equal_quality(ours: Curve, theirs: Curve) -> Spread | None:
    """theirs / ours of the times at the same PSNR: how many times as fast ours is; None if they share none.

    The time to a quality is that of the first point of a curve that reaches it.
    """
    return _over_common(1, _rising(ours), _rising(theirs), lambda a, b: b / a)


def _rising(points: Curve) -> Curve:
    """Without the points that are no better than a faster one."""
    kept: list[tuple[float, float]] = []
    for time, psnr in points:
        if not kept or psnr > kept[-1][1]:
            kept.append((time, psnr))
    return kept


def _over_common(axis: int, ours: Curve, theirs: Curve, compare: Any) -> Spread | None:
    """Interpolates along an axis (0: time, 1: dB) over the range that both cover: theirs may be one point."""
    if len(ours) < 2 or not theirs:
        return None
    low = max(min(p[axis] for p in c) for c in (ours, theirs))
    high = min(max(p[axis] for p in c) for c in (ours, theirs))
    if low > high:
        return None
    at = np.linspace(low, high, 201)
    a, b = (np.interp(at, [p[axis] for p in c], [p[1 - axis] for p in c]) for c in (ours, theirs))
    found = compare(a, b)
    return Spread(float(found.min()), float(found.mean()), float(found.max()))
