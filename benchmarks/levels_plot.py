"""The picture and the tables of quality levels in docs/QUALITY.md, from what levels.py wrote.

    python benchmarks/levels_plot.py --levels benchmarks/results/levels_{wan,hunyuan,cogvideox}.json \
        --before benchmarks/results/levels_before.json --png docs/levels.png --page docs/QUALITY.md

The tables go between the page's two lines `<!-- levels -->`. The picture: one column a model, one row a number of
steps; PSNR against total cost of the levels, of the levels as they were, and of one fixed density.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from equal_cost import MOST_DECIBELS, Curves, comparison, rows_of, summary
from levels import Run, read
from quality_plot import between, how

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def picture(runs: Sequence[Run], before: Sequence[Run], path: Path) -> None:
    models, counts = (list(dict.fromkeys(getattr(run, of) for run in runs)) for of in ("model", "steps"))
    figure, axes = plt.subplots(
        len(counts), len(models), figsize=(0.5 + 3.5 * len(models), 0.7 + 3.2 * len(counts)), squeeze=False,
        sharex=True, sharey=True, constrained_layout=True,
    )  # fmt: skip
    shown: dict[str, Any] = {}
    for row, steps in zip(axes, counts, strict=True):
        for axis, model in zip(row, models, strict=True):
            own = [run for run in runs if (run.model, run.steps) == (model, steps)]
            curves = Curves(own)
            for number, warm_up in enumerate(curves.warm_ups):
                name = f"one density, {warm_up:.0%} dense steps" if warm_up else "one density"
                (shown[name],) = axis.plot(
                    *zip(*curves.points(warm_up), strict=True), ".-", color=f"C{number}"
                )
            old = [run for run in before if (run.model, run.steps) == (model, steps)]
            for name, levels, style in (("levels", own, "k*"), ("levels as they were", old, "rx")):
                points = [_point(run) for run in levels if run.level]
                if points:
                    (shown[name],) = axis.plot(*zip(*points, strict=True), style, ms=9)
            axis.set(title=f"{model}, {steps} steps")
            axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("pairs computed in all calls")
    for axis in axes[:, 0]:
        axis.set_ylabel("PSNR against dense, dB")
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=3, fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _point(run: Run) -> tuple[float, float]:
    return statistics.mean(run.cost), statistics.mean(min(p, MOST_DECIBELS) for p in run.psnr)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--levels", type=Path, nargs="+", required=True)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--png", type=Path, required=True)
    parser.add_argument("--page", type=Path, required=True)
    arguments = parser.parse_args(argv)
    told = [json.loads(path.read_text()) for path in arguments.levels]
    runs = [run for t in told for run in read(t)]
    before = read(json.loads(arguments.before.read_text())) if arguments.before else []
    rows = rows_of(runs, before)
    picture(runs, before, arguments.png)
    for t in told:
        t["settings"].pop("steps", None)  # a column of the table
    shown = f"![PSNR against total cost: levels and one density]({arguments.png.name})"
    text = "\n\n".join([how(told), summary(rows, "github"), comparison(rows, "github"), shown])
    arguments.page.write_text(between(arguments.page.read_text(), "<!-- levels -->", text))


if __name__ == "__main__":
    main()
