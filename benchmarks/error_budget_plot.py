"""Do the sparse calls of each model keep their targets? A picture and a table of docs/QUALITY.md.

    python benchmarks/error_budget_plot.py benchmarks/results/error_budget_*.json docs/error_budget.png \
        docs/QUALITY.md

The picture: true error of every sparse call against its target, but for the first two sparse steps of each
layer and branch; the lines are 1, 1.5 and 3 times the target. The table goes between the page's first two
lines `<!-- errors -->`.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from error_budget import Row, ratios, read
from quality_plot import between, how
from tabulate import tabulate

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def table(rows: Mapping[str, Sequence[Row]]) -> str:
    """Of all steered runs of a model."""
    head = ("model", "targets", "calls", "within 1.5x", "at most 1.5x", "above 3x", "worst / target")
    cells = []
    for model, runs in rows.items():
        steered = [row for row in runs if row.target]
        found = [ratio for row in steered for ratio in ratios(row)]
        shares = [
            statistics.mean(low <= r <= high for r in found) for low, high in ((1 / 1.5, 1.5), (0, 1.5))
        ]
        above = sum(r > 3 for r in found) / len(found)
        targets = ", ".join(f"{row.target:g}" for row in steered)
        cells.append((model, targets, len(found), *shares, above, max(found)))
    formats = ("", "", "", ".1%", ".1%", ".1%", ".2f")
    return tabulate(cells, head, tablefmt="github", floatfmt=formats)


def picture(rows: Mapping[str, Sequence[Row]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6.5, 4.5), layout="constrained")
    targets = [row.target for runs in rows.values() for row in runs if row.target]
    for number, (model, runs) in enumerate(rows.items()):
        points = [(row.target or 0.0, ratio) for row in runs for ratio in ratios(row)]
        # Models side by side around their target, calls spread out within a model.
        places = [
            target * (0.85 + 0.3 * (number + i / len(points)) / len(rows))
            for i, (target, _) in enumerate(points)
        ]
        axes.scatter(places, [t * r for t, r in points], s=8, alpha=0.5, color=f"C{number}", label=model)
    ends = [min(targets) * 0.8, max(targets) * 1.25]
    for factor, style in ((1, "-"), (1.5, "--"), (3, ":")):
        axes.plot(ends, [factor * end for end in ends], "k" + style, lw=0.8, label=f"{factor:g} x target")
    axes.set(xscale="log", yscale="log", xlabel="target error", ylabel="true error of a call, all rows")
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    *sources, png, page = map(Path, sys.argv[1:] if argv is None else argv)
    told = [json.loads(source.read_text()) for source in sources]
    rows = {t["settings"]["model"]: read(t) for t in told}
    picture(rows, png)
    page.write_text(between(page.read_text(), "<!-- errors -->", f"{how(told)}\n\n{table(rows)}"))


if __name__ == "__main__":
    main()
