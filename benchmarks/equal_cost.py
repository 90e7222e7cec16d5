"""At the same cost, how do quality levels compare with one fixed density, and with the levels as they were?

A fixed density's PSNR at a level's cost is read off its curve, linear between the densities that were
sampled, clip by clip; costs beyond the curve compare with nothing. The levels as they were have costs of
their own: `margin` is what a level is above one fixed density without dense first steps at its own cost, and
`gain` how much more that is than it was.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from tabulate import tabulate

if TYPE_CHECKING:
    from levels import Run

WITHIN = 1.5
"""A generation keeps its target if its error is within this factor of it."""
MOST_DECIBELS = 60.0
"""Clips that are closer count as so close: what is left is rounding, and it grows without bound."""


class Compared(NamedTuple):
    """A level at one number of steps; means over the clips. fixed: dB at the same cost, by share of dense
    steps. ratios: error over target of each clip. before: (cost, dB, margin) of the level as it was.
    """

    model: str
    steps: int
    level: str
    target: float
    cost: float
    density: float | None
    psnr: float
    fixed: dict[float, float | None]
    ratios: list[float]
    margin: float | None
    before: tuple[float, float, float | None] | None

    @property
    def gain(self) -> float | None:
        return None if self.before is None else _less(self.margin, self.before[2])

    def within(self, low: float = 1 / WITHIN) -> float | None:
        """The share of clips whose error is within WITHIN of the target, or, with low 0, no larger."""
        return statistics.mean(float(low <= r <= WITHIN) for r in self.ratios) if self.ratios else None


class Curves:
    """Of one model and number of steps: PSNR by cost of each clip, for each share of dense first steps."""

    def __init__(self, runs: Iterable[Run]) -> None:
        self._runs: dict[float, list[Run]] = {}
        for run in sorted(runs, key=lambda run: run.asked):
            if run.warm_up is not None:
                self._runs.setdefault(run.warm_up, []).append(run)

    @property
    def warm_ups(self) -> list[float]:
        return sorted(self._runs)

    def points(self, warm_up: float) -> list[tuple[float, float]]:
        """(cost, mean dB)."""
        return [(statistics.mean(r.cost), _mean_psnr(r)) for r in self._runs[warm_up]]

    def at(self, warm_up: float, costs: Sequence[float]) -> float | None:
        """Mean dB at each clip's cost; None where one lies beyond what was sampled."""
        found = [self._of_clip(warm_up, clip, cost) for clip, cost in enumerate(costs)]
        return None if None in found else statistics.mean(x for x in found if x is not None)

    def _of_clip(self, warm_up: float, clip: int, cost: float) -> float | None:
        runs = [run for run in self._runs.get(warm_up, ()) if clip < len(run.cost)]
        costs = [run.cost[clip] for run in runs]
        if not costs or not costs[0] <= cost <= costs[-1]:
            return None
        return float(np.interp(cost, costs, [min(run.psnr[clip], MOST_DECIBELS) for run in runs]))


def rows_of(runs: Sequence[Run], before: Sequence[Run] = ()) -> list[Compared]:
    """before: the levels as they were, of any models and numbers of steps."""
    found = []
    for model, steps in dict.fromkeys((run.model, run.steps) for run in runs):
        own = [run for run in runs if (run.model, run.steps) == (model, steps)]
        curves = Curves(own)
        old = {run.level: run for run in before if (run.model, run.steps) == (model, steps)}
        found += [_compared(run, curves, old.get(run.level)) for run in own if run.level]
    return found


def _compared(run: Run, curves: Curves, before: Run | None) -> Compared:
    psnr, densities = _mean_psnr(run), [d for d in run.density if d is not None]
    was = None
    if before is not None:
        old = _mean_psnr(before)
        was = statistics.mean(before.cost), old, _less(old, curves.at(0.0, before.cost))
    return Compared(
        run.model, run.steps, run.level, run.asked, statistics.mean(run.cost),
        statistics.mean(densities) if densities else None, psnr,
        {warm_up: curves.at(warm_up, run.cost) for warm_up in curves.warm_ups},
        [error / run.asked for error in run.error if error is not None],
        _less(psnr, curves.at(0.0, run.cost)), was,
    )  # fmt: skip


def _mean_psnr(run: Run) -> float:
    return statistics.mean(min(p, MOST_DECIBELS) for p in run.psnr)


def _less(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def comparison(rows: Sequence[Compared], style: str = "simple") -> str:
    warm_ups = sorted({warm_up for row in rows for warm_up in row.fixed})
    head = [
        "model", "steps", "level", "cost", "density", "PSNR dB",
        *(f"fixed, {_percent(w)} dense steps" if w else "fixed" for w in warm_ups),
        "level - fixed", "as it was: cost", "PSNR dB", "- fixed", "gain", "error / target", "worst",
    ]  # fmt: skip
    cells = [
        [
            r.model, r.steps, r.level, r.cost, r.density, r.psnr, *(r.fixed.get(w) for w in warm_ups),
            r.margin, *(r.before or (None, None, None)), r.gain,
            statistics.geometric_mean(r.ratios) if r.ratios else None, max(r.ratios, default=None),
        ]
        for r in rows
    ]  # fmt: skip
    formats = "", "", "", ".3f", ".3f", ".2f", *[".2f"] * len(warm_ups), "+.2f", ".3f", ".2f", "+.2f", "+.2f"
    return tabulate(cells, head, tablefmt=style, floatfmt=(*formats, ".2f", ".2f"), missingval="-")


def summary(rows: Sequence[Compared], style: str = "simple") -> str:
    """Means over models and numbers of steps, level by level, and over all levels."""
    warm_ups = sorted({warm_up for row in rows for warm_up in row.fixed})
    head = [
        "level", *(f"dB above fixed, {_percent(w)} dense steps" if w else "dB above fixed" for w in warm_ups),
        "least", "gain on what it was", "within 1.5x", "at most 1.5x",
    ]  # fmt: skip
    cells = []
    for level in [*dict.fromkeys(row.level for row in rows), "all"]:
        own = [row for row in rows if level in (row.level, "all")]

        def mean(value: Callable[[Compared], float | None], own: list[Compared] = own) -> float | None:
            known = [x for x in map(value, own) if x is not None]
            return statistics.mean(known) if known else None

        cells.append(
            [
                level,
                *(mean(lambda r, w=w: _less(r.psnr, r.fixed.get(w))) for w in warm_ups),
                min((r.margin for r in own if r.margin is not None), default=None),
                mean(lambda r: r.gain), mean(lambda r: r.within()), mean(lambda r: r.within(0.0)),
            ]
        )  # fmt: skip
    formats = ("", *["+.2f"] * (len(warm_ups) + 2), ".0%", ".0%")
    return tabulate(cells, head, tablefmt=style, floatfmt=formats, missingval="-")


def _percent(share: float) -> str:
    return f"{share:.0%}"
