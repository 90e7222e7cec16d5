"""How close do sparse clips come to dense ones? Trained tiny models, several clips, one table.

    python benchmarks/quality.py [--steps 30 --size 16x128x128 --density .3,.2,.15,.1 --clips 4 --json PATH]
    python benchmarks/quality.py --model hunyuan --weights outputs/tiny_hunyuan/export

Clips as in `tiny_clips.py`; the first 20% of the steps and layer 0 are dense throughout, as in the papers. At a
density the papers' presets share it equally over the rows; "released budget" is what their code does without
one: each row gets what top-p 0.9 of its centroid mass would cost, which is a density of its own. PSNR and SSIM
are against the dense clip, the mean over the clips and the worst; density is measured, over the sparse calls.
"error" is the median over the sparse calls whose error was measured: of the output, over all heads, relative
to exact attention of the same inputs. Nothing is timed: at these sizes a call is all launches.
`quality_plot.py` joins what --json wrote with the times of `attention.py` at a real size.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tabulate import tabulate
from tiny_clips import Clips, add_arguments, clips_of
from torch import Tensor

from svg_ear_compile import quality, report

DENSE_STEPS = 0.2
SCHEDULE = {"dense_steps": DENSE_STEPS, "dense_layers": 1}
RUNS: dict[str, dict[str, Any]] = {
    "default": {},
    "default, centroids only": {"first_order": False},
    "default, centroids and cubes only": {"first_order": False, "order": "cubes"},
    "default, skipped blocks dropped": {"order": "cubes", "compensate": False},
    "svg_ear": {"preset": "svg_ear"},
    "svg2": {"preset": "svg2"},
}
RELEASED = {f"{name}, released budget": RUNS[name] for name in ("svg_ear", "svg2")}
"""Once each: their density follows from the centroids."""


class Row(NamedTuple):
    """One run. asked, density: the setting (None: none) and what was measured; psnr, ssim: one value a clip.

    error: median relative error of the sparse calls that were measured. splits, first_order: share of the
    heads of sparse calls whose tokens were put into blocks by balanced splits, that had first-order terms.
    """

    model: str
    name: str
    asked: float | None
    density: float
    psnr: list[float]
    ssim: list[float]
    error: float
    splits: float
    first_order: float = 0.0


def measure(
    clips: Clips,
    densities: Sequence[float],
    runs: Sequence[str] = (*RUNS, *RELEASED),
    denser: Sequence[float] = (),
) -> Iterator[Row]:
    """Samples densely and, at each density, by every run of RUNS, then by those of RELEASED; a row as soon as it
    is known.

    denser: densities of the first run alone, for comparisons with slower ones at equal time.
    """
    dense = list(clips.sampled("dense", None))
    asked = [(density, runs[0]) for density in denser]
    asked += itertools.product(densities, [name for name in runs if name in RUNS])
    for density, name in asked:
        yield _row(clips, name, density, dense, {**SCHEDULE, **RUNS[name], "density": density})
    for name in runs:
        if name in RELEASED:
            yield _row(clips, name, None, dense, {**SCHEDULE, **RELEASED[name]})


def _row(clips: Clips, name: str, asked: float | None, dense: list[Tensor], options: dict[str, Any]) -> Row:
    close: dict[str, list[float]] = {"psnr": [], "ssim": []}
    errors, splits, first_order = [], [], []
    for reference, clip in zip(dense, clips.sampled(f"{name} {asked or ''}", options), strict=True):
        for metric, values in close.items():
            values.append(getattr(quality, metric)(reference, clip))
        told = report()
        errors += [call.error for call in told.errors() if call.error is not None]
        splits.append(told.totals()["split_share"])
        first_order.append(told.totals()["first_order_share"])
    density = told.totals()["measured_density"]
    return Row(
        clips.model, name, asked, density, **close, error=statistics.median(errors),
        splits=statistics.mean(splits), first_order=statistics.mean(first_order),
    )  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    headers = ("model", "run", "density", "measured", "PSNR dB", "worst", "SSIM", "error")
    headers += ("in splits", "first order")
    cells = [
        (
            r.model, r.name, r.asked, r.density, statistics.mean(r.psnr), min(r.psnr),
            statistics.mean(r.ssim), r.error, r.splits, r.first_order,
        )
        for r in rows
    ]  # fmt: skip
    formats = ("", "", ".2f", ".3f", ".2f", ".2f", ".4f", ".4f", ".0%", ".0%")
    return tabulate(cells, headers, floatfmt=formats, missingval="-")


def write(rows: Sequence[Row], path: Path, told: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**told, "rows": [row._asdict() for row in rows]}, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    numbers = {"type": lambda text: tuple(map(float, text.split(",")))}
    parser.add_argument("--density", default=(0.3, 0.2, 0.15, 0.1), **numbers)
    parser.add_argument("--denser", default=(0.45, 0.6), **numbers, help="densities of the first run alone")
    parser.add_argument(
        "--runs", type=lambda text: text.split(";"), default=[*RUNS, *RELEASED], help="separated by ;"
    )
    parser.add_argument("--json", type=Path)
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    clips, rows = clips_of(arguments), []
    for row in measure(clips, arguments.density, arguments.runs, arguments.denser):
        rows.append(row)
        if arguments.json is not None:  # a run that is cut short has not been in vain
            write(rows, arguments.json, clips.told())
    print(table(rows))


if __name__ == "__main__":
    main()
