"""What does each quality level give, with many steps and with few? Trained tiny models, one table.

    python benchmarks/levels.py [--levels high,balanced --step-counts 30,8,4 --clips 2 --json PATH]
    python benchmarks/levels.py --model hunyuan --weights outputs/tiny_hunyuan/export

For each number of steps the clips (`tiny_clips.py`) are sampled densely and at every level. Densities: of the
sparse calls, and over all calls of attention sites that may be sparse, dense ones as 1. "worst / target" is
the largest true error of a sparse call, over all its rows (setting `audit`; --no-audit leaves it out), over
its target: in the first two sparse steps of a layer and branch, and later, where at most 3 is promised.
"guard": calls that ran dense because an error was beyond max_error.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from error_budget import first_and_later
from quality_curves import Times
from tabulate import tabulate
from tiny_clips import Clips, add_arguments, clips_of
from torch import Tensor

from svg_ear_compile import quality, report
from svg_ear_compile.schedule import FEW_STEPS
from svg_ear_compile.settings import QUALITY

STEP_COUNTS = (30, 8, 4)
GUARD = "error beyond max_error"


class Row(NamedTuple):
    """One level at one number of steps. psnr, ssim: one value a clip; psnr is infinite where all was dense.

    density: of the sparse calls, None if there were none. sparse, dense: calls, the dense ones by reason.
    worst_first, worst_later: the largest true error over its target in the first two sparse steps of a layer
    and branch, and later; None if there were none, or not audited. splits, first_order: as in quality.py.
    """

    model: str
    level: str
    steps: int
    psnr: list[float]
    ssim: list[float]
    density: float | None
    sparse: int
    dense: dict[str, int]
    worst_first: float | None = None
    worst_later: float | None = None
    splits: float = 0.0
    first_order: float = 0.0

    @property
    def sparse_share(self) -> float:
        return self.sparse / (self.sparse + sum(self.dense.values()))

    @property
    def density_of_all(self) -> float:
        return 1 - self.sparse_share * (1 - (self.density or 0.0))

    def expected_time(self, times: Times) -> float:
        """Of all attention calls over dense ones, at the size of `times`.

        A dense call takes as long as a dense call; a sparse one is taken to be linear in its density, and in
        the shares of heads in splits and with first-order terms. Each layer chooses forms as measuring.py
        has it, once where steps are few.
        """
        fixed, more = times.line()
        density = self.density or 0.0
        sparse = fixed + more * density + times.extra(density, self.splits, self.first_order)
        choosing = times.choosing if self.steps > FEW_STEPS else times.choosing_first
        return 1 - self.sparse_share * (1 - sparse / times.dense) + choosing / (self.steps * times.dense)


def measure(
    clips: Clips, levels: Sequence[str], step_counts: Sequence[int], audit: bool = True
) -> Iterator[Row]:
    """A row as soon as it is known."""
    for steps in step_counts:
        some = replace(clips, steps=steps)
        dense = list(some.sampled(f"dense, {steps} steps", None))
        for level in levels:
            yield _row(some, level, dense, audit)


def _row(clips: Clips, level: str, dense: list[Tensor], audit: bool) -> Row:
    psnr, ssim, ratios = [], [], ([], [])
    label, options = f"{level}, {clips.steps} steps", {"quality": level, "audit": audit}
    for reference, clip in zip(dense, clips.sampled(label, options), strict=True):
        psnr.append(quality.psnr(reference, clip))
        ssim.append(quality.ssim(reference, clip))
        audited = [c for c in report().errors() if c.true_error is not None]
        for found, calls in zip(ratios, first_and_later(audited), strict=True):
            found += [c.true_error / c.target for c in calls]
    totals = report().totals()
    density = totals["measured_density"] if totals["sparse_calls"] else None
    return Row(
        clips.model, level, clips.steps, psnr, ssim, density, totals["sparse_calls"], totals["dense_calls"],
        *(max(found, default=None) for found in ratios), totals["split_share"], totals["first_order_share"],
    )  # fmt: skip


def table(rows: Sequence[Row], times: Times | None = None, style: str = "simple") -> str:
    """times: of attention calls at a real size, for the last column."""
    head = [
        "model", "level", "steps", "PSNR dB", "worst", "SSIM", "density", "of all calls", "dense calls, why",
        "worst / target, first 2 sparse steps", "later", "guard",
    ]  # fmt: skip
    cells = [
        [
            r.model, r.level, r.steps, statistics.mean(r.psnr), min(r.psnr), statistics.mean(r.ssim),
            r.density, r.density_of_all, _why(r), r.worst_first, r.worst_later, r.dense.get(GUARD, 0),
        ]
        for r in rows
    ]  # fmt: skip
    if times is not None:
        head.append("attention time of dense, expected")
        cells = [[*cell, row.expected_time(times)] for cell, row in zip(cells, rows, strict=True)]
    formats = ("", "", "", ".2f", ".2f", ".4f", ".3f", ".3f", "", ".2f", ".2f", "", ".2f")
    return tabulate(cells, head, tablefmt=style, floatfmt=formats, missingval="-")


def _why(row: Row) -> str:
    """40%: 20% warm-up steps, ..."""
    calls = row.sparse + sum(row.dense.values())
    reasons = sorted(row.dense.items(), key=lambda item: -item[1])
    return f"{1 - row.sparse_share:.0%}: " + ", ".join(f"{n / calls:.0%} {why}" for why, n in reasons)


def write(rows: Sequence[Row], path: Path, told: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    saved = [{**r._asdict(), "psnr": [p if math.isfinite(p) else None for p in r.psnr]} for r in rows]
    path.write_text(json.dumps({**told, "rows": saved}, indent=1) + "\n")


def read(told: dict[str, Any]) -> list[Row]:
    """The rows of what write() wrote. Earlier files have one worst call of all steps: it is left out."""
    rows = [{name: value for name, value in row.items() if name != "worst"} for row in told["rows"]]
    return [Row(**{**r, "psnr": [math.inf if p is None else p for p in r["psnr"]]}) for r in rows]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--levels", type=lambda text: text.split(","), default=list(QUALITY))
    parser.add_argument(
        "--step-counts", type=lambda text: [int(n) for n in text.split(",")], default=list(STEP_COUNTS)
    )
    parser.add_argument("--audit", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--json", type=Path)
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    clips, rows = clips_of(arguments), []
    for row in measure(clips, arguments.levels, arguments.step_counts, arguments.audit):
        rows.append(row)
        if arguments.json is not None:
            write(rows, arguments.json, clips.told())
    print(table(rows))


if __name__ == "__main__":
    main()
